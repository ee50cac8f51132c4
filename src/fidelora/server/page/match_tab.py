"""The *Match* tab: verifies a training run, or explains a picture of another program.

It runs `fidelora verify` or `fidelora explain`, and shows the report.
"""

from __future__ import annotations

import shutil
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.concurrency import run_in_threadpool

from fidelora.errors import FideloraError, TrainingRunError
from fidelora.server.context import ServerContext
from fidelora.server.middleware import MAX_IMAGE_BYTES
from fidelora.server.page.events import IMMEDIATE, STREAMING
from fidelora.server.page.html import notice, progress_bar
from fidelora.server.page.match_messages import explanation, report_link, verdict
from fidelora.server.page.pictures import PageFiles
from fidelora.server.page.uploads import refuse_larger
from fidelora.server.page.verification_progress import Progress, with_pauses
from fidelora.server.page.verifications import (
    find_run,
    list_runs,
    read_contained_run,
    server_base_model,
    unpack_run,
)
from fidelora.server.public_texts import public_text
from fidelora.server.verifier import CANCELED, Outcome, Verifier, random_id

_FROM_FILE = "The one in the file"
_PROGRAMS = {
    _FROM_FILE: (),
    "AUTOMATIC1111's web UI": ("--program", "a1111"),
    "Forge": ("--program", "forge"),
    "ComfyUI": ("--program", "comfyui"),
    "diffusers": ("--program", "diffusers"),
}
"""Options of `fidelora explain` by the name of a program."""
_Output = AsyncGenerator[str | Outcome, None]
_MAX_OUTPUT_LINES = 200
_ELAPSED_INTERVAL_S = 1.0
"""Seconds between two updates of the elapsed time."""


class MatchTab:
    """Components and event handlers of the tab; created inside a `gr.Blocks`."""

    def __init__(self, context: ServerContext, page_files: PageFiles, verifier: Verifier) -> None:
        self._context = context
        self._page_files = page_files
        self._verifier = verifier
        root = context.settings.jobs
        gr.Markdown(
            "Makes the samples of a finished training run again, with its saved weights and this "
            "server's base model, and compares them with the trainer's. *Identical*: every pixel "
            "is the same. *Rounding*: the differences are as large as the lost precision explains. "
            "*Undecided*: so much precision was lost that wrong settings would look the same. "
            "*Mismatch*: the settings, the weights or the base model differ from the trainer's.",
            elem_classes="help",
        )
        with gr.Row(equal_height=False):
            with gr.Column(min_width=300):
                self.folder = gr.Dropdown(
                    [],
                    label="Training run on this server",
                    elem_id="run",
                    interactive=root is not None,
                    info="Type to search."
                    if root
                    else "No folder is configured; the operator of this server can set "
                    "FIDELORA_JOBS_PATH.",
                )
                self.archive = gr.File(
                    label=f"Or drop its zip, up to {context.settings.job_max_mb:,} MiB",
                    file_types=[".zip"],
                    height=150,
                    elem_id="run-zip",
                )
            with gr.Column(min_width=300):
                self.step = gr.Textbox(
                    "last", label="Step", info="A number, last or all.", elem_id="step"
                )
                self.doctor = gr.Checkbox(
                    label="On a mismatch, find the setting that explains it (takes longer)",
                    elem_id="doctor",
                )
                with gr.Row():
                    self.verify = gr.Button(
                        "Verify", variant="primary", elem_id="verify", scale=3, min_width=140
                    )
                    self.cancel = gr.Button(
                        "Cancel",
                        interactive=False,
                        elem_id="cancel-verify",
                        scale=1,
                        min_width=100,
                    )
        with gr.Accordion("A picture of another program differs", open=False, elem_id="differs"):
            gr.Markdown(
                "Choose the training run above, and drop a picture that ComfyUI, AUTOMATIC1111's "
                "web UI, a diffusers script or another program made with its LoRA. The report "
                "lists the settings that differ from the trainer's sample, in the order of their "
                "effect on the pixels, and the values to set in that program.",
                elem_classes="help",
            )
            with gr.Row(equal_height=False):
                self.picture = gr.File(
                    label="Picture (its original file)",
                    file_types=[".png", ".jpg", ".jpeg", ".webp"],
                    height=150,
                    elem_id="other-picture",
                    min_width=300,
                )
                with gr.Column(min_width=300):
                    self.program = gr.Dropdown(
                        list(_PROGRAMS),
                        value=_FROM_FILE,
                        label="Program",
                        elem_id="program",
                        info="Needed only if the file does not contain it.",
                    )
                    self.explain = gr.Button(
                        "Explain", variant="primary", elem_id="explain", min_width=140
                    )
        self.verdict = gr.Markdown(latex_delimiters=[], elem_id="verdict")
        self.report = gr.Markdown(latex_delimiters=[], elem_id="report")
        self.output = gr.Textbox(
            label="Output of the command",
            lines=6,
            max_lines=20,
            visible=False,
            elem_id="verify-output",
        )
        self.verification_id = gr.State("")
        self._outputs = {
            "verdict": self.verdict,
            "report": self.report,
            "output": self.output,
            "verification_id": self.verification_id,
            "cancel": self.cancel,
            "archive": self.archive,
            "picture": self.picture,
        }

    def listen(self, tab: gr.Tab) -> None:
        """Connect the event handlers."""
        tab.select(self._refresh_runs, None, self.folder, **IMMEDIATE)
        gr.on(
            [self.verify.click, self.step.submit],
            self._verify,
            [self.folder, self.archive, self.step, self.doctor],
            list(self._outputs.values()),
            **STREAMING,
        )
        self.explain.click(
            self._explain,
            [self.folder, self.archive, self.step, self.picture, self.program],
            list(self._outputs.values()),
            **STREAMING,
        )
        self.cancel.click(self._cancel, self.verification_id, self.cancel, **IMMEDIATE)

    def _refresh_runs(self) -> Any:
        return gr.update(choices=list_runs(self._context.settings.jobs))

    def _cancel(self, verification_id: str) -> Any:
        if verification_id:
            self._verifier.cancel(verification_id)
        return gr.update(interactive=False)

    async def _verify(
        self, folder: str | None, archive: str | None, step: str, doctor: bool
    ) -> AsyncIterator[list[Any]]:
        def command(one: _CommandArguments) -> _Output:
            return self._verifier.run(
                one.id, one.run_folder, one.base_model, one.out, step=one.step, doctor=doctor
            )

        async for updates in self._run(folder, archive, step, command, verdict):
            yield updates

    async def _explain(
        self,
        folder: str | None,
        archive: str | None,
        step: str,
        picture: str | None,
        program: str,
    ) -> AsyncIterator[list[Any]]:
        if not picture:
            yield self._updates(verdict=notice("Drop a picture of another program.", "error"))
            return
        options = [*_PROGRAMS.get(program, ())]

        def command(one: _CommandArguments) -> _Output:
            chosen = ["--step", one.step] if one.step.isdigit() else []
            return self._verifier.explain(
                one.id, one.run_folder, Path(picture), one.base_model, one.out, [*chosen, *options]
            )

        try:
            refuse_larger(Path(picture), MAX_IMAGE_BYTES)
            async for updates in self._run(folder, archive, step, command, explanation):
                yield updates
        except FideloraError as error:
            yield self._updates(verdict=notice(error, "error"), picture=None)
        finally:
            Path(picture).unlink(missing_ok=True)

    async def _run(
        self,
        folder: str | None,
        archive: str | None,
        step: str,
        command: Callable[[_CommandArguments], _Output],
        result: Callable[[Outcome, Sequence[str]], str],
    ) -> AsyncIterator[list[Any]]:
        """Run a command for a training run, and yield the updates of the page.

        Args:
            command: starts the command.
            result: returns the message for its outcome and the lines of its output.
        """
        try:
            step = _read_step(step)
        except TrainingRunError as error:
            yield self._updates(verdict=notice(error, "error"))
            return
        verification_id = random_id()
        workspace = self._page_files.verifications / verification_id
        end = {
            "cancel": gr.update(interactive=False),
            "verification_id": "",
            "archive": None,
            "picture": None,
        }
        waiting = "Waiting for another verification to finish."
        yield self._updates(
            verdict=progress_bar(
                0, 1, waiting if self._verifier.busy else "Reading the training run."
            ),
            report="",
            output=gr.update(visible=False, value=""),
            verification_id=verification_id,
            cancel=gr.update(interactive=True),
        )
        try:
            run_folder, base_model = await run_in_threadpool(
                self._read_run, folder, archive, workspace
            )
            lines: list[str] = []
            outcome = None
            progress = Progress()
            out = workspace / "report"
            out.mkdir(parents=True)
            output = command(_CommandArguments(verification_id, run_folder, base_model, out, step))
            async for line in with_pauses(output, _ELAPSED_INTERVAL_S):
                if isinstance(line, Outcome):
                    outcome = line
                elif line is None or progress.read(line):
                    yield self._updates(verdict=progress.bar())
                elif not line.startswith("Report: "):  # the page shows the report itself
                    lines.append(public_text(line.replace(str(run_folder), run_folder.name)))
                    yield self._updates(
                        output=gr.update(visible=True, value="\n".join(lines[-_MAX_OUTPUT_LINES:])),
                    )
            assert outcome is not None
            yield self._updates(
                verdict=result(outcome, lines),
                report=report_link(verification_id, outcome),
                **end,
            )
        except FideloraError as error:
            kind = "" if str(error) == CANCELED else "error"
            yield self._updates(
                verdict=notice(self._without_folders(error, workspace), kind), **end
            )
        finally:
            shutil.rmtree(workspace / "run", ignore_errors=True)
            for empty in (workspace / "report", workspace):
                with suppress(OSError):  # it does not exist, or has the report
                    empty.rmdir()
            if archive:
                Path(archive).unlink(missing_ok=True)

    def _without_folders(self, error: FideloraError, workspace: Path) -> str:
        """Return an error's message without the paths of this server's folders."""
        message = str(error)
        for folder in filter(None, (workspace / "run", self._context.settings.jobs)):
            message = message.replace(f"{folder}/", "")
        return message

    def _read_run(
        self, folder: str | None, archive: str | None, workspace: Path
    ) -> tuple[Path, str]:
        """Return the run's folder, and its base model on this server."""
        settings = self._context.settings
        if archive:
            max_bytes = settings.job_max_mb * 2**20
            refuse_larger(Path(archive), max_bytes)
            path, _ = unpack_run(Path(archive), workspace / "run", max_bytes)
        elif folder:
            path = find_run(settings.jobs, folder)
        else:
            raise TrainingRunError("Choose a training run, or drop its zip.")
        run = read_contained_run(path, self._context)
        return path, server_base_model(run, self._context)

    def _updates(self, **values: Any) -> list[Any]:
        """Return an update of every output; those not named keep their value."""
        assert values.keys() <= self._outputs.keys()
        return [values.get(name, gr.skip()) for name in self._outputs]


@dataclass(frozen=True)
class _CommandArguments:
    """Arguments of a command for a training run.

    Attributes:
        id: id of the verification, for canceling it.
        base_model: this server's base model of the run's family.
        out: folder of the report.
        step: a number, `last` or `all`.
    """

    id: str
    run_folder: Path
    base_model: str
    out: Path
    step: str


def _read_step(text: str) -> str:
    text = text.strip() or "last"
    if text in ("last", "all") or (text.isascii() and text.isdigit() and len(text) < 10):
        return text
    raise TrainingRunError(f"{text!r:.60} is not a step; enter a number, last or all.")
