"""A finished image, and its file: PNG, JPEG or WebP with the recipe inside."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, PngImagePlugin

from fidelora.atomic import write_atomically
from fidelora.errors import ImageFormatError, OutputError
from fidelora.images.parameters import parameters_text
from fidelora.images.read import PARAMETERS_KEY, RECORD_KEY
from fidelora.recipe import Recipe

ImageFormat = Literal["png", "jpeg", "webp"]
_SUFFIXES: Mapping[str, ImageFormat] = {
    ".png": "png",
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
    ".webp": "webp",
}

JPEG_QUALITY = 95
MAX_PREVIEW = 128
_MAX_JPEG_EXIF_BYTES = 65_533


@dataclass(frozen=True, eq=False)
class GeneratedImage:
    """One image and how it was made.

    Attributes:
        pixels: uint8 RGB [height, width, 3].
        recipe: what defines it.
        environment: what else could have had a part in its last bits: versions and the device.
        warnings: sentences for people, such as the end of a prompt that did not fit.
        seconds: how long each part of the work took, by name.
    """

    pixels: NDArray[np.uint8]
    recipe: Recipe
    environment: Mapping[str, str]
    warnings: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)

    def to_pil(self) -> Image.Image:
        """Return the pixels as a Pillow image."""
        return Image.fromarray(self.pixels)

    def record(self, quality: int | None = None) -> dict[str, Any]:
        """Return the record in the image's file as plain data, with the quality if it is not the
        default.
        """
        record = {
            "recipe": self.recipe.to_dict(),
            "digest": self.recipe.digest,
            "environment": dict(self.environment),
        }
        return record if quality is None else record | {"quality": quality}

    def encode(self, image_format: ImageFormat = "png", quality: int | None = None) -> bytes:
        """Return the file's bytes.

        Args:
            quality: 0..100, of JPEG and WebP. By default WebP keeps every pixel, as PNG always does, and JPEG has quality 95.

        Raises:
            ImageFormatError: there is no such format, or PNG was to have a quality.
            OutputError: the recipe is too long for a JPEG (64 KB).
        """
        if not is_image_format(image_format):
            raise ImageFormatError(
                f"{image_format!r} is no image format that is written here; use png, jpeg or webp."
            )
        if quality is not None and (image_format == "png" or not 0 <= quality <= 100):
            raise ImageFormatError(
                f"The quality {quality} is for no {image_format}: JPEG and WebP have one, from 0 to 100."
            )
        image = self.to_pil()
        buffer = io.BytesIO()
        if image_format == "png":
            text = PngImagePlugin.PngInfo()
            text.add_itxt(PARAMETERS_KEY, parameters_text(self.recipe, self.environment))
            text.add_itxt(RECORD_KEY, json.dumps(self.record(), ensure_ascii=False))
            image.save(buffer, "PNG", pnginfo=text)
            return buffer.getvalue()
        exif = self._exif(quality)
        if image_format == "webp":
            chosen = {"lossless": True} if quality is None else {"quality": quality}
            image.save(buffer, "WEBP", exif=exif, **chosen)
        else:
            if len(exif) > _MAX_JPEG_EXIF_BYTES:
                raise OutputError(
                    "The recipe is too long to be kept in a JPEG (64 KB); choose png or webp."
                )
            image.save(
                buffer, "JPEG", quality=JPEG_QUALITY if quality is None else quality, exif=exif
            )
        return buffer.getvalue()

    def save(self, path: str | Path) -> Path:
        """Write the image to `path`, whole or not at all; its suffix tells the format.

        Raises:
            OutputError: unknown suffix, or it cannot be written.
        """
        path = Path(path)
        write_atomically(path, self.encode(format_of(path)))
        return path

    def _exif(self, quality: int | None) -> bytes:
        exif = Image.Exif()
        exif[ExifTags.Base.ImageDescription] = json.dumps(self.record(quality), ensure_ascii=True)
        comment = parameters_text(self.recipe, self.environment).encode("utf-16-be")
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"UNICODE\0" + comment
        return exif.tobytes()


def format_of(path: Path) -> ImageFormat:
    """Return the image format for a file name.

    Raises:
        ImageFormatError: none that is supported.
    """
    try:
        return _SUFFIXES[path.suffix.lower()]
    except KeyError:
        raise ImageFormatError(
            f"{path.name} ends in no image format that is written here; use .png, .jpg or .webp."
        ) from None


def suffix_of(image_format: ImageFormat) -> str:
    """Return the usual suffix of a file of this format."""
    return ".jpg" if image_format == "jpeg" else f".{image_format}"


def is_image_format(name: str) -> bool:
    """True if images can be written in the format `name`."""
    return name in get_args(ImageFormat)


def preview_jpeg(pixels: NDArray[np.uint8]) -> bytes:
    """Return a small JPEG of a rough picture, at most `MAX_PREVIEW` pixels a side: a few kilobytes."""
    image = Image.fromarray(pixels)
    image.thumbnail((MAX_PREVIEW, MAX_PREVIEW))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=70)
    return buffer.getvalue()
