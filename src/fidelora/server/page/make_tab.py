"""The *Make* tab: sends the form as a job, follows the job and shows its images."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.concurrency import run_in_threadpool

from fidelora.errors import FideloraError, ImageRecordError, JobNotFoundError, WrongUseError
from fidelora.images.read import read_origin
from fidelora.jobs.job import Job, Status
from fidelora.recipe import Recipe
from fidelora.server.context import ServerContext
from fidelora.server.middleware import MAX_IMAGE_BYTES
from fidelora.server.page.events import IMMEDIATE, STREAMING
from fidelora.server.page.form import (
    MAX_LORAS,
    build_request,
    differences,
    first_recipe,
    form_for_recipe,
)
from fidelora.server.page.html import job_progress, notice
from fidelora.server.page.lora_list import LoraList
from fidelora.server.page.make_form import MAX_IMAGES, MakeForm
from fidelora.server.page.make_results import SNIPPETS, MakeResults
from fidelora.server.page.pictures import ImageId, Pictures
from fidelora.server.submit import defaults_for, submit

_POLL_S = 0.2  # seconds between two reads of the followed job


class MakeTab:
    """Components and event handlers of the tab; created inside a `gr.Blocks`."""

    def __init__(self, context: ServerContext, pictures: Pictures, lora_list: LoraList) -> None:
        self._context = context
        self._pictures = pictures
        self._lora_list = lora_list
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=320):
                self.form = MakeForm(lora_list, context.settings.fidelity)
            with gr.Column(scale=6, min_width=320):
                self.results = results = MakeResults()
        self._outputs: dict[str, Any] = {
            "progress": results.progress,
            "gallery": results.gallery,
            "shown": results.shown,
            "remembered": results.remembered,
            "job": results.job,
            "generate": self.form.generate,
            "cancel": self.form.cancel,
            "use": results.use,
            "details": results.details,
            "selected": results.selected,
            **results.snippets,
        }

    def listen(self, page: gr.Blocks, tab: gr.Tab) -> None:
        """Connect the event handlers."""
        form, results, outputs = self.form, self.results, list(self._outputs.values())
        form.listen()
        # Not on focus: an update of the list while the user chooses would undo the choice.
        gr.on([page.load, tab.select], self._refresh_loras, None, form.loras, **IMMEDIATE)
        page.load(self._restore, results.remembered, outputs, **STREAMING)
        gr.on(
            [
                form.generate.click,
                form.fields["trigger_word"].submit,
                form.fields["neg"].submit,
                form.seed.submit,
            ],
            self._generate,
            [results.job, results.shown, *form.inputs],
            outputs,
            **STREAMING,
        )
        form.cancel.click(self._cancel, results.job, form.cancel, **IMMEDIATE)
        results.gallery.select(
            self._select,
            results.shown,
            [results.selected, *results.snippets.values()],
            **IMMEDIATE,
        )
        results.use.click(
            self._use_settings, [results.shown, results.selected], form.outputs, **IMMEDIATE
        )
        form.image.upload(self._load_image, form.image, form.outputs, **IMMEDIATE)

    # --- jobs ------------------------------------------------------------------------------

    def _refresh_loras(self) -> Any:
        return gr.update(choices=self._lora_list.choices())

    async def _generate(
        self, followed: str, shown: list[ImageId], *values: Any
    ) -> AsyncIterator[list[Any]]:
        try:
            # Two followed jobs would overwrite each other's images on the page.
            if await run_in_threadpool(self._is_running, followed):
                raise WrongUseError(
                    "The previous job is still running. Wait for it to finish or cancel it."
                )
            form = self.form.read(values)
            if form.images > MAX_IMAGES:
                raise WrongUseError(
                    f"Images: choose a number from 1 to {MAX_IMAGES}, not {form.images}."
                )
            job = await submit(self._context, build_request(form))
        except FideloraError as error:
            yield self._updates(progress=notice(error, "error"))
            return
        async for update in self._follow(job, shown):
            yield update

    async def _restore(self, remembered: list[Any]) -> AsyncIterator[list[Any]]:
        """Restore the images that were shown before a reload, and follow the running job."""
        entries = [
            (str(entry[0]), int(entry[1]))
            for entry in remembered or []
            if isinstance(entry, list) and len(entry) == 2
        ]
        running = [job_id for job_id, index in entries if index < 0]
        if not running:
            yield self._updates()  # a handler that yields nothing would clear its outputs
        else:  # a second job would overwrite this job's images, so disable the button
            yield self._updates(job=running[0], generate=gr.update(interactive=False))
        shown, files = await run_in_threadpool(
            self._pictures.gallery, [image for image in entries if image[1] >= 0]
        )
        if shown:
            yield self._updates(
                gallery=gr.update(value=files),
                shown=shown,
                remembered=shown,
                **self._selection(shown, 0),
            )
        for job_id in running:
            try:
                job = await run_in_threadpool(self._context.store.get, job_id)
                async for update in self._follow(job, shown):
                    yield update
                job = await run_in_threadpool(self._context.store.get, job_id)
                shown = [*self._pictures.of(job), *shown]
            except JobNotFoundError:  # removed in the meantime
                yield self._updates(remembered=shown)
        if running:
            yield self._updates(
                job="",
                generate=gr.update(interactive=True),
                cancel=gr.update(interactive=False),
            )

    def _is_running(self, job_id: str) -> bool:
        try:
            return bool(job_id) and not self._context.store.get(job_id).status.final
        except JobNotFoundError:  # removed in the meantime
            return False

    async def _follow(self, job: Job, shown: list[ImageId]) -> AsyncIterator[list[Any]]:
        """Yield an update for every change of a job, and its images when it has succeeded."""
        yield self._updates(
            job=job.id, cancel=gr.update(interactive=True), remembered=[(job.id, -1), *shown]
        )
        last: tuple[int, int | None] | None = None
        while True:
            position = None
            if job.status is Status.IN_QUEUE:
                position = await run_in_threadpool(self._context.store.queue_position, job.id)
            if last != (job.version, position):
                last = (job.version, position)
                if job.status.final:
                    break
                yield self._updates(progress=job_progress(job, position))
            await asyncio.sleep(_POLL_S)
            job = await run_in_threadpool(self._context.store.get, job.id)
        end: dict[str, Any] = {
            "progress": job_progress(job, None),
            "job": "",
            "cancel": gr.update(interactive=False),
        }
        if job.status is Status.SUCCEEDED:
            shown, files = await run_in_threadpool(
                self._pictures.gallery, [*self._pictures.of(job), *shown]
            )
            end["gallery"] = gr.update(value=files, selected_index=None)
            end["shown"] = shown
            end |= self._selection(shown, 0)
        yield self._updates(remembered=shown, **end)

    def _cancel(self, job_id: str) -> Any:
        if job_id:
            self._context.store.cancel(job_id, datetime.now(UTC))
        return gr.update(interactive=False)

    # --- finished images -------------------------------------------------------------------

    def _select(self, event: gr.SelectData, shown: list[ImageId]) -> list[Any]:
        index = event.index if isinstance(event.index, int) and event.index < len(shown) else 0
        snippets = self._snippets(shown, index)
        return [index, *(snippets.get(name, gr.skip()) for name in SNIPPETS)]

    def _use_settings(self, shown: list[ImageId], selected: int) -> list[Any]:
        if selected >= len(shown):
            return self.form.message(notice("Choose an image.", "error"))
        try:
            return self._show_recipe(*self._pictures.recipe(shown[selected]))
        except FideloraError as error:
            return self.form.message(notice(error, "error"))

    def _load_image(self, file: str | None) -> list[Any]:
        if file is None:
            return self.form.message("")
        path = Path(file)
        try:
            # The page's upload limit is higher, because it also covers zips of training runs.
            if path.stat().st_size > MAX_IMAGE_BYTES:
                raise ImageRecordError(
                    f"{path.name} is too large: at most {MAX_IMAGE_BYTES:,} bytes are supported."
                )
            origin = read_origin(path.read_bytes(), path.name)
            if origin.recipe is None:
                raise ImageRecordError(
                    f"{path.name} contains no Fidelora recipe; choose an image made by Fidelora."
                )
            return self._show_recipe(origin.recipe, origin.format)
        except FideloraError as error:
            return self.form.message(notice(error, "error"))

    def _show_recipe(self, recipe: Recipe, image_format: str) -> list[Any]:
        """Return the updates that load a recipe into the form, and a message about the result."""
        found = [(adapter, self._lora_list.path_of(adapter)) for adapter in recipe.adapters]
        paths = [path for _, path in found if path is not None]
        if len(paths) < len(found):
            missing = ", ".join(
                f"{adapter.name or 'unnamed'} (sha256 {adapter.sha256})"
                for adapter, path in found
                if path is None
            )
            raise WrongUseError(f"The image needs LoRAs that are not on this server: {missing}.")
        if not 1 <= len(paths) <= MAX_LORAS:
            raise WrongUseError(
                f"The image uses {len(paths)} LoRAs; this form supports 1 to {MAX_LORAS}."
            )
        form = form_for_recipe(recipe, paths, image_format)
        adapters = [self._lora_list.cached_ref(path) for path in paths]
        here = first_recipe(form, adapters, defaults_for(self._context, recipe.model, adapters))
        if changes := differences(recipe, here):
            message = notice(
                "Settings loaded, but this server would make a different image: "
                f"{'; '.join(changes)}.",
                "error",
            )
        else:
            message = notice("Settings loaded; this server makes the same image again.", "good")
        return self.form.show(form, message)

    def _selection(self, shown: Sequence[ImageId], index: int) -> dict[str, Any]:
        visible = gr.update(visible=True)
        return {
            "use": visible,
            "details": visible,
            "selected": index,
            **self._snippets(shown, index),
        }

    def _snippets(self, shown: Sequence[ImageId], index: int) -> Mapping[str, Any]:
        try:
            return self._pictures.snippets(*self._pictures.recipe(shown[index]))
        except (FideloraError, IndexError):  # removed in the meantime
            return {}

    def _updates(self, **values: Any) -> list[Any]:
        """Return an update of every output; those not named keep their value."""
        assert values.keys() <= self._outputs.keys()
        return [values.get(name, gr.skip()) for name in self._outputs]
