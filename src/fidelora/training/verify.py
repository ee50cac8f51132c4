"""Verification of a training run: replay its samples and classify the differences."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fidelora.engine.engine import Engine
from fidelora.errors import JobFolderError, NothingToCheckError
from fidelora.images.write import GeneratedImage
from fidelora.recipe import AdapterRef, Recipe
from fidelora.training.compare import (
    ROUNDING_MAX_DIFFERENCE,
    ROUNDING_MIN_IDENTICAL_PERCENT,
    Comparison,
    compare,
    reencode,
    similarity,
)
from fidelora.training.plan import PlannedSample, plan_samples
from fidelora.training.rounding import narrowest_dtype, perturbed_copy
from fidelora.training.run_folder import TrainingRun

Pixels = NDArray[np.uint8]
OnSample = Callable[["CheckedSample"], None]


class Verdict(StrEnum):
    """Result of checking a sample, from best to worst; the values are those of the JSON report."""

    IDENTICAL = "identical"
    ROUNDING = "rounding"
    MISMATCH = "mismatch"


@dataclass(frozen=True)
class RoundingBound:
    """Largest difference that rounding explains.

    Attributes:
        identical_percent: smallest share of identical pixels.
        max_difference: largest difference of a channel value, in levels.
        mean_difference: largest mean difference, in levels.
        reason: source of the bound, as a sentence without a period.
    """

    identical_percent: float
    max_difference: int
    mean_difference: float
    reason: str

    def allows(self, comparison: Comparison) -> bool:
        """Return True if the difference is within the bound."""
        return (
            comparison.identical_percent >= self.identical_percent
            and comparison.max_difference <= self.max_difference
            and comparison.mean_difference <= self.mean_difference
        )


HARDWARE_BOUND = RoundingBound(
    ROUNDING_MIN_IDENTICAL_PERCENT,
    ROUNDING_MAX_DIFFERENCE,
    0.05,
    "other processors or numbers of threads add numbers in a different order, which leaves "
    "99.93 % of the pixels identical and changes the others by 1 level",
)
"""Bound for differences between processors; see `compare.ROUNDING_MAX_DIFFERENCE`."""

_PERTURBED_COPIES = 4
_BOUND_FACTOR = 4.0
"""Factor between the measured effect of perturbed weights and the bound.

The trainer's unrounded weights are anywhere within half a unit of those in the file. A few random
perturbations show the magnitude of the effect, not its maximum. Wrong settings exceed the bound by
far: on the golden runs, `steps_offset` 0 changes at least 30 % of the pixels, rounding 0.1 to 7 %.
"""


@dataclass(frozen=True)
class CheckedSample:
    """A replayed sample compared with the trainer's.

    Attributes:
        plan: the sample with its recipe and the trainer's file.
        image: the replayed sample as generated.
        replayed: its pixels after encoding in the trainer's file format, uint8 RGB
            [height, width, 3].
        trainer: the trainer's pixels, uint8 RGB [height, width, 3].
        comparison: None if the sizes differ.
        psnr: in dB; None if every pixel is the same.
        ssim: -1..1.
        bound: the bound that was applied; None if the images are identical or the sizes differ.
        verdict: the result.
    """

    plan: PlannedSample
    image: GeneratedImage
    replayed: Pixels
    trainer: Pixels
    comparison: Comparison | None
    psnr: float | None
    ssim: float
    bound: RoundingBound | None
    verdict: Verdict

    @property
    def summary(self) -> str:
        """The verdict as one phrase."""
        if self.comparison is None:
            return (
                f"mismatch: the sample is {_size(self.trainer)}, "
                f"but its settings give {_size(self.replayed)}"
            )
        if self.verdict is Verdict.IDENTICAL:
            return "identical"
        return (
            f"{self.verdict.value}: {self.comparison.percent_text} % of pixels the same, "
            f"at most {self.comparison.max_difference} of 255 levels"
        )


def steps_to_check(run: TrainingRun, selection: str) -> list[int]:
    """Return the selected steps that can be checked.

    Args:
        selection: a step, `last` or `all`.

    Raises:
        NothingToCheckError: there are no samples, or their checkpoints do not exist.
        JobFolderError: `selection` is invalid.
    """
    checkable = [step for step in run.sampled_steps if step == 0 or step in run.checkpoints]
    if not run.samples:
        raise NothingToCheckError(f"The training run {run.name} has no sample prompts.")
    if not run.images:
        raise NothingToCheckError(
            f"{run.folder} has no samples (samples/*.jpg, .png or .webp), "
            "so there is nothing to compare with."
        )
    if not checkable:
        sampled = ", ".join(map(str, run.sampled_steps))
        raise NothingToCheckError(
            f"The training run {run.name} has samples of steps {sampled}, "
            "but no checkpoint of these steps."
        )
    if selection == "all":
        return checkable
    if selection == "last":
        return checkable[-1:]
    if not selection.isdigit():
        raise JobFolderError(f"{selection!r} is not a step; set a number, last or all.")
    if int(selection) not in checkable:
        available = ", ".join(map(str, checkable))
        raise NothingToCheckError(
            f"Step {selection} cannot be checked; steps with samples and weights: {available}."
        )
    return [int(selection)]


def incomplete_parts(run: TrainingRun) -> list[str]:
    """Return a sentence for each part of the run folder that cannot be checked."""
    sentences = [
        f"Step {step} has samples but no checkpoint."
        for step in run.sampled_steps
        if step != 0 and step not in run.checkpoints
    ]
    sentences += [
        f"Step {step} has a checkpoint but no samples."
        for step in run.checkpoints
        if step not in run.sampled_steps
    ]
    if extra := sorted({index for _, index in run.images if index >= len(run.samples)}):
        sentences.append(
            f"The folder has images of sample {', '.join(map(str, extra))}, "
            f"but the configuration has only {len(run.samples)} samples, counted from 0."
        )
    return sentences


def verify(
    run: TrainingRun,
    engine: Engine,
    steps: Sequence[int],
    *,
    base_model: str | None = None,
    changes: Mapping[str, str] | None = None,
    on_sample: OnSample | None = None,
) -> list[CheckedSample]:
    """Replay and check the samples of the given steps.

    Args:
        base_model: replaces the base model in the configuration.
        changes: recipe fields that replace the run's, such as `dtype` or `noise`.
        on_sample: called with each checked sample.

    Raises:
        NothingToCheckError: these steps have no samples.
        JobFolderError: a sample cannot be read, or a setting is invalid.
        FideloraError: a file cannot be used.
    """
    plans = [
        replace(plan, recipe=replace(plan.recipe, **(changes or {})))  # type: ignore[arg-type]
        for step in steps
        for plan in plan_samples(run, step, base_model=base_model)
        if plan.trainer_image is not None
    ]
    if not plans:
        raise NothingToCheckError(
            f"The training run {run.name} has no samples of its prompts at these steps."
        )
    for plan in plans:  # report an unreadable file before spending time on the others
        assert plan.trainer_image is not None
        read_trainer_image(plan.trainer_image)
    checked = []
    for plan in plans:
        checked.append(check_sample(plan, engine))
        if on_sample is not None:
            on_sample(checked[-1])
    return checked


def check_sample(plan: PlannedSample, engine: Engine) -> CheckedSample:
    """Replay one sample and compare it with the trainer's.

    Raises:
        JobFolderError: the trainer's sample cannot be read.
        FideloraError: a file cannot be used.
    """
    assert plan.trainer_image is not None
    trainer, image_format = read_trainer_image(plan.trainer_image)
    image = engine.generate(plan.recipe)
    replayed = reencode(image.pixels, image_format)
    if replayed.shape != trainer.shape:
        return CheckedSample(plan, image, replayed, trainer, None, 0.0, 0.0, None, Verdict.MISMATCH)
    comparison = compare(replayed, trainer)
    psnr, ssim = similarity(replayed, trainer)
    if comparison.identical:
        return CheckedSample(
            plan, image, replayed, trainer, comparison, psnr, ssim, None, Verdict.IDENTICAL
        )
    bound = _initial_bound(plan.recipe)
    if not bound.allows(comparison) and plan.recipe.adapters:
        for bound in measure_rounding_bounds(plan.recipe, engine, replayed, image_format):
            if bound.allows(comparison):
                break
    verdict = Verdict.ROUNDING if bound.allows(comparison) else Verdict.MISMATCH
    return CheckedSample(plan, image, replayed, trainer, comparison, psnr, ssim, bound, verdict)


def _initial_bound(recipe: Recipe) -> RoundingBound:
    """Return the hardware bound, with every reason that applies; this needs no extra images."""
    dtype = next((narrowest_dtype(ref.path) for ref in recipe.adapters if ref.path), "F32")
    if dtype == "F32":
        return HARDWARE_BOUND
    return replace(
        HARDWARE_BOUND,
        reason=f"the adapter was saved as {dtype}, but the trainer sampled before rounding; "
        f"or {HARDWARE_BOUND.reason}",
    )


def measure_rounding_bounds(
    recipe: Recipe, engine: Engine, replayed: Pixels, image_format: str
) -> Iterator[RoundingBound]:
    """Measure the effect of the saved adapter's rounding on an image; yield growing bounds.

    For each bound, the image is generated again with a copy of the adapter whose weights are
    perturbed within the rounding of their dtype. The bound is the largest difference so far times
    `_BOUND_FACTOR`. No bounds are yielded for an adapter that was saved in float32.

    Args:
        replayed: the image with the saved adapter after reencoding, uint8 RGB [height, width, 3].
        image_format: Pillow's name of the trainer's file format.
    """
    (adapter,) = recipe.adapters
    if adapter.path is None or (dtype := narrowest_dtype(adapter.path)) == "F32":
        return
    changed = largest = mean = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(_PERTURBED_COPIES):
            copy = AdapterRef.from_file(perturbed_copy(adapter.path, Path(folder), seed))
            perturbed = replace(adapter, sha256=copy.sha256, path=copy.path)
            pixels = engine.generate(replace(recipe, adapters=(perturbed,))).pixels
            effect = compare(reencode(pixels, image_format), replayed)
            changed = max(changed, 100 - effect.identical_percent)
            largest, mean = max(largest, effect.max_difference), max(mean, effect.mean_difference)
            yield RoundingBound(
                100 - min(100.0, _BOUND_FACTOR * changed + 100 - ROUNDING_MIN_IDENTICAL_PERCENT),
                math.ceil(_BOUND_FACTOR * largest) + ROUNDING_MAX_DIFFERENCE,
                _BOUND_FACTOR * mean + HARDWARE_BOUND.mean_difference,
                f"the adapter was saved as {dtype}; perturbing its weights within this precision "
                f"changed up to {changed:.2f} % of the pixels by up to {largest:g} levels, "
                f"{mean:.4f} on average, and {_BOUND_FACTOR:g} times this difference is allowed",
            )


def worst_verdict(samples: Sequence[CheckedSample]) -> Verdict:
    """Return the worst verdict of at least one sample."""
    order = list(Verdict)
    return max((sample.verdict for sample in samples), key=order.index)


def read_trainer_image(path: Path) -> tuple[Pixels, str]:
    """Return the pixels [height, width, 3] and Pillow's format name of a trainer's sample.

    Raises:
        JobFolderError: the file cannot be read as an image.
    """
    try:
        return _read_image(path, path.stat().st_mtime_ns)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise JobFolderError(f"The sample {path.name} cannot be read as an image.") from error


@lru_cache(maxsize=64)
def _read_image(path: Path, _modified_ns: int) -> tuple[Pixels, str]:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")), image.format or "PNG"


def _size(pixels: Pixels) -> str:
    return f"{pixels.shape[1]}x{pixels.shape[0]}"
