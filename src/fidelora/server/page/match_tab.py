"""The tab *Match*: a training job's previews made again, with the verdict and the wipe view of `fidelora verify`."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.concurrency import run_in_threadpool

from fidelora.errors import FideloraError, JobFolderError
from fidelora.server.context import ServerContext
from fidelora.server.page.html import bar, notice, text
from fidelora.server.page.paths import REPORTS
from fidelora.server.page.pictures import PageFiles
from fidelora.server.page.verifications import (
    Outcome,
    Verifier,
    base_for,
    new_id,
    read_inside,
    run_names,
    run_path,
    unpack,
)

_VERDICTS = {
    "identical": ("good", "Every pixel of every preview is the same."),
    "rounding": ("good", "No preview differs by more than rounding explains."),
    "mismatch": ("error", "At least one preview came out different."),
}


class Match:
    """The tab's components; built inside a `gr.Blocks`, and wired by `listen`."""

    def __init__(self, context: ServerContext, page_files: PageFiles, verifier: Verifier) -> None:
        self._context = context
        self._place = page_files
        self._verifier = verifier
        root, most = context.settings.jobs, context.settings.job_max_mb
        gr.Markdown(
            "Makes the previews of a finished training job again from its weights, with this server's base model, and says of each "
            "whether it is the same picture. *Identical*: every pixel. *Rounding*: no more than the precision of the saved file "
            "explains. *Mismatch*: something is different.",
            elem_classes="help",
        )
        with gr.Row(equal_height=False):
            with gr.Column(min_width=300):
                self.folder = gr.Dropdown(
                    [], label="Training job on this server", elem_id="job", interactive=root is not None,
                    info="Type to search." if root else "None: whoever runs the server can name a folder with FIDELORA_JOBS_PATH.",
                )  # fmt: skip
                self.archive = gr.File(
                    label=f"Or drop its zip, up to {most:,} MiB", file_types=[".zip"], height=150,
                    elem_id="job-zip",
                )  # fmt: skip
            with gr.Column(min_width=300):
                self.step = gr.Textbox(
                    "last", label="Step", info="A number, last, or all.", elem_id="step"
                )
                self.doctor = gr.Checkbox(
                    label="On a mismatch, find the setting that explains it (takes longer)",
                    elem_id="doctor",
                )
                with gr.Row():
                    self.go = gr.Button(
                        "Verify", variant="primary", elem_id="verify", scale=3, min_width=140
                    )
                    self.cancel = gr.Button(
                        "Cancel",
                        variant="stop",
                        interactive=False,
                        elem_id="cancel-verify",
                        scale=1,
                        min_width=100,
                    )
        self.verdict = gr.Markdown(latex_delimiters=[], elem_id="verdict")
        self.report = gr.Markdown(latex_delimiters=[], elem_id="report")
        self.said = gr.Textbox(
            label="What fidelora verify says", lines=6, max_lines=20, visible=False, elem_id="said"
        )
        self.run_id = gr.State("")

    def listen(self, tab: gr.Tab) -> None:
        """Connect what happens to what is done."""
        quick: dict[str, Any] = {
            "show_progress": "hidden",
            "queue": False,
            "api_visibility": "private",
        }
        tab.select(self._list_jobs, None, self.folder, **quick)
        gr.on(
            [self.go.click, self.step.submit], self._verify, [self.folder, self.archive, self.step, self.doctor],
            [self.verdict, self.report, self.said, self.run_id, self.cancel, self.archive],
            show_progress="hidden", concurrency_limit=None, api_visibility="private",
        )  # fmt: skip
        self.cancel.click(self._cancel, self.run_id, self.cancel, **quick)

    def _list_jobs(self) -> Any:
        return gr.update(choices=run_names(self._context.settings.jobs))

    def _cancel(self, run_id: str) -> Any:
        if run_id:
            self._verifier.cancel(run_id)
        return gr.update(interactive=False)

    async def _verify(
        self, folder: str | None, archive: str | None, step: str, doctor: bool
    ) -> AsyncIterator[list[Any]]:
        try:
            step = _step(step)
        except JobFolderError as error:
            yield _updates(verdict=notice(error, "error"))
            return
        run_id = new_id()
        here = self._place.checks / run_id
        done = {"cancel": gr.update(interactive=False), "run_id": ""}
        yield _updates(
            verdict=bar(0, 1, "Waiting for another one." if self._verifier.busy else "Reading the job."),
            report="", said=gr.update(visible=False, value=""), run_id=run_id, cancel=gr.update(interactive=True),
        )  # fmt: skip
        try:
            job_folder, base_model, total = await run_in_threadpool(
                self._job, folder, archive, here
            )
            lines: list[str] = []
            outcome = None
            (here / "report").mkdir(parents=True)
            async for one in self._verifier.run(
                run_id, job_folder, base_model, here / "report", step=step, doctor=doctor
            ):
                if isinstance(one, Outcome):
                    outcome = one
                elif not one.startswith("Report: "):  # it is shown
                    lines.append(one.replace(str(job_folder), job_folder.name))
                    checked = sum(line[:7].strip().isdigit() for line in lines)
                    said = f"{checked} previews made." if checked else "Loading the base model."
                    yield _updates(
                        verdict=bar(min(checked, total), total, said),
                        said=gr.update(visible=True, value="\n".join(lines[-200:])),
                    )
            assert outcome is not None
            yield _updates(
                verdict=_verdict(outcome, lines),
                report=self._link(run_id, outcome),
                archive=None,
                **done,
            )
        except FideloraError as error:
            yield _updates(
                verdict=notice(error, "" if str(error) == "Canceled." else "error"),
                archive=None,
                **done,
            )
        finally:
            shutil.rmtree(here / "job", ignore_errors=True)
            if archive:
                Path(archive).unlink(missing_ok=True)

    def _job(self, folder: str | None, archive: str | None, here: Path) -> tuple[Path, str, int]:
        """The job's folder, the base model for it, and how many samples it has."""
        if archive:
            path, _ = unpack(Path(archive), here / "job", self._context.settings.job_max_mb * 2**20)
        elif folder:
            path = run_path(self._context.settings.jobs, folder)
        else:
            raise JobFolderError("Choose a training job, or drop its zip.")
        job = read_inside(path, self._context)
        return path, base_for(job, self._context), max(1, len(job.samples))

    def _link(self, run_id: str, outcome: Outcome) -> str:
        if outcome.report is None:
            return ""
        address = f".{REPORTS}{run_id}"
        return f'<a class="report" href="{address}" target="_blank" rel="noopener">The report, in a tab of its own</a>'


def _step(typed: str) -> str:
    typed = typed.strip() or "last"
    if typed in ("last", "all") or (typed.isascii() and typed.isdigit() and len(typed) < 10):
        return typed
    raise JobFolderError(f"{typed!r:.60} is no step; give a number, last or all.")


def _verdict(outcome: Outcome, lines: list[str]) -> str:
    lines = [line for line in lines if line]
    found = next(
        (line.partition(":")[0] for line in reversed(lines) if line.partition(":")[0] in _VERDICTS),
        "",
    )
    if found and outcome.code in (0, 1):
        kind, sentence = _VERDICTS[found]
        doctor = next((line for line in lines if line.startswith("Doctor:")), "")
        more = f"<br>{text(doctor)}" if doctor else ""
        return f'<div role="status" class="said {kind}"><strong>{text(found)}</strong><span>{text(sentence)}{more}</span></div>'
    return notice(lines[-1] if lines else "fidelora verify ended without a word.", "error")


def _updates(
    verdict: Any = None,
    report: Any = None,
    said: Any = None,
    run_id: Any = None,
    cancel: Any = None,
    archive: Any = gr.skip,
) -> list[Any]:
    """New values for the outputs of `_verify`; what is left out stays as it is."""
    given = [gr.skip() if one is None else one for one in (verdict, report, said, run_id, cancel)]
    return [*given, gr.skip() if archive is gr.skip else archive]
