"""Folder of files that the page may show, and copies of finished images in this folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from fidelora.atomic import make_folder, remove_folder, write_atomically
from fidelora.errors import ImageGoneError, JobNotFoundError
from fidelora.jobs.job import Job
from fidelora.recipe import Recipe
from fidelora.server.context import ServerContext
from fidelora.server.outputs import content_of
from fidelora.server.page.html import caption
from fidelora.server.page.lora_list import LoraList
from fidelora.server.page.snippets import as_command, as_python, as_request, command_notes
from fidelora.server.page.visitor import visitor

log = structlog.get_logger(__name__)

MAX_GALLERY_IMAGES = 60
"""Largest number of images in a gallery; the server still stores older ones."""
REQUEST_FOLDER = "request-"
"""Prefix of the folder with the images of a request; the rest is the request's id."""
KEEP_S = 24 * 3600.0
"""Seconds to keep unchanged files of the page: one day."""


@dataclass(frozen=True)
class PageFiles:
    """The page's own folder: uploads, images on display and verifications.

    The server empties it at every start.
    """

    folder: Path

    @property
    def files(self) -> Path:
        """Folder that Gradio may read and serve."""
        return self.folder / "files"

    @property
    def verifications(self) -> Path:
        """Folder of uploaded training runs and of reports."""
        return self.folder / "verifications"

    def empty(self) -> None:
        """Remove everything and create the empty folders.

        Raises:
            OutputError: a folder cannot be created.
        """
        if not remove_folder(self.folder):
            log.warning("page files not removed", folder=str(self.folder))
        for folder in (self.files, self.verifications):
            make_folder(folder)

    def clean(self, now: float) -> None:
        """Remove entries that have not changed for `KEEP_S` seconds at the time `now`."""
        before = now - KEEP_S
        for entry in (*self.files.iterdir(), *self.verifications.iterdir()):
            try:
                if entry.stat().st_mtime >= before:
                    continue
                if not entry.is_dir():
                    entry.unlink()
                elif not remove_folder(entry):
                    log.warning("page folder not removed", folder=str(entry))
            except FileNotFoundError:  # removed in the meantime
                continue
            except OSError as error:  # for example during an upload; the next call retries
                log.warning("page file not removed", file=str(entry), reason=str(error))


ImageId = tuple[str, int]
"""An image in a gallery: the id of its job, and its index among the job's images."""


@dataclass(frozen=True)
class Pictures:
    """Images of succeeded jobs, and the texts shown beside them."""

    context: ServerContext
    page_files: PageFiles
    lora_list: LoraList

    def of(self, job: Job) -> list[ImageId]:
        """Return a job's images in order."""
        return [(job.id, index) for index in range(len(job.outputs))]

    def gallery(self, images: Sequence[ImageId]) -> tuple[list[ImageId], list[tuple[str, str]]]:
        """Return the images that still exist, and the file and caption of each."""
        found, files = [], []
        for job_id, index in images[:MAX_GALLERY_IMAGES]:
            try:
                job = self.context.job(job_id, visitor())
                file = self._file(job, index)
            except (JobNotFoundError, ImageGoneError):
                continue
            found.append((job_id, index))
            files.append((str(file), caption(job.recipes[index])))
        return found, files

    def recipe(self, image: ImageId) -> tuple[Recipe, str]:
        """Return an image's recipe and file format.

        Raises:
            JobNotFoundError: its job was removed, or belongs to another API key.
        """
        job = self.context.job(image[0], visitor())
        return job.recipes[image[1]], job.image_format

    def snippets(self, recipe: Recipe, image_format: str) -> dict[str, str]:
        """Return the recipe as JSON, and the request, command and Python code that reproduce it."""
        paths = [
            self.lora_list.path_of(adapter) or f"{adapter.name}.safetensors"
            for adapter in recipe.adapters
        ]
        return {
            "recipe": json.dumps(recipe.to_dict(), indent=2, ensure_ascii=False),
            "request": as_request(recipe, paths, image_format),
            "command": command_notes(recipe, paths) + as_command(recipe, paths, image_format),
            "python": as_python(recipe, paths, image_format, self.context.base_url),
        }

    def _file(self, job: Job, index: int) -> Path:
        """Return a copy of an image that Gradio may read; it cannot read the output folder."""
        if index >= len(job.outputs):
            raise ImageGoneError
        output = job.outputs[index]
        file = self.page_files.files / f"{REQUEST_FOLDER}{job.id}" / Path(output.file_path).name
        if not file.is_file():
            content = content_of(self.context.images, output)
            make_folder(file.parent)
            write_atomically(file, content)
        return file
