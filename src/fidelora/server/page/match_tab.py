"""The *Match* tab: verifies a training run as `fidelora verify` does, and shows the report."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.concurrency import run_in_threadpool

from fidelora.errors import FideloraError, TrainingRunError
from fidelora.server.context import ServerContext
from fidelora.server.page.events import IMMEDIATE, STREAMING
from fidelora.server.page.html import escape, notice, progress_bar
from fidelora.server.page.paths import REPORTS
from fidelora.server.page.pictures import PageFiles
from fidelora.server.page.uploads import refuse_larger
from fidelora.server.page.verification_progress import Progress, with_pauses
from fidelora.server.page.verifications import (
    CANCELED,
    Outcome,
    Verifier,
    find_run,
    list_runs,
    random_id,
    read_contained_run,
    server_base_model,
    unpack_run,
)
from fidelora.server.public_texts import public_text

_VERDICTS = {
    "identical": (
        "good",
        "Every pixel of every sample is the same: this server makes what the trainer made.",
    ),
    "rounding": (
        "good",
        "The samples are consistent with these settings; the remaining differences are rounding.",
    ),
    "undecided": (
        "",
        "Too much information was lost to tell whether these settings are right. Save future runs "
        "in float32, or verify a step that has all earlier checkpoints.",
    ),
    "mismatch": (
        "error",
        "At least one sample is different. Check the base model first; the option above finds the "
        "setting that explains the difference.",
    ),
}
_MAX_OUTPUT_LINES = 200
_LOOK_S = 1.0
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
        self.verdict = gr.Markdown(latex_delimiters=[], elem_id="verdict")
        self.report = gr.Markdown(latex_delimiters=[], elem_id="report")
        self.output = gr.Textbox(
            label="Output of fidelora verify",
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
        try:
            step = _read_step(step)
        except TrainingRunError as error:
            yield self._updates(verdict=notice(error, "error"))
            return
        verification_id = random_id()
        workspace = self._page_files.verifications / verification_id
        end = {"cancel": gr.update(interactive=False), "verification_id": "", "archive": None}
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
            (workspace / "report").mkdir(parents=True)
            output = self._verifier.run(
                verification_id,
                run_folder,
                base_model,
                workspace / "report",
                step=step,
                doctor=doctor,
            )
            async for line in with_pauses(output, _LOOK_S):
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
                verdict=_verdict(outcome, lines),
                report=_report_link(verification_id, outcome),
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


def _read_step(text: str) -> str:
    text = text.strip() or "last"
    if text in ("last", "all") or (text.isascii() and text.isdigit() and len(text) < 10):
        return text
    raise TrainingRunError(f"{text!r:.60} is not a step; enter a number, last or all.")


def _verdict(outcome: Outcome, lines: Sequence[str]) -> str:
    """Return the verdict from the output's last line of the form `VERDICT: sentence`."""
    lines = [line for line in lines if line]
    words = (line.partition(":")[0] for line in reversed(lines))
    verdict = next((word for word in words if word in _VERDICTS), "")
    if not verdict or outcome.code not in (0, 1, 4):
        return notice(lines[-1] if lines else "fidelora verify ended without output.", "error")
    kind, sentence = _VERDICTS[verdict]
    doctor = next((line for line in lines if line.startswith("Doctor:")), "")
    details = f"<br>{escape(doctor)}" if doctor else ""
    return (
        f'<div role="status" class="message {kind}"><strong>{escape(verdict)}</strong>'
        f"<span>{escape(sentence)}{details}</span></div>"
    )


def _report_link(verification_id: str, outcome: Outcome) -> str:
    if outcome.report is None:
        return ""
    return (
        f'<a class="report" href=".{REPORTS}{verification_id}" target="_blank" rel="noopener">'
        "Open the report in a new tab</a>"
    )
