"""What the page shows, as HTML in which every text from outside is text. Knows no Gradio."""

from __future__ import annotations

from fidelora.jobs.job import Job, Status
from fidelora.recipe import Recipe


def text(value: object) -> str:
    """A text that is no markup, neither in HTML nor in the Markdown around it."""
    return "".join(
        f"&#{ord(character)};" if character in _MEANINGFUL else character
        for character in str(value)
    )


_MEANINGFUL = "&<>\"'" + "\n\r\t`*_~[]{}()$|\\#!:@"
"""To HTML, and to Markdown and its extensions."""


def notice(sentence: object, kind: str = "") -> str:
    """A sentence for people; `kind` is empty, `error` or `good`."""
    return f'<div role="{"alert" if kind == "error" else "status"}" class="said {kind}">{text(sentence)}</div>'


def progress_of(job: Job, queue_position: int | None) -> str:
    """Where a job is: a bar, a sentence, and the rough picture if there is one."""
    if job.status is Status.IN_QUEUE:
        before = f", {queue_position} before it" if queue_position else ""
        return notice(f"Waiting{before}.")
    if job.status is Status.FAILED and job.error:
        return notice(job.error.message, "error")
    if job.status is Status.CANCELED:
        return notice("Canceled.")
    if job.status is Status.SUCCEEDED:
        return notice(f"Done in {_seconds(job)}.", "good")
    progress = job.progress
    if progress is None:
        return notice("Starting.")
    which = (
        f"Image {progress.image + 1} of {progress.images}, step" if progress.images > 1 else "Step"
    )
    left = f", {duration(progress.eta_s)} left" if progress.eta_s is not None else ""
    said = f"{which} {progress.step} of {progress.steps}{left}"
    picture = ""
    if progress.preview:
        picture = f'<img class="rough" alt="rough picture of what is being made" src="data:image/jpeg;base64,{progress.preview}">'
    return (
        f'<div role="status" class="said"><progress max="1" value="{progress.fraction:.4f}" aria-label="progress"></progress>'
        f"<span>{said}</span>{picture}</div>"
    )


def bar(done: int, of: int, said: str) -> str:
    """A bar for something that has so many parts."""
    return (
        f'<div role="status" class="said"><progress max="{of}" value="{done}" aria-label="progress"></progress>'
        f"<span>{text(said)}</span></div>"
    )


def caption(recipe: Recipe) -> str:
    """What stands below an image, as plain text."""
    loras = ", ".join(f"{adapter.name} {adapter.multiplier:g}" for adapter in recipe.adapters)
    return f"seed {recipe.seed} · {loras}"


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    whole = max(0, round(seconds))
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60} s"


def _seconds(job: Job) -> str:
    assert job.started_at is not None
    assert job.finished_at is not None
    return f"{(job.finished_at - job.started_at).total_seconds():.1f} s"
