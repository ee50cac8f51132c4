"""Explanation of a picture: the settings that differ, with measured effects, and advice."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from fidelora.engine.engine import Engine
from fidelora.errors import RecipeError
from fidelora.explain.align import Alignment, align, same_file
from fidelora.explain.candidates import Candidates
from fidelora.explain.differences import (
    Difference,
    advice_for,
    changed_causes,
    described,
    is_in_file,
    reverted,
)
from fidelora.explain.nearest import NearestThere, nearest_sampling, with_sampler_advice
from fidelora.explain.picture import Picture
from fidelora.explain.programs import BEHAVIOURS, sampling_of
from fidelora.explain.reading import Program, Reading, stem
from fidelora.explain.search import Search
from fidelora.explain.simulation import FAMILIES, Pixels, Simulation, Simulator
from fidelora.families import get_family
from fidelora.training.compare import compare
from fidelora.training.run_folder import TrainingRun
from fidelora.training.verify import read_trainer_image

OnProgress = Callable[[str, int, int], None]

DEFAULT_MAX_IMAGES = 40
"""Limit on the work per picture, in units of one image with the sample's number of steps."""
_SAME_LEVELS = 2  # largest difference of images that differ by rounding only
_SAME_MEAN = 0.6
"""Largest mean difference of such images; rounding down, not to the nearest level, gives 0.5."""
_MIN_EFFECT = 0.05  # levels; a smaller effect is rounding
_MIN_EFFECT_SHARE = 0.1
"""Effect relative to the remaining distance up to which a difference is not reported."""
_EXPLAINED = 0.35
"""Largest remaining distance of an explained picture, relative to the distance of the sample."""
_EXPLAINED_LEVELS = 1.0  # a remaining distance that half precision can cause
_SIMILAR_LEVELS = 12.0
"""Largest distance of a picture that may have been made with the sample's noise and sampler. Other
noise gives about 40 levels, another sampler 5 to 20."""
_DOUBTED_LEVELS = 0.75
"""Remaining distance above which the settings in the file are doubted."""


@dataclass(frozen=True, eq=False)
class Explanation:
    """Reasons why a picture differs from the trainer's sample.

    Attributes:
        reading: settings in the picture's file.
        program: program that made the picture, or the one whose simulation is nearest.
        alignment: the sample that the picture was compared with.
        trainer: pixels of the sample, uint8 RGB [height, width, 3].
        nearest: the simulated settings that come nearest to the picture.
        simulated: image of `nearest`.
        before, after: mean difference in levels of the picture from the sample and from
            `simulated`.
        differences: ordered by effect, those that were not measured last.
        nearest_there: the program's sampler that comes nearest to the trainer's sample; None if the
            sampler does not differ.
        notes: sentences about settings that were not simulated or could not be compared.
        images: work, in units of one image with the sample's number of steps.
    """

    picture: Picture
    reading: Reading
    program: Program
    alignment: Alignment
    trainer: Pixels
    nearest: Simulation
    simulated: Pixels
    before: float
    after: float
    differences: tuple[Difference, ...]
    nearest_there: NearestThere | None = None
    notes: tuple[str, ...] = ()
    images: int = 0

    @property
    def is_same(self) -> bool:
        """True if the picture is the trainer's sample, apart from rounding."""
        return not self.differences and self.before <= _SAME_MEAN

    @property
    def chosen(self) -> tuple[Difference, ...]:
        """Differences that a user can set, without those that the program always causes."""
        return tuple(one for one in self.differences if not one.is_always)

    @property
    def always(self) -> tuple[Difference, ...]:
        """Differences that the program always causes, whatever its user sets."""
        return tuple(one for one in self.differences if one.is_always)

    @property
    def is_explained(self) -> bool:
        """True if the differences explain the picture."""
        return self.is_same or _explains(self.before, self.after)


def explain(
    run: TrainingRun,
    picture: Picture,
    reading: Reading,
    engine: Engine,
    *,
    step: int | None = None,
    index: int | None = None,
    base_model: str | None = None,
    max_images: int = DEFAULT_MAX_IMAGES,
    on_progress: OnProgress | None = None,
) -> Explanation:
    """Find out why a picture differs from the trainer's sample.

    Args:
        reading: settings in the picture's file, or given by hand.
        step, index: the sample; None to find it.
        base_model: replaces the base model in the run's configuration.
        max_images: limit on the work, in units of one image with the sample's number of steps.
        on_progress: called before each image with the kind of work, the number of finished images
            and the limit.

    Raises:
        RecipeError: the model family is not supported.
        NothingToCheckError: the run has no such sample.
        FideloraError: a file cannot be used.
    """
    if run.model not in FAMILIES:
        titles = " and ".join(get_family(one).title for one in FAMILIES)
        raise RecipeError(
            f"Pictures of {get_family(run.model).title} cannot be explained; only those of "
            f"{titles} can.",
            field="model",
        )
    return _Explainer(
        run, picture, reading, engine, step, index, base_model, max_images, on_progress
    ).explanation()


def _explains(before: float, after: float) -> bool:
    """True if a picture is explained whose distance the simulation reduces to `after` levels."""
    return after <= max(_EXPLAINED * before, _EXPLAINED_LEVELS)


class _Explainer:
    def __init__(
        self,
        run: TrainingRun,
        picture: Picture,
        reading: Reading,
        engine: Engine,
        step: int | None,
        index: int | None,
        base_model: str | None,
        max_images: int,
        on_progress: OnProgress | None,
    ) -> None:
        self._run, self._picture, self._reading = run, picture, reading
        self._alignment = align(
            run, reading, picture.pixels, step=step, index=index, base_model=base_model
        )
        plan = self._alignment.plan
        assert plan.trainer_image is not None
        self._trainer_pixels = read_trainer_image(plan.trainer_image)[0]
        self._trainer = Simulation.of_recipe(plan.recipe)
        self._simulator = Simulator(engine, plan.recipe, self._report)
        self._max_images = max_images
        self._on_progress = on_progress
        self._task = "searching"
        self._search = Search(self._simulator, picture, max_images * self._trainer.evaluations)
        self._candidates = Candidates(
            run, reading, self._alignment, self._trainer, self._changes_text(engine)
        )

    def explanation(self) -> Explanation:
        before = self._picture.distance(self._trainer_pixels)
        notes = [*self._reading.unsupported, *self._unsimulated_sampler(), *self._other_loras()]
        files, file_notes = self._base_differences()
        notes += file_notes
        if self._is_same():
            return self._result(self._trainer, before, (), notes, None, self._trainer_pixels)
        nearest = self._nearest()
        nearest, effects = self._without_ineffective(nearest)
        after = self._search.distance(nearest)
        program = self._program_of(nearest)
        lora = self._alignment.lora.name if self._alignment.lora else self._run.name
        differences = [
            Difference(
                cause,
                described(nearest, cause, program),
                described(self._trainer, cause, program),
                round(effect, 4),
                advice_for(cause, self._trainer, program, lora),
                is_in_file(cause, self._reading),
                is_always=cause == "upsampling",  # no program has a setting for it
            )
            for cause, effect in effects
        ]
        differences.sort(key=lambda one: -(one.effect or 0.0))
        there = None
        if any(one.cause in ("sampler", "schedule") for one in differences):
            there = self._nearest_there(program, nearest)
            differences = [with_sampler_advice(one, there, program) for one in differences]
        simulated = self._simulator.image(nearest)
        return self._result(
            nearest, before, (*differences, *files), notes, there, simulated, after, program
        )

    def _result(
        self,
        nearest: Simulation,
        before: float,
        differences: tuple[Difference, ...],
        notes: list[str],
        there: NearestThere | None,
        simulated: Pixels,
        after: float | None = None,
        program: Program | None = None,
    ) -> Explanation:
        return Explanation(
            self._picture,
            self._reading,
            program or self._reading.program,
            self._alignment,
            self._trainer_pixels,
            nearest,
            simulated,
            before,
            before if after is None else after,
            differences,
            there,
            tuple(dict.fromkeys(notes)),
            self._images(),
        )

    # --- search ---------------------------------------------------------------------------------

    def _is_same(self) -> bool:
        if self._trainer_pixels.shape != self._picture.pixels.shape:
            return False
        difference = compare(self._picture.pixels, self._trainer_pixels)
        return (
            difference.max_difference <= _SAME_LEVELS and difference.mean_difference <= _SAME_MEAN
        )

    def _nearest(self) -> Simulation:
        candidates, search = self._candidates, self._search
        width, height = self._picture.size
        start = candidates.start(width, height)
        if joint := candidates.joint_axes():
            if self._picture.distance(self._trainer_pixels) <= _SIMILAR_LEVELS:
                start = search.descend(start, list(candidates.similar_axes()))
            if search.distance(start) > _DOUBTED_LEVELS:
                start = search.joint(start, joint)
        nearest = candidates.normal(search.descend(start, list(candidates.axes())))
        if search.distance(nearest) > _DOUBTED_LEVELS:
            self._task = "trying other values than those in the file"
            doubted = search.descend(nearest, list(candidates.axes(doubts=True)))
            nearest = candidates.normal(doubted)
        before = self._picture.distance(self._trainer_pixels)
        if not _explains(before, search.distance(nearest)):
            self._task = "trying two settings together"
            pair = search.best_pair(nearest, list(candidates.pair_axes()))
            if pair != nearest:
                nearest = candidates.normal(search.descend(pair, list(candidates.axes())))
        return nearest

    def _without_ineffective(
        self, nearest: Simulation
    ) -> tuple[Simulation, list[tuple[str, float]]]:
        """Return the simulation without ineffective differences, and the effects of the others.

        A setting is reset to the trainer's value if that does not increase the distance from the
        picture. The effect of a cause is the increase of the distance when its settings are reset.
        """
        self._task = "measuring effects"
        kept: list[tuple[str, float]] = []
        changed = True
        while changed:
            changed = False
            after = self._search.distance(nearest)
            kept = []
            for cause in changed_causes(nearest, self._trainer, self._run.trigger_text):
                without = self._candidates.normal(reverted(nearest, self._trainer, cause))
                effect = self._search.distance(without) - after
                if effect <= max(_MIN_EFFECT, _MIN_EFFECT_SHARE * after):
                    if effect <= 0 and without != nearest:
                        nearest, changed = without, True
                        break
                    continue
                kept.append((cause, effect))
        return nearest, kept

    def _nearest_there(self, program: Program, nearest: Simulation) -> NearestThere | None:
        """Return the sampler of the program that comes nearest to the trainer's sample."""
        self._task = f"comparing samplers of {program}"
        plan = self._alignment.plan
        there = replace(
            nearest,
            prompt=self._trainer.prompt,
            negative_prompt=self._trainer.negative_prompt,
            width=self._trainer.width,
            height=self._trainer.height,
            seed=self._trainer.seed,
            steps=self._trainer.steps,
            guidance_scale=self._trainer.guidance_scale,
            strength=self._trainer.strength,
            text_strength=self._trainer.text_strength,
            clip_skip=0,
            text_rule="plain",
            device="cpu",
            step_noise=(
                nearest.step_noise if nearest.draws_in_steps else BEHAVIOURS[program].step_noises[0]
            ),
            index=0,
            batch=1,
        )
        found = nearest_sampling(
            program, plan.recipe.sampler, there, self._trainer_pixels, self._simulator
        )
        return found[1] if found else None

    def _images(self) -> int:
        """Return the work so far, in units of one image with the sample's number of steps."""
        return math.ceil(self._simulator.evaluations / self._trainer.evaluations)

    def _report(self) -> None:
        if self._on_progress is not None:
            done = self._images()
            self._on_progress(self._task, done, max(self._max_images, done))

    # --- parts of the explanation ---------------------------------------------------------------

    def _program_of(self, nearest: Simulation) -> Program:
        if self._reading.program != "unknown":
            return self._reading.program
        if nearest.library == "diffusers":
            return "diffusers"
        return "ComfyUI" if nearest.whole_timesteps else "A1111"

    def _unsimulated_sampler(self) -> list[str]:
        reading = self._reading
        if not reading.sampler or sampling_of(reading, get_family(self._run.model)) is not None:
            return []
        schedule = f" with the schedule {reading.scheduler}" if reading.scheduler else ""
        return [
            f"The sampler {reading.sampler}{schedule} of {reading.program} is not simulated; the "
            "nearest other sampler is used."
        ]

    def _other_loras(self) -> list[str]:
        return [
            f"The picture was also made with the LoRA {lora.name} (strength {lora.strength:g}), "
            "which is not simulated."
            for lora in self._reading.loras or ()
            if lora != self._alignment.lora
        ]

    def _base_differences(self) -> tuple[tuple[Difference, ...], list[str]]:
        """Return base model and VAE that differ by hash, and notes on those of unknown hash."""
        recipe, reading = self._alignment.plan.recipe, self._reading
        found, notes = [], []
        for cause, used, own, title in (
            ("base_model", reading.base_model, recipe.base_model, "base model"),
            ("vae", reading.vae, recipe.vae, "VAE"),
        ):
            if not used.name and not used.hash:
                continue
            if same_file(used, own) is False:
                theirs = f"{used.name} (hash {used.hash})".strip()
                own_name = stem(own) or "the VAE in the base model"
                advice = advice_for(cause, self._trainer, reading.program, "")
                found.append(Difference(cause, theirs, own_name, None, advice, True))
            elif same_file(used, own) is None and stem(used.name) != stem(own):
                notes.append(
                    f"The picture's {title} is {used.name or used.hash}. Its name does not show "
                    "whether it is the one of training "
                    f"({stem(own) or 'contained in the base model'})."
                )
        return tuple(found), notes

    def _changes_text(self, engine: Engine) -> bool:
        """Return True if an adapter of the sample changes text encoders."""
        recipe = self._alignment.plan.recipe
        encoders = {part.name for part in get_family(recipe.model).text_encoders}
        with engine.model_for(recipe) as (_, bound):
            return any(
                one.word is None and not one.components.isdisjoint(encoders)
                for one, _ in bound.adapters
            )
