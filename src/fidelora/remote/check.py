"""Verification of a server: its pictures of a run's samples, compared with the expected ones."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from PIL import Image

from fidelora.engine.engine import Engine
from fidelora.errors import ImageRecordError, RecipeError
from fidelora.explain.nearest import NearestPicture, check_is_supported, nearest_picture
from fidelora.explain.picture import Picture
from fidelora.explain.simulation import Simulator
from fidelora.remote.programs import RemoteProgram
from fidelora.training.compare import Comparison, compare, decoded_frames, reencode
from fidelora.training.judge import Pixels
from fidelora.training.plan import PlannedSample
from fidelora.training.verify import MAX_ROUNDING_MEAN, read_trainer_image

OnProgress = Callable[[str, int, int], None]
HALF_PRECISION_LEVELS = 1.0
"""Mean difference in levels that the half precision of A1111 and ComfyUI can cause; the default
tolerance for them."""


class RemoteVerdict(StrEnum):
    """Result of one sample; the values are in order, the best one first.

    `identical`: every pixel is the trainer's. `rounding`: float32 on another processor can cause
    the difference. `expected`: the picture is within the tolerance of the one that the program is
    expected to make. `mismatch`: anything else.
    """

    IDENTICAL = "identical"
    ROUNDING = "rounding"
    EXPECTED = "expected"
    MISMATCH = "mismatch"


@dataclass(frozen=True, eq=False)
class RemoteSample:
    """One sample through a server.

    Attributes:
        plan: the sample.
        content: the server's file.
        pixels: its pixels, uint8 RGB [height, width, 3], or [frames, height, width, 3].
        comparison: comparison of the picture with the trainer's sample; None if the sizes differ.
        nearest: the picture that the program is expected to make; None if it is expected to make
            the trainer's sample.
        from_expected: mean difference from the expected picture in levels; None if the sizes
            differ.
    """

    plan: PlannedSample
    content: bytes
    pixels: Pixels
    comparison: Comparison | None
    nearest: NearestPicture | None
    from_expected: float | None
    verdict: RemoteVerdict


def verify_remote(
    program: RemoteProgram,
    plans: Sequence[PlannedSample],
    make_engine: Callable[[], Engine],
    *,
    tolerance: float | None = None,
    on_sample: Callable[[RemoteSample], None] | None = None,
    on_progress: OnProgress | None = None,
) -> list[RemoteSample]:
    """Request samples from a server and compare them.

    Args:
        plans: samples whose files exist.
        make_engine: called once if the expected pictures have to be simulated.
        tolerance: largest accepted mean difference from the expected picture, in levels; None for
            `HALF_PRECISION_LEVELS` if it is simulated, else 0.

    Raises:
        RecipeError: settings of this model family or adapter cannot be sent, or a sample is a
            video and the API is not Fidelora's.
        ImageRecordError: the server's file is not an image.
        FideloraError: the server failed, or a file cannot be used.
    """
    videos = [plan.index for plan in plans if plan.recipe.frames > 1]
    if videos and program.api != "fidelora":
        raise RecipeError(
            f"Sample {videos[0]} is a video. Only Fidelora's own API makes videos that can be "
            "compared; others make still images, or files with other compression. Use "
            "--api fidelora, or fidelora verify without --against.",
            field="frames",
        )
    for plan in plans if program.api != "fidelora" else ():
        if program.target is not None or len(plan.recipe.adapters) > 1:
            check_is_supported(plan)
    engine = make_engine() if program.target is not None else None
    found = []
    for done, plan in enumerate(plans):
        nearest = None
        if program.target is not None and engine is not None:
            if on_progress is not None:
                on_progress(f"measuring {program.target}", done, len(plans))
            nearest = nearest_picture(plan, program.target, Simulator(engine, plan.recipe))
        if on_progress is not None:
            on_progress("waiting for the server", done, len(plans))
        sample = _checked(plan, program.picture(plan.recipe, nearest), nearest, tolerance)
        found.append(sample)
        if on_sample is not None:
            on_sample(sample)
    return found


def _checked(
    plan: PlannedSample, content: bytes, nearest: NearestPicture | None, tolerance: float | None
) -> RemoteSample:
    assert plan.trainer_image is not None
    trainer, image_format = read_trainer_image(plan.trainer_image)
    is_video = plan.recipe.frames > 1
    name = "The server's picture"
    pixels = _frames_of(content, name) if is_video else Picture.read(content, name).pixels
    expected = trainer if nearest is None else nearest.pixels
    if pixels.shape != trainer.shape or expected.shape != pixels.shape:
        return RemoteSample(plan, content, pixels, None, nearest, None, RemoteVerdict.MISMATCH)
    # The server compresses a video as the trainer does; compressing it again would change it.
    comparison = compare(pixels if is_video else reencode(pixels, image_format), trainer)
    from_expected = comparison.mean_difference
    if nearest is not None:
        from_expected = compare(pixels, nearest.pixels).mean_difference
    if tolerance is None:
        tolerance = 0.0 if nearest is None else HALF_PRECISION_LEVELS
    verdict = RemoteVerdict.MISMATCH
    if comparison.identical:
        verdict = RemoteVerdict.IDENTICAL
    elif comparison.within_rounding and comparison.mean_difference <= MAX_ROUNDING_MEAN:
        verdict = RemoteVerdict.ROUNDING
    elif from_expected <= tolerance:
        verdict = RemoteVerdict.EXPECTED
    return RemoteSample(plan, content, pixels, comparison, nearest, from_expected, verdict)


def _frames_of(content: bytes, name: str) -> Pixels:
    """Return the frames of a WebP file, uint8 RGB [frames, height, width, 3].

    Raises:
        ImageRecordError: not a WebP file.
    """
    try:
        with Image.open(io.BytesIO(content), formats=("WEBP",)) as image:
            return decoded_frames(image)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ImageRecordError(f"{name} is not a WebP video that can be read.") from error


def worst(samples: Sequence[RemoteSample]) -> RemoteVerdict:
    """Return the worst verdict of `samples`, which must not be empty."""
    order = list(RemoteVerdict)
    return max((sample.verdict for sample in samples), key=order.index)
