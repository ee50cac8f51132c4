"""Generated images, and encoding as PNG, JPEG, WebP or MP4 files that contain the recipe."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, PngImagePlugin

from fidelora.atomic import write_atomically
from fidelora.errors import ImageFormatError, OutputError
from fidelora.images.formats import ImageFormat, check_format, format_of, is_image_format
from fidelora.images.mp4 import mp4
from fidelora.images.other_programs import PARAMETERS_KEY
from fidelora.images.parameters import parameters_text
from fidelora.images.read import COMMENT_KEY, RECORD_KEY
from fidelora.recipe import Recipe

JPEG_QUALITY = 95  # by default; differences from the image are hardly visible
VIDEO_QUALITY = 80  # of animated WebP, as in the trainer
MAX_PREVIEW = 128  # longest side of a preview in pixels; keeps it at a few kilobytes
_MAX_JPEG_EXIF_BYTES = 65_533  # a JPEG segment has at most 65,535 bytes, two of them its length


@dataclass(frozen=True, eq=False)
class GeneratedImage:
    """An image or a video, and how it was made.

    Attributes:
        pixels: uint8 RGB [height, width, 3]; the first frame of a video.
        recipe: recipe of the image.
        environment: versions and device, which can affect the last bits.
        warnings: sentences for the user, for example that the end of a prompt was cut off.
        seconds: duration of each stage by name.
        lora_hashes: sha256 of the tensors of each adapter by the sha256 of its file; see
            `AdapterFile.tensors_sha256`.
        video: all frames of a video, uint8 RGB [frames, height, width, 3]; None for a still image.
    """

    pixels: NDArray[np.uint8]
    recipe: Recipe
    environment: Mapping[str, str]
    warnings: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    lora_hashes: Mapping[str, str] = field(default_factory=dict)
    video: NDArray[np.uint8] | None = None

    @classmethod
    def of(
        cls,
        decoded: NDArray[np.uint8],
        recipe: Recipe,
        environment: Mapping[str, str],
        warnings: tuple[str, ...],
        seconds: Mapping[str, float],
        lora_hashes: Mapping[str, str],
    ) -> GeneratedImage:
        """Return a still image or a video, depending on the dimensions of `decoded`.

        Args:
            decoded: uint8 RGB [height, width, 3], or [frames, height, width, 3].
        """
        first, video = (decoded, None) if decoded.ndim == 3 else (decoded[0], decoded)
        return cls(first, recipe, environment, warnings, seconds, lora_hashes, video)

    @property
    def all_pixels(self) -> NDArray[np.uint8]:
        """The pixels of a still image [height, width, 3], or all frames [frames, ...]."""
        return self.pixels if self.video is None else self.video

    @property
    def parameters(self) -> str:
        """Text that other programs read; see `parameters_text`."""
        return parameters_text(self.recipe, self.environment, self.lora_hashes)

    def to_pil(self) -> Image.Image:
        """Return the pixels as a Pillow image."""
        return Image.fromarray(self.pixels)

    def record(self, quality: int | None = None) -> dict[str, Any]:
        """Return the record stored in the file; contains `quality` if that is not the default."""
        plain = self.recipe.to_dict()
        record = {
            "recipe": plain,
            # Without a hash of the base model, the digest depends on the base model's name. The
            # file contains only the short name, so the digest is computed from `plain`.
            "digest": Recipe.from_dict(plain).digest,
            "environment": dict(self.environment),
        }
        return record if quality is None else record | {"quality": quality}

    def encode(self, image_format: ImageFormat = "png", quality: int | None = None) -> bytes:
        """Return the contents of the image file.

        Args:
            image_format: png, jpeg or webp for a still image, webp or mp4 for a video.
            quality: 0..100, for JPEG and WebP only. By default, a still WebP image is lossless, an
                animated one has quality 80 as in the trainer, and JPEG has quality 95.

        Raises:
            ImageFormatError: the format is not supported, does not support this quality, or does
                not support videos.
            OutputError: the recipe is too long for a JPEG (64 KB).
        """
        if not is_image_format(image_format):
            raise ImageFormatError(
                f"{image_format!r} is not a supported image format; use png, jpeg or webp, or mp4 "
                "for a video."
            )
        if quality is not None and (image_format in ("png", "mp4") or not 0 <= quality <= 100):
            raise ImageFormatError(
                f"The quality {quality} is not valid for {image_format}: "
                "only JPEG and WebP have one, from 0 to 100."
            )
        check_format(image_format, self.recipe.frames)
        if self.video is not None:
            if image_format == "mp4":
                record = json.dumps(self.record(), ensure_ascii=False)
                texts = {RECORD_KEY: record, COMMENT_KEY: self.parameters}
                return mp4(list(self.video), self.recipe.fps, texts)
            chosen_quality = VIDEO_QUALITY if quality is None else quality
            return animated_webp(
                self.video, self.recipe.fps, quality=chosen_quality, exif=self._exif(quality)
            )
        image = self.to_pil()
        buffer = io.BytesIO()
        if image_format == "png":
            text = PngImagePlugin.PngInfo()
            text.add_itxt(PARAMETERS_KEY, self.parameters)
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
        """Write the image to `path` atomically, in the format of its suffix.

        Raises:
            OutputError: the suffix is not supported, or the file cannot be written.
        """
        path = Path(path)
        write_atomically(path, self.encode(format_of(path)))
        return path

    def _exif(self, quality: int | None) -> bytes:
        exif = Image.Exif()
        exif[ExifTags.Base.ImageDescription] = json.dumps(self.record(quality), ensure_ascii=True)
        comment = self.parameters.encode("utf-16-be")
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"UNICODE\0" + comment
        return exif.tobytes()


def animated_webp(
    frames: NDArray[np.uint8], fps: int, *, quality: int = VIDEO_QUALITY, exif: bytes = b""
) -> bytes:
    """Return an animated WebP with the options of the trainer, which repeats without end.

    The duration of a frame is 1000 // fps milliseconds, so the speed is not exactly `fps`.

    Args:
        frames: uint8 RGB [frames, height, width, 3].
        fps: frames per second.
        quality: 0..100.
        exif: EXIF data; may be empty.
    """
    first, *others = map(Image.fromarray, frames)
    buffer = io.BytesIO()
    first.save(
        buffer,
        "WEBP",
        append_images=others,
        save_all=True,
        duration=1000 // fps,
        loop=0,
        quality=quality,
        exif=exif,
    )
    return buffer.getvalue()


def preview_jpeg(pixels: NDArray[np.uint8]) -> bytes:
    """Return a preview as a JPEG of at most `MAX_PREVIEW` pixels a side: a few kilobytes.

    Args:
        pixels: uint8 RGB [height, width, 3].
    """
    image = Image.fromarray(pixels)
    image.thumbnail((MAX_PREVIEW, MAX_PREVIEW))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=70)
    return buffer.getvalue()
