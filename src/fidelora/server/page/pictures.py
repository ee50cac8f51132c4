"""Finished images as files that the page may show."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from fidelora.atomic import make_folder, write_atomically
from fidelora.errors import ImageGoneError, JobNotFoundError
from fidelora.jobs.job import Job
from fidelora.recipe import Recipe
from fidelora.server.context import ServerContext
from fidelora.server.outputs import content_of
from fidelora.server.page.html import caption
from fidelora.server.page.lora_list import LoraList
from fidelora.server.page.snippets import as_command, as_python, as_request

log = structlog.get_logger(__name__)

MOST_SHOWN = 60
"""Images in a gallery; older ones are still in the server."""
KEEP_S = 24 * 3600.0


@dataclass(frozen=True)
class PageFiles:
    """The page's own folder: what browsers sent, what they are shown, and what is being verified. Emptied at each start."""

    folder: Path

    @property
    def files(self) -> Path:
        """What Gradio may read and send."""
        return self.folder / "files"

    @property
    def checks(self) -> Path:
        """Training jobs that were uploaded, and reports."""
        return self.folder / "checks"

    def empty(self) -> None:
        """Begin with nothing.

        Raises:
            OutputError: it cannot be made.
        """
        shutil.rmtree(self.folder, ignore_errors=True)
        for folder in (self.files, self.checks):
            make_folder(folder)

    def clean(self, keep_s: float = KEEP_S) -> None:
        """Remove what nobody changed for so long."""
        before = time.time() - keep_s
        for entry in (*self.files.iterdir(), *self.checks.iterdir()):
            try:
                if entry.stat().st_mtime >= before:
                    continue
                if entry.is_dir():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
            except FileNotFoundError:  # somebody else was faster
                continue
            except (
                OSError
            ) as error:  # such as an upload into it at this moment; the next time will do
                log.warning("page_file_not_removed", file=str(entry), reason=str(error))


Shown = tuple[str, int]
"""An image that a gallery shows: the request's id, and which of its images."""


@dataclass(frozen=True)
class Pictures:
    """What is shown of requests that have succeeded."""

    context: ServerContext
    page_files: PageFiles
    library: LoraList

    def of(self, job: Job) -> list[Shown]:
        """A job's images, the first one first."""
        return [(job.id, index) for index in range(len(job.outputs))]

    def gallery(self, shown: Sequence[Shown]) -> tuple[list[Shown], list[tuple[str, str]]]:
        """Those of these images that are still there, and each one's file and caption."""
        there, files = [], []
        for job_id, index in shown[:MOST_SHOWN]:
            try:
                job = self.context.store.get(job_id)
                file = self._file(job, index)
            except (JobNotFoundError, ImageGoneError):
                continue
            there.append((job_id, index))
            files.append((str(file), caption(job.recipes[index])))
        return there, files

    def recipe(self, shown: Shown) -> tuple[Recipe, str]:
        """An image's recipe and format.

        Raises:
            JobNotFoundError: its request was removed.
        """
        job = self.context.store.get(shown[0])
        return job.recipes[shown[1]], job.image_format

    def copies(self, recipe: Recipe, image_format: str) -> tuple[str, str, str, str]:
        """The recipe as JSON, and the request, command and Python that make it again."""
        names = [
            self.library.name_of(adapter) or f"{adapter.name}.safetensors"
            for adapter in recipe.adapters
        ]
        return (
            json.dumps(recipe.to_dict(), indent=2, ensure_ascii=False),
            as_request(recipe, names, image_format),
            as_command(recipe, names, image_format),
            as_python(recipe, names, image_format, self.context.base_url),
        )

    def _file(self, job: Job, index: int) -> Path:
        """A copy where Gradio may read it: the folder of images stays closed to it."""
        if index >= len(job.outputs):
            raise ImageGoneError
        output = job.outputs[index]
        file = self.page_files.files / job.id / Path(output.file_path).name
        if not file.is_file():
            content = content_of(output)
            make_folder(file.parent)
            write_atomically(file, content)
        return file
