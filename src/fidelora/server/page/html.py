"""HTML fragments of the page, with all untrusted text escaped. Does not import Gradio."""

from __future__ import annotations

from collections.abc import Sequence

from fidelora.jobs.job import Job, Status
from fidelora.recipe import Recipe
from fidelora.server.public_texts import public_text

_MAX_SHOWN_PROMPT = 80
"""Number of characters of a prompt in the list of requests; one line on a wide screen."""
_SPECIAL = "&<>\"'" + "\n\r\t`*_~[]{}()$|\\#!:@"
"""Characters with a special meaning in HTML, or in Markdown and its extensions."""


def escape(value: object) -> str:
    """Escape text so that it is plain text in HTML and in Markdown."""
    return "".join(
        f"&#{ord(character)};" if character in _SPECIAL else character for character in str(value)
    )


def notice(sentence: object, kind: str = "") -> str:
    """Return a message box without paths of this machine; `kind` is empty, `error` or `good`."""
    role = "alert" if kind == "error" else "status"
    return f'<div role="{role}" class="message {kind}">{escape(public_text(str(sentence)))}</div>'


def prompt_line(job: Job) -> str:
    """Return the beginning of a job's prompt, number of images if several, seed and LoRAs."""
    recipe = job.recipes[0]
    prompt = recipe.prompt
    shown = prompt if len(prompt) <= _MAX_SHOWN_PROMPT else prompt[: _MAX_SHOWN_PROMPT - 1] + "…"
    quoted = f"“{escape(shown)}”" if prompt.strip() else "(empty prompt)"
    images = f" · {len(job.recipes)} images" if len(job.recipes) > 1 else ""
    return f"{quoted}{images} · {escape(caption(recipe))}"


def button_number(job_id: str) -> int:
    """Return the number that the button of a queued job sends: the first 48 bits of its id.

    Gradio accepts values from scripts only in number inputs, which are exact up to 53 bits.
    """
    return int(job_id[:12], 16)


def waiting_jobs(jobs: Sequence[tuple[Job, int | None]]) -> str:
    """Return a list of queued jobs with their positions, and a button for each (script.js).

    Gradio removes `data` and `aria` attributes from HTML.
    """
    rows = "".join(
        f"<li>{_waiting(position)} <span>{prompt_line(job)}</span> "
        f'<button type="button" value="{button_number(job.id)}" title="Cancel {prompt_line(job)}">'
        "Cancel</button></li>"
        for job, position in jobs
    )
    return f'<ul class="queue">{rows}</ul>'


def job_progress(job: Job, queue_position: int | None) -> str:
    """Return a job's status: a sentence, and while it runs a progress bar."""
    if job.status is Status.IN_QUEUE:
        return notice(_waiting(queue_position))
    if job.status is Status.FAILED and job.error:
        return notice(job.error.message, "error")
    if job.status is Status.CANCELED:
        return notice("Canceled.")
    if job.status is Status.SUCCEEDED:
        return notice(f"Done in {_run_time(job)}.", "good")
    progress = job.progress
    if progress is None:
        return notice("Starting.")
    image = (
        f"Image {progress.image + 1} of {progress.images}, step" if progress.images > 1 else "Step"
    )
    left = f", {duration(progress.eta_s)} left" if progress.eta_s is not None else ""
    return (
        f'<div role="status" class="message">'
        f'<progress max="1" value="{progress.fraction:.4f}" aria-label="progress"></progress>'
        f"<span>{image} {progress.step} of {progress.steps}{left}</span></div>"
    )


def job_preview(job: Job) -> str:
    """Return the preview of the image that a job makes; empty if there is none."""
    if job.status.final or job.progress is None or not job.progress.preview:
        return ""
    return (
        '<img alt="preview of the image in progress" '
        f'src="data:image/jpeg;base64,{job.progress.preview}">'
    )


def progress_bar(done: int, total: int, sentence: str) -> str:
    """Return a progress bar with a sentence below it."""
    return (
        f'<div role="status" class="message">'
        f'<progress max="{total}" value="{done}" aria-label="progress"></progress>'
        f"<span>{escape(sentence)}</span></div>"
    )


def caption(recipe: Recipe) -> str:
    """Return an image's caption as plain text."""
    loras = ", ".join(
        adapter.name if adapter.word else f"{adapter.name} × {adapter.multiplier:g}"
        for adapter in recipe.adapters
    )
    return f"seed {recipe.seed} · {loras or 'no LoRA'}"


def duration(seconds: float) -> str:
    """Format seconds, such as `42 s` or `3 min 5 s`."""
    whole = max(0, round(seconds))
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60} s"


def _waiting(queue_position: int | None) -> str:
    """Return a sentence about a queued job. "Next" does not mean that a worker is free."""
    if not queue_position:
        return "Next in the queue."
    jobs = "1 request" if queue_position == 1 else f"{queue_position} requests"
    return f"Queued, {jobs} before it."


def _run_time(job: Job) -> str:
    assert job.started_at is not None
    assert job.finished_at is not None
    return f"{(job.finished_at - job.started_at).total_seconds():.1f} s"
