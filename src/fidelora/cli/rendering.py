"""Messages of `fidelora generate`, its dry run, and the loop that makes and writes images."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from fidelora.cli.console import INTERRUPTED, fail, progress_bar, warn
from fidelora.errors import FideloraError
from fidelora.families import get_family
from fidelora.recipe import Recipe, may_share_batch
from fidelora.texts import printable

if TYPE_CHECKING:
    from fidelora.cli.engines import ImageMaker
    from fidelora.images.write import GeneratedImage
    from fidelora.resident.client import OnSteps


@dataclass(frozen=True)
class PlannedImage:
    """An image to make.

    Attributes:
        recipe: its recipe.
        path: the file to write.
    """

    recipe: Recipe
    path: Path


@dataclass
class Report:
    """Output of the command: paths or a JSON object on stdout, messages on stderr.

    Attributes:
        quiet: True leaves out paths, notes and the progress bar.
        as_json: True prints one JSON object instead of paths.
        notes, warnings: the messages so far.
    """

    quiet: bool = False
    as_json: bool = False
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Print a note, such as a value that the command chose."""
        self.notes.append(text)
        if not self.quiet:
            typer.echo(printable(text), err=True)

    def warn(self, text: str) -> None:
        """Print a warning, each only once."""
        if text not in self.warnings:
            self.warnings.append(text)
            warn(text)

    def add(self, notes: Sequence[str], warnings: Sequence[str]) -> None:
        """Print notes and warnings."""
        for text in notes:
            self.note(text)
        for text in warnings:
            self.warn(text)

    def print_path(self, path: Path) -> None:
        """Print the path of a written image."""
        if not self.quiet and not self.as_json:
            typer.echo(path)

    def progress_bar(self, title: str) -> AbstractContextManager[OnSteps | None]:
        """Show a progress bar for the steps of images, if stderr is a terminal."""
        return nullcontext() if self.quiet else progress_bar(title)

    def print_json(self, images: Sequence[dict[str, Any]], **more: object) -> None:
        """Print the JSON object, if it was requested."""
        if self.as_json:
            document = {
                "images": list(images),
                "notes": self.notes,
                "warnings": self.warnings,
                **more,
            }
            typer.echo(json.dumps(document, indent=2, ensure_ascii=False))


def render(images: Sequence[PlannedImage], engine: ImageMaker, report: Report) -> None:
    """Make and write the images, and print their paths or the JSON object.

    After Ctrl-C, the images that are finished are written, and the process exits.

    Raises:
        FideloraError: an image could not be made or written.
    """
    renderer = _Renderer(engine, report)
    try:
        renderer.render(images)
    except KeyboardInterrupt:
        renderer.finish()
        report.print_json(renderer.entries(), interrupted=True)
        fail(f"Interrupted; {renderer.started} of {len(images)} images were written.", INTERRUPTED)
    except FideloraError:
        with suppress(FideloraError):  # the first error is reported
            renderer.finish()
        report.print_json(renderer.entries(), interrupted=True)
        raise
    report.print_json(renderer.entries(), interrupted=False)


class _Renderer:
    """Makes images and writes their files; usable once.

    A thread encodes and writes images while the next ones are made.
    """

    def __init__(self, engine: ImageMaker, report: Report) -> None:
        self._engine = engine
        self._report = report
        self._writes: list[Future[Path]] = []
        self._entries: list[dict[str, Any]] = []
        self._printed = 0

    @property
    def started(self) -> int:
        """Number of images that are written or being written."""
        return len(self._writes)

    def render(self, images: Sequence[PlannedImage]) -> None:
        """Make the images, and print the path of each as soon as its file is complete.

        Raises:
            FideloraError: an image could not be made or written.
            KeyboardInterrupt: the user interrupted; `finish` prints the rest.
        """
        # The end of the block waits for the thread.
        with ThreadPoolExecutor(max_workers=1) as writer:
            done = 0
            for batch in self._batches(images):
                title = _title(done, len(batch), len(images), batch[0].recipe.seed)
                with self._report.progress_bar(title) as on_step:
                    made = self._engine.generate_batch([one.recipe for one in batch], on_step)
                for image in made:
                    for warning in image.warnings:
                        self._report.warn(warning)
                self.finish()
                for image, one in zip(made, batch, strict=True):
                    self._writes.append(writer.submit(image.save, one.path))
                    self._entries.append(_finished_entry(image, one.path))
                done += len(batch)
            self.finish()

    def finish(self) -> None:
        """Print the paths of all started images that are not printed yet; raise their errors."""
        for write in self._writes[self._printed :]:
            self._report.print_path(write.result())
            self._printed += 1

    def entries(self) -> list[dict[str, Any]]:
        """Return the entries of the written images in the JSON object."""
        return self._entries[: self._printed]

    def _batches(self, images: Sequence[PlannedImage]) -> Iterator[list[PlannedImage]]:
        """Yield consecutive images that are made together; one at a time in `exact`."""
        batch: list[PlannedImage] = []
        for image in images:
            if batch and not (
                len(batch) < self._engine.max_batch(image.recipe)
                and may_share_batch(batch[0].recipe, image.recipe)
            ):
                yield batch
                batch = []
            batch.append(image)
        if batch:
            yield batch


def image_entry(recipe: Recipe, path: Path) -> dict[str, Any]:
    """Return the fields of an image in the JSON object that are known before it is made."""
    return {
        "path": str(path),
        "prompt": recipe.prompt,
        "seed": recipe.seed,
        "width": recipe.width,
        "height": recipe.height,
        **({"frames": recipe.frames, "fps": recipe.fps} if recipe.frames > 1 else {}),
        "loras": [
            {"name": ref.name, "multiplier": ref.multiplier, "sha256": ref.sha256}
            for ref in recipe.adapters
        ],
        "recipe": recipe.to_dict(),
    }


def _finished_entry(image: GeneratedImage, path: Path) -> dict[str, Any]:
    return image_entry(image.recipe, path) | {
        "digest": image.recipe.digest,
        "environment": dict(image.environment),
        "seconds": {name: round(seconds, 4) for name, seconds in image.seconds.items()},
        "warnings": list(image.warnings),
    }


def check_base(recipe: Recipe, report: Report) -> None:
    """Check the files of the base model as far as this is possible without a download."""
    from fidelora.engine.model import ModelKey
    from fidelora.weights.locate import is_downloaded, is_portable, locate

    family = get_family(recipe.model)
    names = {recipe.base_model: family.parts}
    if recipe.vae:
        names[recipe.vae] = (family.part("decoder"),)
    for name, parts in names.items():
        if not is_portable(name):  # a path, which must exist
            locate(name, parts, what="VAE" if name == recipe.vae else "base model")
    missing = [
        name
        for name, parts in names.items()
        if not is_downloaded(name, parts, variant=recipe.variant)
    ]
    for name in missing:
        report.note(f"{name} is not on this machine; it would be downloaded from the hub.")
    if not missing:
        ModelKey.of(recipe).find_files()


def print_plan(images: Sequence[PlannedImage], report: Report) -> None:
    """Print the images of a dry run."""
    for image in images:
        recipe = image.recipe
        loras = ", ".join(f"{ref.name}:{ref.multiplier:g}" for ref in recipe.adapters)
        report.print_path(image.path)
        if not report.quiet and not report.as_json:
            typer.echo(
                f"  {recipe.width}x{recipe.height}{_frames(recipe)}, {recipe.steps} steps, "
                f"{recipe.sampler}, guidance {recipe.guidance_scale:g}, seed {recipe.seed}, "
                f"{recipe.dtype}, {recipe.fidelity}"
            )
            typer.echo(f"  prompt: {printable(recipe.prompt)}")
            if loras:
                typer.echo(f"  LoRAs: {printable(loras)}")
    report.print_json([image_entry(one.recipe, one.path) for one in images], dry_run=True)


def _frames(recipe: Recipe) -> str:
    if recipe.frames == 1:
        return ""
    return f", {recipe.frames} frames at {recipe.fps} per second"


def _title(first: int, count: int, number: int, seed: int) -> str:
    images = f"image {first + 1}" if count == 1 else f"images {first + 1} to {first + count}"
    return f"{images} of {number}, seed {seed}"
