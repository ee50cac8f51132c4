"""Files of finished images, and previews of images in progress."""

from __future__ import annotations

import base64
import hashlib
import io

from PIL import Image

from fidelora.errors import ImageGoneError
from fidelora.jobs.job import Output
from fidelora.storage.images import ImageStore


def content_of(images: ImageStore, output: Output) -> bytes:
    """Return the content of an image's file.

    Raises:
        ImageGoneError: the file was removed or changed.
        StorageError: the object store cannot be used.
    """
    content = images.read(output.file_path)
    if content is None or hashlib.sha256(content).hexdigest() != output.sha256:
        raise ImageGoneError
    return content


def base64_of(images: ImageStore, output: Output) -> str:
    """Return the content of an image's file in base64; raise the errors of `content_of`."""
    return base64.b64encode(content_of(images, output)).decode()


def convert_preview(preview: str, image_format: str) -> str:
    """Convert a preview, a small JPEG in base64, to another format, also in base64."""
    if image_format == "jpeg":
        return preview
    with Image.open(io.BytesIO(base64.b64decode(preview)), formats=("JPEG",)) as image:
        buffer = io.BytesIO()
        image.save(buffer, image_format.upper())
    return base64.b64encode(buffer.getvalue()).decode()
