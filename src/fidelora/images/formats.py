"""File formats of images and videos. Does not import numpy or Pillow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

from fidelora.errors import ImageFormatError

ImageFormat = Literal["png", "jpeg", "webp", "mp4"]
"""Format of a file. PNG and JPEG are for still images, MP4 is for videos, and WebP for both."""
_SUFFIXES: Mapping[str, ImageFormat] = {
    ".png": "png",
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
    ".webp": "webp",
    ".mp4": "mp4",
}


def format_of(path: Path) -> ImageFormat:
    """Return the image format of a file name's suffix.

    Raises:
        ImageFormatError: the suffix is not supported.
    """
    try:
        return _SUFFIXES[path.suffix.lower()]
    except KeyError:
        raise ImageFormatError(
            f"The suffix of {path.name} is not supported for images; use .png, .jpg or .webp, or "
            ".mp4 for videos."
        ) from None


def suffix_of(image_format: ImageFormat) -> str:
    """Return the usual suffix of files in this format."""
    return ".jpg" if image_format == "jpeg" else f".{image_format}"


def is_image_format(name: str) -> bool:
    """True if `name` is a supported image format."""
    return name in get_args(ImageFormat)


def check_format(image_format: str, frames: int) -> None:
    """Check that files of a format can contain a still image (1 frame) or a video.

    Raises:
        ImageFormatError: they cannot.
    """
    if frames > 1 and image_format in ("png", "jpeg"):
        raise ImageFormatError(
            f"A video of {frames} frames cannot be a {image_format} file; use webp or mp4, or make "
            "one frame."
        )
    if frames == 1 and image_format == "mp4":
        raise ImageFormatError(
            "A still image cannot be an mp4 file; use png, jpeg or webp, or make more frames "
            "with a video model."
        )


def media_type(image_format: str) -> str:
    """Return the media type of files in this format, such as `image/png`."""
    return "video/mp4" if image_format == "mp4" else f"image/{image_format}"
