"""The tab *Compare*: several checkpoints at several multipliers, everything else alike, on one sheet."""

from __future__ import annotations

import asyncio
import io
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image
from starlette.concurrency import run_in_threadpool

from fidelora.atomic import make_folder, write_atomically
from fidelora.errors import FideloraError, WrongUseError
from fidelora.jobs.job import Job, Status
from fidelora.recipe import MAX_MULTIPLIER
from fidelora.server.context import ServerContext
from fidelora.server.outputs import content_of
from fidelora.server.page.form import Form, request_of
from fidelora.server.page.html import bar, notice, text
from fidelora.server.page.lora_list import LoraList
from fidelora.server.page.make_tab import Make
from fidelora.server.page.pictures import PageFiles
from fidelora.server.page.verifications import new_id
from fidelora.server.submit import submit
from fidelora.training.grid import labelled_sheet

MOST_IMAGES = 64
_LOOK_EVERY_S = 0.3


class Compare:
    """The tab's components; built inside a `gr.Blocks`, and wired by `listen`. What it does not have itself is the form's."""

    def __init__(
        self, context: ServerContext, page_files: PageFiles, library: LoraList, make: Make
    ) -> None:
        self._context = context
        self._place = page_files
        self._library = library
        self._make = make
        gr.Markdown(
            "Makes one image with each checkpoint at each multiplier. Prompt and settings are those of the tab *Make*.",
            elem_classes="help",
        )
        with gr.Row(equal_height=False):
            with gr.Column(min_width=300, scale=2):
                self.loras = gr.Dropdown(
                    [], multiselect=True, label="Checkpoints", elem_id="checkpoints",
                    info="LoRAs, such as the steps of one training. Each is a row.",
                )  # fmt: skip
            with gr.Column(min_width=300):
                self.multipliers = gr.Textbox(
                    "0, 0.5, 0.8, 1",
                    label="Multipliers",
                    elem_id="multipliers",
                    info="With commas. Each is a column.",
                )
        self.about = gr.Markdown(latex_delimiters=[], elem_id="about-compare", elem_classes="help")
        with gr.Row():
            self.go = gr.Button(
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
            label="Sheet", show_label=False, interactive=False, visible=False, format="png", type="filepath", elem_id="sheet",
            buttons=["download", "fullscreen"],
        )  # fmt: skip
        self.jobs = gr.State([])

    def listen(self, tab: gr.Tab) -> None:
        """Connect what happens to what is done."""
        quick: dict[str, Any] = {
            "show_progress": "hidden",
            "queue": False,
            "api_visibility": "private",
        }
        tab.select(
            self._selected, [self.loras, *self._make.values], [self.loras, self.about], **quick
        )
        gr.on(
            [self.go.click, self.multipliers.submit], self._compare, [self.loras, self.multipliers, *self._make.values],
            [self.progress, self.sheet, self.jobs, self.cancel],
            show_progress="hidden", concurrency_limit=None, api_visibility="private",
        )  # fmt: skip
        self.cancel.click(self._cancel, self.jobs, self.cancel, **quick)

    def _selected(self, loras: list[str], *values: Any) -> list[Any]:
        """Begin with what is chosen in *Make*, and say what is taken over from there."""
        try:
            form = self._make.form(values)
        except FideloraError as error:
            return [gr.update(choices=self._library.choices()), notice(error, "error")]
        seed = "random, the same for all" if form.seed is None else form.seed
        about = (
            f'<div class="said"><span>“{text(form.prompt)}” · {form.width} x {form.height} · seed {seed} · {form.steps} steps · '
            f"guidance {form.guidance:g} · {text(form.sampler)} · {text(form.fidelity)}</span></div>"
        )
        chosen = loras or [name for name, _ in form.loras]
        return [gr.update(choices=self._library.choices(), value=chosen), about]

    def _cancel(self, jobs: list[str]) -> Any:
        for job_id in jobs:
            self._context.store.cancel(job_id, datetime.now(UTC))
        return gr.update(interactive=False)

    async def _compare(
        self, loras: list[str], multipliers: str, *values: Any
    ) -> AsyncIterator[list[Any]]:
        jobs: list[Job] = []
        try:
            columns = read_multipliers(multipliers)
            forms = self._forms(loras or [], columns, self._make.form(values))
            requests = [request_of(form) for form in forms]
            for request in requests:
                jobs.append(await submit(self._context, request))  # noqa: PERF401  # after a failure, those before are canceled
        except FideloraError as error:
            self._cancel([job.id for job in jobs])
            yield [notice(error, "error"), gr.skip(), [], gr.update(interactive=False)]
            return
        yield [
            bar(0, len(jobs), "Waiting."),
            gr.skip(),
            [job.id for job in jobs],
            gr.update(interactive=True),
        ]
        async for done in self._each(jobs):
            yield [
                bar(done, len(jobs), f"{done} of {len(jobs)} images made."),
                gr.skip(),
                gr.skip(),
                gr.skip(),
            ]
        jobs = [await run_in_threadpool(self._context.store.get, job.id) for job in jobs]
        over = [[], gr.update(interactive=False)]
        failed = next((job for job in jobs if job.status is not Status.SUCCEEDED), None)
        if failed is not None:
            await run_in_threadpool(self._cancel, [job.id for job in jobs])
            said = notice(failed.error.message, "error") if failed.error else notice("Canceled.")
            yield [said, gr.skip(), *over]
            return
        try:
            file = await run_in_threadpool(self._sheet, jobs, loras, columns)
        except FideloraError as error:
            yield [notice(error, "error"), gr.skip(), *over]
            return
        yield [notice("Done.", "good"), gr.update(value=str(file), visible=True), *over]

    def _forms(self, loras: list[str], multipliers: Sequence[float], form: Form) -> list[Form]:
        """The form of each image, row by row, so that a LoRA is loaded once; all with one seed."""
        if not loras:
            raise WrongUseError("Choose at least one checkpoint.")
        if len(loras) * len(multipliers) > MOST_IMAGES:
            raise WrongUseError(
                f"{len(loras)} x {len(multipliers)} images are more than {MOST_IMAGES}; choose fewer."
            )
        seed = secrets.randbelow(2**32) if form.seed is None else form.seed
        trigger = form.trigger or self._library.trigger(loras)
        return [
            replace(form, loras=((lora, multiplier),), seed=seed, number=1, trigger=trigger)
            for lora in loras
            for multiplier in multipliers
        ]

    async def _each(self, jobs: Sequence[Job]) -> AsyncIterator[int]:
        """How many have ended, whenever it is one more; ends early if one has not succeeded."""
        for done, job in enumerate(jobs):
            now = job
            while not now.status.final:
                await asyncio.sleep(_LOOK_EVERY_S)
                now = await run_in_threadpool(self._context.store.get, job.id)
            if now.status is not Status.SUCCEEDED:
                return
            yield done + 1

    def _sheet(
        self, jobs: Sequence[Job], loras: Sequence[str], multipliers: Sequence[float]
    ) -> Path:
        images = {}
        for number, job in enumerate(jobs):
            with Image.open(io.BytesIO(content_of(job.outputs[0]))) as image:
                images[divmod(number, len(multipliers))] = np.asarray(image.convert("RGB"))
        recipe = jobs[0].recipes[0]
        rows = [(PurePosixPath(lora).stem, self._below(lora)) for lora in loras]
        columns = [(f"multiplier {multiplier:g}", "") for multiplier in multipliers]
        title = f"{recipe.prompt} (seed {recipe.seed}, {recipe.sampler}, {recipe.steps} steps)"
        buffer = io.BytesIO()
        labelled_sheet(title, rows, columns, images).save(buffer, "PNG")
        file = self._place.files / new_id() / "compare.png"
        make_folder(file.parent)
        write_atomically(file, buffer.getvalue())
        return file

    def _below(self, lora: str) -> str:
        summary = self._library.summary(lora)
        return f"step {summary.step}" if summary and summary.step is not None else ""


def read_multipliers(typed: str) -> list[float]:
    """Numbers with commas, each once.

    Raises:
        WrongUseError: one is no number, or none that a LoRA can have.
    """
    words = [word.strip() for word in typed.split(",") if word.strip()]
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        numbers = []
    if not numbers or not all(-MAX_MULTIPLIER <= number <= MAX_MULTIPLIER for number in numbers):
        raise WrongUseError(
            f"Multipliers: {typed[:60]!r} is no list of numbers from -2 to 2, such as 0.5, 1."
        )
    return list(dict.fromkeys(numbers))
