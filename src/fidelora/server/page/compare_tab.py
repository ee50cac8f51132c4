"""The *Compare* tab: a grid of checkpoints and multipliers with one prompt and seed."""

from __future__ import annotations

import io
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import gradio as gr
from PIL import Image
from starlette.concurrency import run_in_threadpool

from fidelora.atomic import make_folder, write_atomically
from fidelora.errors import FideloraError, UsageError
from fidelora.families import get_family
from fidelora.jobs.job import Job, Status
from fidelora.recipe import MAX_MULTIPLIER
from fidelora.server.context import ServerContext
from fidelora.server.outputs import content_of
from fidelora.server.page.events import IMMEDIATE, STREAMING
from fidelora.server.page.form import Form, build_request
from fidelora.server.page.handlers import for_visitor
from fidelora.server.page.html import escape, notice, progress_bar
from fidelora.server.page.lora_list import LoraList
from fidelora.server.page.make_form import MakeForm
from fidelora.server.page.pictures import PageFiles
from fidelora.server.page.visitor import visitor
from fidelora.server.submit import submit
from fidelora.server.verifier import random_id
from fidelora.training.compare import decoded_frames
from fidelora.training.grid import frame_strip, labelled_sheet

MAX_SHEET_IMAGES = 64


class CompareTab:
    """Components and event handlers of the tab; created inside a `gr.Blocks`.

    Prompt and settings are read from the form of the *Make* tab.
    """

    def __init__(
        self,
        context: ServerContext,
        page_files: PageFiles,
        lora_list: LoraList,
        make_form: MakeForm,
    ) -> None:
        self._context = context
        self._page_files = page_files
        self._lora_list = lora_list
        self._make_form = make_form
        gr.Markdown(
            "Makes one image with each checkpoint at each multiplier. Prompt and settings are "
            "those of the *Make* tab.",
            elem_classes="help",
        )
        with gr.Row(equal_height=False):
            with gr.Column(min_width=300, scale=2):
                self.loras = gr.Dropdown(
                    [],
                    multiselect=True,
                    label="Checkpoints",
                    elem_id="checkpoints",
                    info="LoRAs, such as the checkpoints of one training run. Each is a row.",
                )
            with gr.Column(min_width=300):
                self.multipliers = gr.Textbox(
                    "0, 0.5, 0.8, 1",
                    label="Multipliers",
                    elem_id="multipliers",
                    info="Separated by commas. Each is a column.",
                )
        self.about = gr.Markdown(latex_delimiters=[], elem_id="about-compare", elem_classes="help")
        with gr.Row():
            self.compare = gr.Button(
                "Compare", variant="primary", elem_id="compare", scale=3, min_width=140
            )
            self.cancel = gr.Button(
                "Cancel",
                variant="stop",
                interactive=False,
                elem_id="cancel-compare",
                scale=1,
                min_width=100,
            )
        self.progress = gr.Markdown(latex_delimiters=[], elem_id="progress-compare")
        self.sheet = gr.Image(
            label="Sheet",
            show_label=False,
            interactive=False,
            visible=False,
            format="png",
            type="filepath",
            elem_id="sheet",
            buttons=["download", "fullscreen"],
        )
        self.jobs = gr.State([])

    def listen(self, tab: gr.Tab) -> None:
        """Connect the event handlers."""
        inputs = self._make_form.inputs
        tab.select(
            for_visitor(self._show_settings),
            [self.loras, *inputs],
            [self.loras, self.about],
            **IMMEDIATE,
        )
        gr.on(
            [self.compare.click, self.multipliers.submit],
            for_visitor(self._compare),
            [self.loras, self.multipliers, *inputs],
            [self.progress, self.sheet, self.jobs, self.cancel],
            **STREAMING,
        )
        self.cancel.click(for_visitor(self._cancel), self.jobs, self.cancel, **IMMEDIATE)

    def _show_settings(self, loras: list[str], *values: Any) -> list[Any]:
        """Describe the settings of the *Make* tab, and preselect the LoRAs chosen there."""
        choices = self._lora_list.choices()
        try:
            form = self._make_form.read(values)
        except FideloraError as error:
            return [gr.update(choices=choices), notice(error, "error")]
        fields = form.fields
        seed = "random, the same for all" if form.seed is None else form.seed
        about = (
            f'<div class="message"><span>“{escape(fields["prompt"])}” · '
            f"{fields['width']} x {fields['height']} · seed {seed} · "
            f"{fields['sample_steps']} steps · guidance {fields['guidance_scale']:g} · "
            f"{escape(fields['sampler'])} · {escape(fields['fidelity'])}</span></div>"
        )
        chosen = loras or [path for path, _ in form.loras]
        return [gr.update(choices=choices, value=chosen), about]

    def _cancel(self, jobs: list[str]) -> Any:
        for job_id in jobs:
            job = self._context.job(job_id, visitor())
            self._context.store.cancel(job.id)
        return gr.update(interactive=False)

    async def _compare(
        self, loras: list[str], multipliers: str, *values: Any
    ) -> AsyncIterator[list[Any]]:
        jobs: list[Job] = []
        try:
            columns = read_multipliers(multipliers)
            forms = self._forms(loras or [], columns, self._make_form.read(values))
            requests = [build_request(form) for form in forms]
            for request in requests:
                # A comprehension would lose the jobs to cancel if a later request is rejected.
                jobs.append(await submit(self._context, visitor(), request))  # noqa: PERF401
        except FideloraError as error:
            self._cancel([job.id for job in jobs])
            yield [notice(error, "error"), gr.skip(), [], gr.update(interactive=False)]
            return
        yield [
            progress_bar(0, len(jobs), "Queued."),
            gr.skip(),
            [job.id for job in jobs],
            gr.update(interactive=True),
        ]
        async for done in self._count_succeeded(jobs):
            bar = progress_bar(done, len(jobs), f"{done} of {len(jobs)} images made.")
            yield [bar, gr.skip(), gr.skip(), gr.skip()]
        jobs = [await run_in_threadpool(self._context.store.get, job.id) for job in jobs]
        end = [[], gr.update(interactive=False)]
        failed = next((job for job in jobs if job.status is not Status.SUCCEEDED), None)
        if failed is not None:
            await run_in_threadpool(self._cancel, [job.id for job in jobs])
            message = notice(failed.error.message, "error") if failed.error else notice("Canceled.")
            yield [message, gr.skip(), *end]
            return
        try:
            file = await run_in_threadpool(self._sheet, jobs, loras, columns)
        except FideloraError as error:
            yield [notice(error, "error"), gr.skip(), *end]
            return
        yield [notice("Done.", "good"), gr.update(value=str(file), visible=True), *end]

    def _forms(self, loras: list[str], multipliers: Sequence[float], form: Form) -> list[Form]:
        """Return one form per image, all with the same seed.

        The forms are ordered by row, so that each LoRA is loaded only once.
        """
        if not loras:
            raise UsageError("Choose at least one checkpoint.")
        if len(loras) * len(multipliers) > MAX_SHEET_IMAGES:
            raise UsageError(
                f"{len(loras)} checkpoints x {len(multipliers)} multipliers are more than "
                f"{MAX_SHEET_IMAGES} images; choose fewer."
            )
        seed = secrets.randbelow(2**32) if form.seed is None else form.seed
        trigger = form.fields["trigger_word"] or self._lora_list.trigger(loras)
        fields = {**form.fields, "trigger_word": trigger}
        if get_family(fields["model"]).makes_videos:
            fields["output_format"] = "webp"  # images and videos; the sheet shows some frames
        return [
            replace(form, loras=((lora, multiplier),), seed=seed, images=1, fields=fields)
            for lora in loras
            for multiplier in multipliers
        ]

    async def _count_succeeded(self, jobs: Sequence[Job]) -> AsyncIterator[int]:
        """Yield the number of succeeded jobs each time it grows; stop if a job does not succeed."""
        with self._context.watcher.watch() as watch:
            for job in jobs:
                watch.add(job)
            for done, job in enumerate(jobs):
                while not (current := watch.state(job.id).job).status.final:
                    await watch.changed()
                if current.status is not Status.SUCCEEDED:
                    return
                yield done + 1

    def _sheet(
        self, jobs: Sequence[Job], loras: Sequence[str], multipliers: Sequence[float]
    ) -> Path:
        images = {}
        for number, job in enumerate(jobs):
            content = content_of(self._context.images, job.outputs[0])
            with Image.open(io.BytesIO(content)) as image:
                images[divmod(number, len(multipliers))] = frame_strip(decoded_frames(image))
        recipe = jobs[0].recipes[0]
        rows = [(PurePosixPath(lora).stem, self._step_label(lora)) for lora in loras]
        columns = [(f"multiplier {multiplier:g}", "") for multiplier in multipliers]
        title = f"{recipe.prompt} (seed {recipe.seed}, {recipe.sampler}, {recipe.steps} steps)"
        buffer = io.BytesIO()
        labelled_sheet(title, rows, columns, images).save(buffer, "PNG")
        file = self._page_files.files / random_id() / "compare.png"
        make_folder(file.parent)
        write_atomically(file, buffer.getvalue())
        return file

    def _step_label(self, lora: str) -> str:
        summary = self._lora_list.summary(lora)
        return f"step {summary.step}" if summary and summary.step is not None else ""


def read_multipliers(text: str) -> list[float]:
    """Parse numbers separated by commas, and drop duplicates.

    Raises:
        UsageError: the text is empty, or an entry is not a number from -5 to 5.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        numbers = []
    if not numbers or not all(-MAX_MULTIPLIER <= number <= MAX_MULTIPLIER for number in numbers):
        raise UsageError(
            f"Multipliers: {text[:60]!r} is not a list of numbers from -{MAX_MULTIPLIER:g} to "
            f"{MAX_MULTIPLIER:g}, such as 0.5, 1."
        )
    return list(dict.fromkeys(numbers))
