"""The files of finished images, and rough pictures of unfinished ones."""

from __future__ import annotations

import base64
import hashlib
import io
from pathlib import Path

from PIL import Image

from fidelora.errors import ImageGoneError
from fidelora.jobs.job import Output


def content_of(output: Output) -> bytes:
    """An image's file, exactly as it was made.

    Raises:
        ImageGoneError: it is not there any more, or was changed.
    """
    try:
        content = Path(output.file_path).read_bytes()
    except OSError as error:
        raise ImageGoneError from error
    if hashlib.sha256(content).hexdigest() != output.sha256:
        raise ImageGoneError
    return content


def base64_of(output: Output) -> str:
    """`content_of` in base64."""
    return base64.b64encode(content_of(output)).decode()


def preview_as(preview: str, image_format: str) -> str:
    """A preview, which is a small JPEG in base64, as a picture of another format, in base64, too."""
    if image_format == "jpeg":
        return preview
    with Image.open(io.BytesIO(base64.b64decode(preview)), formats=("JPEG",)) as image:
        buffer = io.BytesIO()
        image.save(buffer, image_format.upper())
    return base64.b64encode(buffer.getvalue()).decode()
