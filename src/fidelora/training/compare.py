"""Pixel comparison of a replayed sample with the trainer's sample."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageSequence, UnidentifiedImageError
from scipy.ndimage import gaussian_filter

from fidelora.errors import TrainingRunError
from fidelora.images.write import animated_webp

ROUNDING_MAX_DIFFERENCE = 2
ROUNDING_MIN_IDENTICAL_PERCENT = 99.0
"""Limits of a difference that rounding can cause: largest difference (levels of 0..255) and
smallest share of identical pixels.

They apply to the same float32 recipe with different processors or numbers of threads, which change
the order of sums. Measured: with AVX2 or SSE instead of AVX-512, or one thread instead of two, at
least 99.93 % of the pixels are identical and the others differ by one level. A wrong setting
changes far more pixels (`steps_offset` 0: at least 30 %), though often by few levels.
"""


@dataclass(frozen=True)
class Comparison:
    """Differences between two images of the same size.

    Attributes:
        identical_percent: share of pixels that are equal in all three channels.
        identical_values_percent: share of channel values that are equal; some tools call this
            "identical".
        max_difference: largest difference of a channel value, 0..255.
        mean_difference: mean difference of all channel values, 0..255.
    """

    identical_percent: float
    identical_values_percent: float
    max_difference: int
    mean_difference: float

    @property
    def identical(self) -> bool:
        """True if every pixel is the same."""
        return self.max_difference == 0

    @property
    def percent_text(self) -> str:
        """`identical_percent` rounded down, so that only identical images give 100.00."""
        return f"{math.floor(self.identical_percent * 100) / 100:.2f}"

    @property
    def within_rounding(self) -> bool:
        """True if, in float32, a different processor can cause the difference."""
        return (
            self.max_difference <= ROUNDING_MAX_DIFFERENCE
            and self.identical_percent >= ROUNDING_MIN_IDENTICAL_PERCENT
        )

    @property
    def summary(self) -> str:
        """The result as one phrase."""
        if self.identical:
            return "identical: every pixel is the same"
        verdict = "rounding" if self.within_rounding else "DIFFERENT"
        return (
            f"{verdict}: {self.percent_text} % of pixels are the same, "
            f"the largest difference is {self.max_difference} of 255"
        )


def compare_with_sample(pixels: NDArray[np.uint8], sample: Path, fps: int = 16) -> Comparison:
    """Compare pixels with the trainer's sample, after encoding them in the sample's file format.

    Args:
        pixels: uint8 RGB [height, width, 3], or [frames, height, width, 3] for a video.
        sample: the trainer's image file.
        fps: frames per second of a video.

    Raises:
        TrainingRunError: the sample cannot be read or has a different size.
    """
    try:
        with Image.open(sample) as image:
            trainer_pixels = decoded_frames(image)
            image_format = image.format or "PNG"
    except (OSError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise TrainingRunError(f"The sample {sample.name} cannot be read as an image.") from error
    if trainer_pixels.shape != pixels.shape:
        raise TrainingRunError(
            f"The sample {sample.name} is {size_text(trainer_pixels)}, "
            f"but its settings give {size_text(pixels)}."
        )
    return compare(reencode(pixels, image_format, fps), trainer_pixels)


def size_text(pixels: NDArray[np.uint8]) -> str:
    """Return width x height of an image or video, and the number of frames of a video."""
    size = f"{pixels.shape[-2]}x{pixels.shape[-3]}"
    return size if pixels.ndim == 3 else f"{size} with {len(pixels)} frames"


def reencode(pixels: NDArray[np.uint8], image_format: str, fps: int = 16) -> NDArray[np.uint8]:
    """Encode pixels as the trainer does, and return the decoded result.

    Still images are encoded with Pillow's defaults, and videos always as animated WebP.

    Args:
        pixels: uint8 RGB [height, width, 3], or [frames, height, width, 3] for a video.
        image_format: Pillow's name of the format; without effect on videos.
        fps: frames per second of a video.
    """
    buffer = io.BytesIO()
    if pixels.ndim == 4:
        buffer.write(animated_webp(pixels, fps))
    else:
        Image.fromarray(pixels).save(buffer, image_format)
    with Image.open(buffer) as image:
        return decoded_frames(image)


def decoded_frames(image: Image.Image) -> NDArray[np.uint8]:
    """Return an image as uint8 RGB [height, width, 3], or an animation as [frames, ...]."""
    if getattr(image, "n_frames", 1) == 1:
        return np.asarray(image.convert("RGB"))
    return np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)])


def similarity(
    image: NDArray[np.uint8], reference: NDArray[np.uint8]
) -> tuple[float | None, float]:
    """Return PSNR in dB (None for identical images) and SSIM (-1..1) of two images.

    SSIM follows Wang et al., "Image quality assessment: from error visibility to structural
    similarity" (2004): a Gaussian window with sigma 1.5, K1 0.01 and K2 0.03, averaged over all
    channels.

    Args:
        image: uint8 RGB [height, width, 3], or [frames, height, width, 3] for a video.
        reference: as `image`, same size.
    """
    sigma = (0.0,) * (image.ndim - 3) + (1.5, 1.5, 0.0)  # none between the frames of a video
    a, b = image.astype(np.float64), reference.astype(np.float64)
    squared = float(((a - b) ** 2).mean())
    psnr = None if squared == 0 else 10 * math.log10(255**2 / squared)

    def blur(values: NDArray[np.float64]) -> NDArray[np.float64]:
        blurred: NDArray[np.float64] = gaussian_filter(values, sigma, truncate=3.5)
        return blurred

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, covariance = (
        blur(a * a) - mean_a**2,
        blur(b * b) - mean_b**2,
        blur(a * b) - mean_a * mean_b,
    )
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    ratio = (
        (2 * mean_a * mean_b + c1)
        * (2 * covariance + c2)
        / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    )
    return psnr, float(ratio.mean())


def compare(image: NDArray[np.uint8], reference: NDArray[np.uint8]) -> Comparison:
    """Compare two uint8 RGB images [..., height, width, 3] of the same size."""
    difference = np.abs(image.astype(np.int16) - reference.astype(np.int16))
    return Comparison(
        identical_percent=float((difference == 0).all(axis=-1).mean() * 100),
        identical_values_percent=float((difference == 0).mean() * 100),
        max_difference=int(difference.max()),
        mean_difference=float(difference.mean()),
    )
