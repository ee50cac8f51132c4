"""Our image beside the trainer's: how much of it is the same."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from scipy.ndimage import gaussian_filter

from fidelora.errors import JobFolderError


@dataclass(frozen=True)
class Comparison:
    """How two images of one size differ.

    Attributes:
        identical_percent: of pixels: equal in all three channels.
        identical_values_percent: of single channel values; what other tools call identical is sometimes this.
        max_difference: the largest difference of a channel, 0..255 levels.
        mean_difference: over all channels, in levels.
    """

    identical_percent: float
    identical_values_percent: float
    max_difference: int
    mean_difference: float

    @property
    def identical(self) -> bool:
        """Whether every pixel is the same."""
        return self.max_difference == 0

    @property
    def identical_in_words(self) -> str:
        """`identical_percent`, rounded down: 100.00 is said of images that are the same, and of no others."""
        return f"{math.floor(self.identical_percent * 100) / 100:.2f}"

    @property
    def within_rounding(self) -> bool:
        """Whether another processor explains the difference, in float32."""
        return (
            self.max_difference <= ROUNDING_LEVELS
            and self.identical_percent >= ROUNDING_IDENTICAL_PERCENT
        )

    @property
    def in_words(self) -> str:
        """One phrase for people."""
        if self.identical:
            return "identical: every pixel is the same"
        share = f"{self.identical_in_words} % of pixels are the same, the largest difference is {self.max_difference} of 255"
        return ("rounding: " if self.within_rounding else "DIFFERENT: ") + share


ROUNDING_LEVELS = 2
ROUNDING_IDENTICAL_PERCENT = 99.0
"""By how much the same float32 recipe may differ between processors and numbers of threads, which sum in other orders.

Measured: with AVX2 or SSE in place of AVX-512, or one thread in place of two, at least 99.93 % of the pixels stay the same and the
others differ by one level. A wrong setting changes far more pixels (`steps_offset` 0: at least 30 %), if often by few levels.
"""


def compare_with_sample(pixels: NDArray[np.uint8], preview: Path) -> Comparison:
    """Compare our pixels with a preview's file, after the encoding that the file went through.

    Raises:
        JobFolderError: the preview cannot be read, or has another size.
    """
    try:
        with Image.open(preview) as image:
            theirs = np.asarray(image.convert("RGB"))
            image_format = image.format or "PNG"
    except (OSError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise JobFolderError(f"The preview {preview.name} cannot be read as an image.") from error
    if theirs.shape != pixels.shape:
        raise JobFolderError(
            f"The preview {preview.name} is {theirs.shape[1]}x{theirs.shape[0]} where its settings say "
            f"{pixels.shape[1]}x{pixels.shape[0]}."
        )
    return compare(reencoded(pixels, image_format), theirs)


def reencoded(pixels: NDArray[np.uint8], image_format: str) -> NDArray[np.uint8]:
    """The pixels as they are after being written and read again the way the trainer writes: with Pillow's defaults."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format)
    with Image.open(buffer) as image:
        return np.asarray(image.convert("RGB"))


def similarity(ours: NDArray[np.uint8], theirs: NDArray[np.uint8]) -> tuple[float | None, float]:
    """PSNR in dB (None if every pixel is the same) and SSIM (-1..1) of two uint8 RGB images of the same size.

    SSIM as in Wang et al., "Image quality assessment: from error visibility to structural similarity" (2004): a Gaussian window
    with a sigma of 1.5, K1 0.01 and K2 0.03; the mean over all channels.
    """
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    squared = float(((a - b) ** 2).mean())
    psnr = None if squared == 0 else 10 * math.log10(255**2 / squared)

    def blur(values: NDArray[np.float64]) -> NDArray[np.float64]:
        blurred: NDArray[np.float64] = gaussian_filter(values, (1.5, 1.5, 0), truncate=3.5)
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


def compare(ours: NDArray[np.uint8], theirs: NDArray[np.uint8]) -> Comparison:
    """Compare two uint8 RGB images [height, width, 3] of the same size."""
    difference = np.abs(ours.astype(np.int16) - theirs.astype(np.int16))
    return Comparison(
        identical_percent=float((difference == 0).all(axis=-1).mean() * 100),
        identical_values_percent=float((difference == 0).mean() * 100),
        max_difference=int(difference.max()),
        mean_difference=float(difference.mean()),
    )
