"""A job's previews, made again and judged: the same, different by rounding, or different."""

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
    ROUNDING_IDENTICAL_PERCENT,
    ROUNDING_LEVELS,
    Comparison,
    compare,
    reencoded,
    similarity,
)
from fidelora.training.plan import PlannedSample, plan_samples
from fidelora.training.rounding import narrowest_dtype, perturbed_copy
from fidelora.training.run_folder import TrainingRun

Pixels = NDArray[np.uint8]
OnSample = Callable[["CheckedSample"], None]


class Verdict(StrEnum):
    """What a comparison means; the values are those of the JSON report."""

    IDENTICAL = "identical"
    ROUNDING = "rounding"
    MISMATCH = "mismatch"


@dataclass(frozen=True)
class Bound:
    """How far a preview may be from ours for a reason that nobody can mend.

    Attributes:
        identical_percent: of pixels, at least.
        max_difference: in levels, at most.
        mean_difference: in levels, at most.
        reason: how the bound came about, in a sentence.
    """

    identical_percent: float
    max_difference: int
    mean_difference: float
    reason: str

    def allows(self, comparison: Comparison) -> bool:
        """Whether the difference is within the bound."""
        return (
            comparison.identical_percent >= self.identical_percent
            and comparison.max_difference <= self.max_difference
            and comparison.mean_difference <= self.mean_difference
        )


MACHINE = Bound(
    ROUNDING_IDENTICAL_PERCENT,
    ROUNDING_LEVELS,
    0.05,
    "another processor or number of threads sums in another order: 99.93 % of the pixels stay the same, the others are 1 level off",
)
"""See `compare.ROUNDING_LEVELS`."""

_DRAWS = 4
_MARGIN = 4.0
"""How many times the measured effect of rounding is still called rounding.

The trainer's own weights lie anywhere within half a unit of those in the file. A few draws from there show the size of the effect,
not its largest. A wrong setting is far outside: on the golden jobs `steps_offset` 0 changes at least 30 % of the pixels, where
rounding changes 0.1 to 7 %.
"""


@dataclass(frozen=True)
class CheckedSample:
    """One preview beside ours.

    Attributes:
        plan: the sample, its recipe and its preview's file.
        ours, theirs: uint8 RGB [height, width, 3], ours after the preview's encoding; None if the preview has another size.
        comparison: None if the preview has another size.
        psnr: in dB; None if every pixel is the same. ssim: -1..1.
        bound: what was expected, if the images are not the same.
    """

    plan: PlannedSample
    image: GeneratedImage
    ours: Pixels
    theirs: Pixels
    comparison: Comparison | None
    psnr: float | None
    ssim: float
    bound: Bound | None
    verdict: Verdict

    @property
    def in_words(self) -> str:
        """One phrase for people."""
        if self.comparison is None:
            return f"mismatch: the preview is {_size(self.theirs)}, its settings say {_size(self.ours)}"
        if self.verdict is Verdict.IDENTICAL:
            return "identical"
        share = f"{self.comparison.identical_in_words} % of pixels the same, at most {self.comparison.max_difference} of 255 levels"
        return f"{self.verdict.value}: {share}"


def steps_to_check(job: TrainingRun, wanted: str) -> list[int]:
    """The steps that `wanted` (a number, `last` or `all`) means and that can be checked.

    Raises:
        NothingToCheckError: there are no previews, or none whose weights are there.
        JobFolderError: `wanted` is none of these.
    """
    checkable = [step for step in job.sampled_steps if step == 0 or step in job.checkpoints]
    if not job.samples:
        raise NothingToCheckError(
            f"The job {job.name} has no sample prompts, so it painted no previews."
        )
    if not job.images:
        raise NothingToCheckError(
            f"{job.folder} has no previews (samples/*.jpg, .png or .webp): there is nothing to compare with."
        )
    if not checkable:
        sampled = ", ".join(map(str, job.sampled_steps))
        raise NothingToCheckError(
            f"The job {job.name} has previews of steps {sampled}, and the weights of none of them."
        )
    if wanted == "all":
        return checkable
    if wanted == "last":
        return checkable[-1:]
    if not wanted.isdigit():
        raise JobFolderError(f"{wanted!r} is no step; give a number, last or all.")
    if int(wanted) not in checkable:
        there_are = ", ".join(map(str, checkable))
        raise NothingToCheckError(
            f"Step {wanted} cannot be checked; those with previews and weights are: {there_are}."
        )
    return [int(wanted)]


def unchecked(job: TrainingRun) -> list[str]:
    """A sentence for each thing in the folder that cannot be checked."""
    said = [
        f"Previews of step {step} are there, and its weights are not."
        for step in job.sampled_steps
        if step != 0 and step not in job.checkpoints
    ]
    said += [
        f"The weights of step {step} are there, and no previews."
        for step in job.checkpoints
        if step not in job.sampled_steps
    ]
    if more := sorted({index for _, index in job.images if index >= len(job.samples)}):
        said.append(
            f"Previews of sample {', '.join(map(str, more))} are there, and the configuration has {len(job.samples)} samples."
        )
    return said


def verify(
    job: TrainingRun,
    engine: Engine,
    steps: Sequence[int],
    *,
    base_model: str | None = None,
    changes: Mapping[str, str] | None = None,
    on_sample: OnSample | None = None,
) -> list[CheckedSample]:
    """Make the previews of these steps again, and judge each.

    Args:
        base_model: in place of the one that the job names.
        changes: recipe fields in place of the job's, such as `dtype` or `noise`.
        on_sample: called with each sample as soon as it is judged.

    Raises:
        JobFolderError: a preview cannot be read, or a setting makes no sense.
        FideloraError: a file cannot be used.
    """
    plans = [
        replace(plan, recipe=replace(plan.recipe, **(changes or {})))  # type: ignore[arg-type]
        for step in steps
        for plan in plan_samples(job, step, base_model=base_model)
        if plan.preview is not None
    ]
    if not plans:
        raise NothingToCheckError(
            f"The job {job.name} has no previews of its sample prompts at these steps."
        )
    for plan in plans:  # a file that cannot be read should not cost the images before it
        assert plan.preview is not None
        read_preview(plan.preview)
    checked = []
    for plan in plans:
        checked.append(check(plan, engine))
        if on_sample is not None:
            on_sample(checked[-1])
    return checked


def check(plan: PlannedSample, engine: Engine) -> CheckedSample:
    """Make one preview again, and judge it."""
    assert plan.preview is not None
    theirs, image_format = read_preview(plan.preview)
    image = engine.generate(plan.recipe)
    ours = reencoded(image.pixels, image_format)
    if ours.shape != theirs.shape:
        return CheckedSample(plan, image, ours, theirs, None, 0.0, 0.0, None, Verdict.MISMATCH)
    comparison = compare(ours, theirs)
    psnr, ssim = similarity(ours, theirs)
    if comparison.identical:
        return CheckedSample(
            plan, image, ours, theirs, comparison, psnr, ssim, None, Verdict.IDENTICAL
        )
    bound = _cheap_bound(plan.recipe)
    if not bound.allows(comparison) and plan.recipe.adapters:
        for bound in rounding_bounds(plan.recipe, engine, ours, image_format):
            if bound.allows(comparison):
                break
    verdict = Verdict.ROUNDING if bound.allows(comparison) else Verdict.MISMATCH
    return CheckedSample(plan, image, ours, theirs, comparison, psnr, ssim, bound, verdict)


def _cheap_bound(recipe: Recipe) -> Bound:
    """The bound that costs no image: narrow enough for every reason."""
    dtype = next((narrowest_dtype(ref.path) for ref in recipe.adapters if ref.path), "F32")
    if dtype == "F32":
        return MACHINE
    return replace(
        MACHINE,
        reason=f"the adapter was saved as {dtype}, and the trainer sampled before it rounded; or {MACHINE.reason}",
    )


def rounding_bounds(
    recipe: Recipe, engine: Engine, ours: Pixels, image_format: str
) -> Iterator[Bound]:
    """How much the rounding of the saved adapter can show in this image, better known with each bound; none if it was not rounded.

    Measured, not guessed: the weights are moved at random within the rounding of their dtype, the image is made again, and the
    difference to ours, the largest so far, times a margin is the bound.
    """
    (adapter,) = recipe.adapters
    if adapter.path is None or (dtype := narrowest_dtype(adapter.path)) == "F32":
        return
    changed = largest = mean = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for draw in range(_DRAWS):
            copy = AdapterRef.from_file(perturbed_copy(adapter.path, Path(folder), draw))
            moved = replace(adapter, sha256=copy.sha256, path=copy.path)
            pixels = engine.generate(replace(recipe, adapters=(moved,))).pixels
            effect = compare(reencoded(pixels, image_format), ours)
            changed = max(changed, 100 - effect.identical_percent)
            largest, mean = max(largest, effect.max_difference), max(mean, effect.mean_difference)
            yield Bound(
                100 - min(100.0, _MARGIN * changed + 100 - ROUNDING_IDENTICAL_PERCENT),
                math.ceil(_MARGIN * largest) + ROUNDING_LEVELS,
                _MARGIN * mean + MACHINE.mean_difference,
                f"the adapter was saved as {dtype}: moving its weights within that rounding changed up to {changed:.2f} % of the "
                f"pixels by up to {largest:g} levels, {mean:.4f} on average; {_MARGIN:g} times as much is allowed",
            )


def overall(samples: Sequence[CheckedSample]) -> Verdict:
    """The worst verdict."""
    order = list(Verdict)
    return max((sample.verdict for sample in samples), key=order.index)


def read_preview(path: Path) -> tuple[Pixels, str]:
    """A preview's pixels, and the format of its file.

    Raises:
        JobFolderError: it is no image that can be read.
    """
    try:
        return _read_preview(path, path.stat().st_mtime_ns)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise JobFolderError(f"The preview {path.name} cannot be read as an image.") from error


@lru_cache(maxsize=64)
def _read_preview(path: Path, _changed_ns: int) -> tuple[Pixels, str]:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")), image.format or "PNG"


def _size(pixels: Pixels) -> str:
    return f"{pixels.shape[1]}x{pixels.shape[0]}"
