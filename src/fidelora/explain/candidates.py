"""Settings that a picture may have been made with: those in its file, and alternatives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fidelora.errors import RecipeError
from fidelora.explain.align import Alignment
from fidelora.explain.k_samplers import BROWNIAN
from fidelora.explain.programs import (
    BEHAVIOURS,
    USUAL_LAYERS,
    Sampling,
    sampling_of,
    usual_offset,
    usual_spacing,
)
from fidelora.explain.prompts import plain_text
from fidelora.explain.reading import Program, Reading
from fidelora.explain.search import Axis, Changes
from fidelora.explain.simulation import Simulation
from fidelora.families import Family, get_family
from fidelora.images.a1111_prompt import describe_brackets, describe_syntax
from fidelora.recipe import replace_trigger
from fidelora.training.flags import split_flags
from fidelora.training.run_folder import TrainingRun

_LIKELY_PROGRAMS: tuple[Program, ...] = ("diffusers", "ComfyUI", "A1111")
"""Programs that are tried for a picture whose file does not name one."""
_MAX_PLAIN_CHARACTERS = 150
"""Characters of a prompt up to which it is assumed to fit in 75 tokens; most tokens have more than
two."""
_STEPS = (4, 8, 10, 12, 15, 20, 25, 28, 30, 35, 40, 50)
_GUIDANCE = (1, 1.5, 2, 3, 3.5, 4, 4.5, 5, 5.5, 6, 6.5, 7, 7.5, 8, 9, 10, 12, 15)
_STRENGTHS = (0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 1.0, 1.1, 1.2, 1.5)
_BATCH_POSITIONS = (1, 2, 3)
_NOVELAI_SEED_DELTA = 31337  # a common value of A1111's "Eta noise seed delta"
_DIFFUSERS_SAMPLERS = (
    "ddpm", "ddim", "pndm", "euler", "euler_a", "dpmsolver++", "k_dpmsolver++", "lms", "heun",
    "k_euler",
)  # fmt: skip
_K_SAMPLINGS = (
    ("euler", "normal"), ("euler_ancestral", "normal"), ("dpmpp_2m", "karras"),
    ("dpmpp_2m", "normal"), ("euler", "simple"), ("euler", "karras"), ("heun", "normal"),
    ("lms", "normal"), ("dpm_2", "normal"),
)  # fmt: skip


@dataclass(frozen=True)
class Candidates:
    """Builds the first simulation of a picture and the axes of the search.

    Args:
        trainer: the trainer's settings of the sample.
        has_text_adapter: True if the trained adapter changes text encoders.
    """

    run: TrainingRun
    reading: Reading
    alignment: Alignment
    trainer: Simulation
    has_text_adapter: bool

    @property
    def spec(self) -> Family:
        """The model family."""
        return get_family(self.run.model)

    @property
    def programs(self) -> tuple[Program, ...]:
        """Programs that may have made the picture."""
        known = self.reading.program
        return _LIKELY_PROGRAMS if known == "unknown" else (known,)

    def start(self, width: int, height: int) -> Simulation:
        """Return the settings in the file, with the program's and the trainer's defaults.

        Args:
            width, height: size of the picture in pixels.
        """
        reading, behaviour = self.reading, BEHAVIOURS[self.reading.program]
        values: dict[str, Any] = {
            "rounds_noise": False,
            "dtype": reading.dtype or "float32",
            **behaviour.fields,
            "width": reading.width or width,
            "height": reading.height or height,
        }
        if reading.program in ("unknown", "Fidelora"):
            values["dtype"] = self.trainer.dtype
        for name in (
            "prompt", "negative_prompt", "steps", "guidance_scale", "guidance_rescale", "seed",
        ):  # fmt: skip
            if getattr(reading, name) is not None:
                values[name] = getattr(reading, name)
        if (width, height) != (values["width"], values["height"]):
            values |= {"width": width, "height": height}  # upscaled, or snapped to a multiple
        sampling = sampling_of(reading, self.spec)
        if sampling is not None:
            values |= self._sampling(sampling)
        values["device"] = reading.noise_source or behaviour.devices[0]
        values["step_noise"] = behaviour.step_noises[0]
        values["seed_delta"] = reading.seed_delta
        if reading.batch and self.reading.program in ("ComfyUI", "SwarmUI"):
            values["batch"] = reading.batch
        values["index"] = reading.index or 0
        values["text_rule"] = reading.emphasis or behaviour.text_rules[0]
        values["clip_skip"] = self._clip_skip(reading.clip_skip or 0)
        values["zero_negative"] = self._may_zero and behaviour.zeroes_empty_negative
        if reading.loras is not None:
            lora = self.alignment.lora
            values["strength"] = lora.strength if lora else 0.0
            values["text_strength"] = lora.text_strength if lora else 0.0
        return self.normal(replace(self.trainer, **values))

    def normal(self, simulation: Simulation) -> Simulation:
        """Return the simulation with the trainer's values for settings that have no effect."""
        values: dict[str, Any] = {}
        texts = (simulation.prompt, simulation.negative_prompt)
        if not any(self._has_syntax(text) for text in texts):
            values["text_rule"] = "plain"
        elif max(map(len, texts)) <= _MAX_PLAIN_CHARACTERS:
            values |= _without_escapes(simulation)
        if not self.has_text_adapter:
            values["text_strength"] = simulation.strength
        if not simulation.draws_in_steps:
            values |= {"step_noise": "continued", "seed_delta": 0}
        elif self._draws_on_cpu(simulation):
            values["step_noise"] = "cpu_same_seed"
        if simulation.guidance_scale <= 1:
            values["negative_prompt"] = self.trainer.negative_prompt
        if simulation.negative_prompt:
            values["zero_negative"] = False
        if simulation.width % 64 == simulation.height % 64 == 0:
            values["doubles_sizes"] = False
        return replace(simulation, **values)

    def joint_axes(self) -> list[tuple[Axis, Axis]]:
        """Return the axes of noise and sampler for each possible program.

        Both are searched together: with the wrong noise, the right sampler does not come near, and
        with the wrong sampler, the right noise does not either.
        """
        if sampling_of(self.reading, self.spec) is not None and self.reading.program != "unknown":
            return []
        return [
            (self._noise((program,), narrow=True), self._samplers((program,)))
            for program in self.programs
        ]

    def similar_axes(self) -> Iterator[Axis]:
        """Yield axes that are tried first for a picture that is similar to the sample."""
        reading = self.reading
        if reading.loras is None:
            yield from self._loras()
        if reading.guidance_scale is None:
            yield Axis("guidance", [{"guidance_scale": float(one)} for one in _GUIDANCE], True)
        if reading.prompt is None:
            yield Axis("prompt", list(self._prompts()))
        if reading.negative_prompt is None:
            yield Axis("negative_prompt", [{"negative_prompt": ""}])

    def axes(self, *, doubts: bool = False) -> Iterator[Axis]:
        """Yield axes for the settings that the file does not contain.

        Args:
            doubts: True to also yield axes for some settings that the file does contain, because
                these do not explain the picture.
        """
        reading = self.reading
        sampling_known = sampling_of(reading, self.spec) is not None
        if reading.seed is None:
            seeds = dict.fromkeys((self.trainer.seed, self.run.seed, 42, 0, 1))
            yield Axis("seed", [{"seed": seed} for seed in seeds if seed >= 0])
        yield self._noise(self.programs, narrow=False)
        if not sampling_known or reading.program == "unknown" or doubts:
            yield self._samplers(self.programs)
        elif self.programs == ("diffusers",) and not reading.scheduler:
            # A script names the class of its scheduler; the configuration decides the spacing.
            given = sampling_of(reading, self.spec)
            assert given is not None
            spacings = [given._replace(schedule=one) for one in self._spacings(given.sampler)]
            yield Axis("schedule", [self._sampling(one) for one in spacings])
        if reading.prompt is None:
            yield Axis("prompt", list(self._prompts()))
        if reading.negative_prompt is None or doubts:
            yield Axis("negative_prompt", [{"negative_prompt": ""}])
        if reading.guidance_scale is None:
            yield Axis("guidance", [{"guidance_scale": float(one)} for one in _GUIDANCE], True)
        if reading.steps is None:
            yield Axis("steps", [{"steps": steps} for steps in _STEPS])
        rules = dict.fromkeys(
            rule for program in self.programs for rule in BEHAVIOURS[program].text_rules
        )
        if reading.emphasis is None or doubts:
            yield Axis("emphasis", [{"text_rule": rule} for rule in rules])
        if reading.clip_skip is None or doubts:
            yield Axis("clip_skip", [{"clip_skip": layer} for layer in self._layers()])
        if reading.loras is None or doubts:
            yield from self._loras()
        if self._may_zero:
            yield Axis("negative_zeros", [{"zero_negative": zero} for zero in (True, False)])
        if reading.dtype is None:
            rounded = [{"dtype": self.trainer.dtype, "rounds_noise": True}]
            plain = [{"dtype": one, "rounds_noise": False} for one in self._dtypes()]
            yield Axis("precision", [*plain, *rounded])

    def pair_axes(self) -> Iterator[Axis]:
        """Yield settings that scripts commonly lack, the likeliest first, for changes in pairs."""
        reading = self.reading
        if reading.negative_prompt is None:
            yield Axis("negative_prompt", [{"negative_prompt": ""}])
        if reading.clip_skip is None:
            layers = [{"clip_skip": layer} for layer in self._layers() if layer]
            yield Axis("clip_skip", layers)
        if reading.loras is None and self.alignment.plan.recipe.adapters:
            yield Axis("lora", [{"strength": 0.0, "text_strength": 0.0}])
        if reading.prompt is None:
            prompts = [one for one in self._prompts() if one["prompt"] != self.trainer.prompt]
            yield Axis("prompt", prompts)

    # --- single axes ----------------------------------------------------------------------------

    def _noise(self, programs: Sequence[Program], *, narrow: bool) -> Axis:
        """Return the sources of random numbers; `narrow` leaves out rare ones."""
        pairs = [
            (device, steps)
            for behaviour in (BEHAVIOURS[program] for program in programs)
            for device in behaviour.devices
            for steps in behaviour.step_noises[: 2 if narrow else None]
        ]
        options: list[Changes] = [
            {"device": device, "step_noise": steps, "index": 0}
            for device, steps in dict.fromkeys(pairs)
        ]
        if narrow:
            return Axis("noise", options)
        if any(program in ("ComfyUI", "SwarmUI") for program in programs):
            batch = self.reading.batch or 1
            if batch > 1:
                options += [{"index": index} for index in _BATCH_POSITIONS if index < batch]
        if any(program in ("A1111", "Forge") for program in programs):
            options.append({"seed_delta": _NOVELAI_SEED_DELTA})
        return Axis("noise", options)

    def _samplers(self, programs: Sequence[Program]) -> Axis:
        options: list[Changes] = []
        for program in programs:
            behaviour = BEHAVIOURS[program]
            fixed = {
                "rounds_noise": False,
                "truncates": False,
                "skips_in_negative": True,
                "doubles_sizes": False,
                **behaviour.fields,
            }
            given = sampling_of(replace(self.reading, program=program), self.spec)
            if given is not None:
                options.append({**fixed, **self._sampling(given)})
                continue
            samplings = (
                [
                    Sampling("diffusers", name, spacing)
                    for name in _DIFFUSERS_SAMPLERS
                    for spacing in self._spacings(name)
                ]
                if behaviour.library == "diffusers"
                else [Sampling("k-diffusion", *names) for names in _K_SAMPLINGS]
            )
            options += [{**fixed, **self._sampling(one)} for one in samplings]
        return Axis("sampler", options)

    def _sampling(self, sampling: Sampling) -> dict[str, Any]:
        whole = sampling.library == "k-diffusion"
        return {
            "library": sampling.library,
            "sampler": sampling.sampler,
            "schedule": sampling.schedule,
            "steps_offset": usual_offset(sampling.library, sampling.schedule),
            "eta": None,
            **({} if whole else {"whole_timesteps": False, "scales_start": False}),
        }

    def _spacings(self, name: str) -> Sequence[str]:
        """Return spacings of a diffusers sampler: the trainer's and that of the base model."""
        if name in ("ddpm", "euler_a"):
            return ("",)  # an image with all steps is needed to compare these
        return tuple(dict.fromkeys(("", usual_spacing(name, self.spec))))

    def _prompts(self) -> Iterator[Changes]:
        item = self.run.samples[self.alignment.plan.index]
        text = split_flags(item.prompt)[0]
        word = self.run.trigger_text
        prompts = [text, text.replace("[trigger]", ""), replace_trigger(text, word), item.prompt]
        if word and self.reading.prompt is None:
            prompts += [f"{word} {self.trainer.prompt}", f"{word}, {self.trainer.prompt}"]
        for prompt in dict.fromkeys(prompts):
            yield {"prompt": prompt}

    def _loras(self) -> Iterator[Axis]:
        if not self.alignment.plan.recipe.adapters:
            return
        full = self.trainer.strength
        pairs = [(full, full), (0.0, 0.0), (1.0, 1.0)]
        if self.has_text_adapter:
            pairs += [(full, 0.0), (0.0, full)]
        yield Axis("lora", [{"strength": a, "text_strength": b} for a, b in dict.fromkeys(pairs)])
        if not self.has_text_adapter:
            values = dict.fromkeys((*_STRENGTHS, full))
            yield Axis("lora", [{"strength": one} for one in values], True)
        else:
            both = [{"strength": one, "text_strength": one} for one in _STRENGTHS]
            yield Axis("lora", both)

    def _dtypes(self) -> list[str]:
        return list(dict.fromkeys(("float32", self.trainer.dtype)))

    @staticmethod
    def _draws_on_cpu(simulation: Simulation) -> bool:
        """True for ComfyUI's samplers that draw a Brownian path on the CPU on every device."""
        return (
            simulation.sampler in BROWNIAN
            and not simulation.sampler.endswith("_gpu")
            and simulation.step_noise != "continued"
        )

    # --- details --------------------------------------------------------------------------------

    @property
    def _may_zero(self) -> bool:
        return self.spec.id == "sdxl"

    def _clip_skip(self, layer: int) -> int:
        """Return `Simulation.clip_skip`, which is 0 for the family's usual layer."""
        if self.spec.id == "sdxl":
            # A1111 does not skip layers of SDXL by default.
            skips = self.reading.program in ("ComfyUI", "diffusers", "unknown")
            return layer if skips and layer not in (0, USUAL_LAYERS["sdxl"]) else 0
        return 0 if layer == 1 else layer

    def _layers(self) -> list[int]:
        """Return values of `Simulation.clip_skip` to try."""
        layers = [0]
        if self.programs != ("diffusers",):
            layers += [self._clip_skip(one) for one in (1, 2)]
        if "diffusers" in self.programs:
            # diffusers counts from the family's usual layer; these are its clip_skip 1 and 2.
            usual = USUAL_LAYERS.get(self.spec.id, 1)
            layers += [usual + 1, usual + 2]
        return list(dict.fromkeys(layers))

    def _has_syntax(self, text: str) -> bool:
        return bool(
            describe_syntax(text)
            or describe_brackets(text)
            or "\\" in text
            or len(text) > _MAX_PLAIN_CHARACTERS
        )


def _without_escapes(simulation: Simulation) -> dict[str, Any]:
    """Return the prompts for the rule `plain`; empty if a prompt has word weights."""
    try:
        prompt = plain_text(simulation.prompt, simulation.text_rule)
        negative = plain_text(simulation.negative_prompt, simulation.text_rule)
    except RecipeError:  # a weight that is not a number; the simulation reports it
        return {}
    if prompt is None or negative is None:
        return {}
    return {"prompt": prompt, "negative_prompt": negative, "text_rule": "plain"}
