"""Download of all images of a gallery as one zip. Does not import Gradio."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import parse_qsl, urlencode

from starlette.background import BackgroundTask
from starlette.responses import FileResponse, PlainTextResponse, Response

from fidelora.atomic import make_folder
from fidelora.errors import ImageGoneError, JobNotFoundError
from fidelora.server.access import Caller
from fidelora.server.context import ServerContext
from fidelora.server.outputs import content_of
from fidelora.server.page.paths import IMAGES_ZIP
from fidelora.server.page.pictures import MAX_GALLERY_IMAGES, ImageId, PageFiles
from fidelora.server.verifier import random_id

_INDEX = re.compile("[0-9]{1,3}")


def download_link(images: Sequence[ImageId]) -> str:
    """Return a link to a zip of these images; empty if there are no images."""
    if not images:
        return ""
    query = urlencode([("image", f"{job_id}.{index}") for job_id, index in images])
    count = "the image" if len(images) == 1 else f"all {len(images)} images"
    return f'<a href=".{IMAGES_ZIP}?{query}">Download {count} (zip)</a>'


def images_zip(
    context: ServerContext, page_files: PageFiles, query: str, caller: Caller
) -> Response:
    """Return a zip of the images in a link's query that exist and belong to the caller.

    The images are stored uncompressed, because their formats are compressed already.
    """
    values = dict.fromkeys(value for name, value in parse_qsl(query) if name == "image")
    entries = [value.rpartition(".") for value in values]
    images = [(job_id, int(index)) for job_id, _, index in entries if _INDEX.fullmatch(index)]
    folder = page_files.files / random_id()
    make_folder(folder)
    file = folder / "fidelora-images.zip"
    count = 0
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as packed:
        for job_id, index in images[:MAX_GALLERY_IMAGES]:
            try:
                output = context.job(job_id, caller).outputs[index]
                content = content_of(context.images, output)
            except (JobNotFoundError, ImageGoneError, IndexError):
                continue
            packed.writestr(Path(output.file_path).name, content)
            count += 1
    if not count:
        _remove(file)
        return PlainTextResponse("None of these images is available any more.\n", 404)
    return FileResponse(file, filename=file.name, background=BackgroundTask(_remove, file))


def _remove(file: Path) -> None:
    file.unlink(missing_ok=True)
    file.parent.rmdir()
