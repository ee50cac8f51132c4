"""HTML fragments of the page, with all untrusted text escaped. Imports no Gradio."""

from __future__ import annotations

from fidelora.jobs.job import Job, Status
from fidelora.recipe import Recipe

_SPECIAL = "&<>\"'" + "\n\r\t`*_~[]{}()$|\\#!:@"
"""Characters with a special meaning in HTML, or in Markdown and its extensions."""


def escape(value: object) -> str:
    """Escape text so that it is plain text in HTML and in Markdown."""
    return "".join(
        f"&#{ord(character)};" if character in _SPECIAL else character for character in str(value)
    )


def notice(sentence: object, kind: str = "") -> str:
    """Return a message box; `kind` is empty, `error` or `good`."""
    role = "alert" if kind == "error" else "status"
    return f'<div role="{role}" class="message {kind}">{escape(sentence)}</div>'


def job_progress(job: Job, queue_position: int | None) -> str:
    """Return a job's status: a sentence, and while it runs a progress bar and a preview."""
    if job.status is Status.IN_QUEUE:
        if not queue_position:
            return notice("Queued.")
        jobs = "1 job" if queue_position == 1 else f"{queue_position} jobs"
        return notice(f"Queued, {jobs} ahead.")
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
    preview = ""
    if progress.preview:
        preview = (
            '<img class="preview" alt="preview of the image in progress" '
            f'src="data:image/jpeg;base64,{progress.preview}">'
        )
    return (
        f'<div role="status" class="message">'
        f'<progress max="1" value="{progress.fraction:.4f}" aria-label="progress"></progress>'
        f"<span>{image} {progress.step} of {progress.steps}{left}</span>{preview}</div>"
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
    loras = ", ".join(f"{adapter.name} {adapter.multiplier:g}" for adapter in recipe.adapters)
    return f"seed {recipe.seed} · {loras}"


def duration(seconds: float) -> str:
    """Format seconds, such as `42 s` or `3 min 5 s`."""
    whole = max(0, round(seconds))
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60} s"


def _run_time(job: Job) -> str:
    assert job.started_at is not None
    assert job.finished_at is not None
    return f"{(job.finished_at - job.started_at).total_seconds():.1f} s"
