"""Verification of a training run: replay its samples and classify the differences.

An identical sample proves that its settings are right. A sample that differs by less than a fixed
bound is explained by float32 rounding on another processor. If a sample differs more, all samples
of its step that are not identical are judged together by the tests of `judge.py`.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from PIL import Image

from fidelora.engine.engine import Engine
from fidelora.errors import NothingToCheckError, TrainingRunError
from fidelora.images.write import GeneratedImage
from fidelora.recipe import Recipe
from fidelora.training.compare import (
    Comparison,
    compare,
    decoded_frames,
    reencode,
    similarity,
    size_text,
)
from fidelora.training.draws import saved_dtype
from fidelora.training.evidence import Evidence, Verdict
from fidelora.training.history import History, resumed_histories
from fidelora.training.initial_embedding import with_initial_embedding
from fidelora.training.judge import Pixels, judge
from fidelora.training.notes import first_round_to_check
from fidelora.training.plan import PlannedSample, plan_samples
from fidelora.training.run_folder import TrainingRun

OnSample = Callable[["CheckedSample"], None]
OnProgress = Callable[[str, int, int], None]

PROCESSOR_REASON = (
    "Other processors or numbers of threads add numbers in a different order. In measurements, "
    "at least 99.93 % of the pixels stayed identical, and the others changed by 1 level."
)


@dataclass(frozen=True)
class CheckedSample:
    """A replayed sample compared with the trainer's.

    Attributes:
        plan: the sample with its recipe and the trainer's file.
        image: the replayed sample as generated.
        replayed: its pixels after encoding in the trainer's file format, uint8 RGB
            [height, width, 3], or [frames, height, width, 3] for a video.
        trainer: the trainer's pixels in the same form.
        comparison: None if the sizes differ.
        psnr: in dB; None if every pixel is the same.
        ssim: -1..1.
        verdict: the result.
        evidence: result of the tests of `judge.py`; None if the verdict does not depend on them.
    """

    plan: PlannedSample
    image: GeneratedImage
    replayed: Pixels
    trainer: Pixels
    comparison: Comparison | None
    psnr: float | None
    ssim: float
    verdict: Verdict
    evidence: Evidence | None = None

    @property
    def summary(self) -> str:
        """The verdict as one phrase."""
        if self.comparison is None:
            return (
                f"mismatch: the sample is {size_text(self.trainer)}, "
                f"but its settings give {size_text(self.replayed)}"
            )
        if self.verdict is Verdict.IDENTICAL:
            return "identical"
        return (
            f"{self.verdict.value}: {self.comparison.percent_text} % of pixels the same, "
            f"at most {self.comparison.max_difference} of 255 levels"
        )

    @property
    def reason(self) -> str:
        """Reason for the verdict on a sample that is not identical, as sentences; may be empty."""
        history = self.plan.history.summary
        if self.evidence is not None:
            lost = "; ".join(self.evidence.lost)
            return f"{lost[0].upper()}{lost[1:]}. {history} {self.evidence.reason}".strip()
        return PROCESSOR_REASON if self.verdict is Verdict.ROUNDING else history


def verify(
    run: TrainingRun,
    engine: Engine,
    steps: Sequence[int],
    *,
    base_model: str | None = None,
    changes: Mapping[str, str] | None = None,
    on_sample: OnSample | None = None,
    on_progress: OnProgress | None = None,
) -> list[CheckedSample]:
    """Replay and check the samples of the given steps.

    Args:
        base_model: replaces the base model in the configuration.
        changes: recipe fields that replace the run's, such as `dtype` or `noise`.
        on_sample: called with each checked sample, after the samples of a step are judged.
        on_progress: called after each image, with the kind of work, the number of finished images
            and the total.

    Raises:
        NothingToCheckError: these steps have no samples.
        TrainingRunError: a sample cannot be read, or a setting is invalid.
        FideloraError: a file cannot be used.
    """

    def planned(step: int, history: History | None = None) -> list[PlannedSample]:
        plans = plan_samples(run, step, base_model=base_model, history=history)
        return [
            replace(plan, recipe=_changed(plan.recipe, changes or {}))
            for plan in plans
            if plan.trainer_image is not None
        ]

    if 0 in steps and run.embedding is not None:
        folder = Path(tempfile.mkdtemp(prefix="fidelora-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)  # the doctor uses the file, too
        run = with_initial_embedding(run, engine, folder, base_model=base_model, changes=changes)
    checked: list[CheckedSample] = []
    first_round = first_round_to_check(run)
    if first_round is not None and 0 in steps:
        checked += verify(
            first_round,
            engine,
            [0],
            base_model=base_model,
            changes=changes,
            on_sample=on_sample,
            on_progress=on_progress,
        )
    by_step = {step: plans for step in steps if (plans := planned(step))}
    if not by_step and not checked:
        raise NothingToCheckError(
            f"The training run {run.name} has no samples of its prompts at these steps."
        )
    for plans in by_step.values():  # report an unreadable file before spending time on the others
        for plan in plans:
            assert plan.trainer_image is not None
            read_trainer_image(plan.trainer_image)
    total = sum(map(len, by_step.values()))
    done = 0
    for step, plans in by_step.items():
        samples = []
        for plan in plans:
            samples.append(check_sample(plan, engine))
            done += 1
            if on_progress is not None:
                on_progress("replaying", done, total)
        if _may_be_resumed(samples):
            samples = _with_resumed_history(run, step, samples, planned, engine)
        samples = _judged(run, engine, samples, on_progress)
        checked += samples
        for sample in samples if on_sample is not None else ():
            assert on_sample is not None
            on_sample(sample)
    return checked


def check_sample(plan: PlannedSample, engine: Engine) -> CheckedSample:
    """Replay one sample and compare it with the trainer's, without a judgement.

    Returns:
        the sample with the verdict `identical`, `rounding` if float32 on another processor can
        cause the difference, or else `mismatch`.

    Raises:
        TrainingRunError: the trainer's sample cannot be read.
        FideloraError: a file cannot be used.
    """
    assert plan.trainer_image is not None
    trainer, image_format = read_trainer_image(plan.trainer_image)
    image = engine.generate(plan.recipe)
    replayed = reencode(image.all_pixels, image_format, plan.recipe.fps)
    if replayed.shape != trainer.shape:
        return CheckedSample(plan, image, replayed, trainer, None, 0.0, 0.0, Verdict.MISMATCH)
    comparison = compare(replayed, trainer)
    psnr, ssim = similarity(replayed, trainer)
    verdict = Verdict.MISMATCH
    if comparison.identical:
        verdict = Verdict.IDENTICAL
    elif comparison.within_rounding and comparison.mean_difference <= MAX_ROUNDING_MEAN:
        verdict = Verdict.ROUNDING
    return CheckedSample(plan, image, replayed, trainer, comparison, psnr, ssim, verdict)


MAX_ROUNDING_MEAN = 0.05
"""Largest mean difference in levels that float32 on another processor can cause."""


def _judged(
    run: TrainingRun,
    engine: Engine,
    samples: list[CheckedSample],
    on_progress: OnProgress | None,
) -> list[CheckedSample]:
    """Return the samples of a step with the verdict of their common judgement."""
    # Identical samples are left out: rounding errors change their draws, but not the sample.
    comparable = [
        sample
        for sample in samples
        if sample.comparison is not None and sample.verdict is not Verdict.IDENTICAL
    ]
    if all(sample.verdict is not Verdict.MISMATCH for sample in comparable):
        return samples
    on_image = None
    if on_progress is not None:
        on_image = partial(on_progress, f"judging step {samples[0].plan.round}")
    evidence = judge(
        run,
        engine,
        [sample.plan for sample in comparable],
        [sample.replayed for sample in comparable],
        [sample.trainer for sample in comparable],
        [_format(sample) for sample in comparable],
        on_image,
    )
    if evidence is None:
        return samples
    return [
        sample
        if sample.comparison is None or sample.verdict is Verdict.IDENTICAL
        else replace(sample, verdict=evidence.verdict, evidence=evidence)
        for sample in samples
    ]


def _may_be_resumed(samples: Sequence[CheckedSample]) -> bool:
    """Return True if another history could make the samples identical.

    It cannot if the adapters were saved in half precision.
    """
    first = samples[0].plan
    if saved_dtype(first.recipe):
        return False
    has_history = bool(first.history.rounds or first.history.missing)
    identical = all(sample.verdict is Verdict.IDENTICAL for sample in samples)
    return has_history and not identical and all(one.comparison for one in samples)


def _with_resumed_history(
    run: TrainingRun,
    step: int,
    samples: list[CheckedSample],
    planned: Callable[[int, History], list[PlannedSample]],
    engine: Engine,
) -> list[CheckedSample]:
    """Return the samples with the history of a resume that makes one of them identical, if any."""
    cheapest = min(
        (sample for sample in samples if sample.verdict is not Verdict.IDENTICAL),
        key=lambda sample: sample.plan.recipe.steps * sample.trainer.size,
    )
    for history in resumed_histories(run, step):
        if history.missing:
            break  # all longer histories lack these rounds, too
        plans = planned(step, history)
        plan = next(plan for plan in plans if plan.index == cheapest.plan.index)
        if check_sample(plan, engine).verdict is Verdict.IDENTICAL:
            return [check_sample(plan, engine) for plan in plans]
    return samples


def _changed(recipe: Recipe, changes: Mapping[str, str]) -> Recipe:
    values: dict[str, Any] = dict(changes)
    return replace(recipe, **values)


def _format(sample: CheckedSample) -> str:
    assert sample.plan.trainer_image is not None
    return read_trainer_image(sample.plan.trainer_image)[1]


def worst_verdict(samples: Sequence[CheckedSample]) -> Verdict:
    """Return the worst verdict of `samples`, which must not be empty."""
    order = list(Verdict)
    return max((sample.verdict for sample in samples), key=order.index)


def read_trainer_image(path: Path) -> tuple[Pixels, str]:
    """Return the pixels and Pillow's format name of a trainer's sample.

    The pixels are uint8 RGB [height, width, 3], or [frames, height, width, 3] for a video.

    Raises:
        TrainingRunError: the file cannot be read as an image.
    """
    try:
        return _read_image(path, path.stat().st_mtime_ns)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise TrainingRunError(f"The sample {path.name} cannot be read as an image.") from error


@lru_cache(maxsize=64)
def _read_image(path: Path, _modified_ns: int) -> tuple[Pixels, str]:
    with Image.open(path) as image:
        return decoded_frames(image), image.format or "PNG"
