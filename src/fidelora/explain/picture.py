"""A user's picture and its distance from other images."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, JpegImagePlugin

from fidelora.errors import ImageRecordError
from fidelora.training.judge import Pixels


@dataclass(frozen=True, eq=False)
class Picture:
    """Pixels of a picture, and how its file was compressed.

    Attributes:
        name: name of the file.
        pixels: uint8 RGB [height, width, 3].
        save_options: options of Pillow that encode an image as a JPEG file was encoded; empty for
            other formats, which are compared without compression.
    """

    name: str
    pixels: Pixels
    save_options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, content: bytes, name: str) -> Picture:
        """Read a picture.

        Raises:
            ImageRecordError: not an image, or an animation.
        """
        try:
            with Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP")) as image:
                if (frames := getattr(image, "n_frames", 1)) > 1:
                    raise ImageRecordError(
                        f"{name} is an animation of {frames} frames, but only still images can be "
                        "compared here. Use fidelora verify, or fidelora replay --compare."
                    )
                options: dict[str, Any] = {}
                if isinstance(image, JpegImagePlugin.JpegImageFile):
                    options = {
                        "format": "JPEG",
                        "qtables": image.quantization,
                        "subsampling": JpegImagePlugin.get_sampling(image),
                    }
                return cls(name, np.asarray(image.convert("RGB")), options)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise ImageRecordError(
                f"{name} is not a PNG, JPEG or WebP image that can be read."
            ) from error

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.pixels.shape[1], self.pixels.shape[0]

    def distance(self, pixels: Pixels) -> float:
        """Return the mean difference from an image in levels, 0..255.

        If the picture is a JPEG, the image is compressed as its file was. An image of another size
        is scaled.
        """
        image = Image.fromarray(pixels)
        if image.size != self.size:
            image = image.resize(self.size, Image.Resampling.LANCZOS)
        if self.save_options:
            buffer = io.BytesIO()
            image.save(buffer, **self.save_options)
            image = Image.open(buffer)
        other = np.asarray(image.convert("RGB"), np.int16)
        return float(np.abs(other - self.pixels).mean())
