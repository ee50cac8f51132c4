"""Conversion between jobs and JSON-ready data, for stores that serialize them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from datetime import datetime
from typing import Any

from fidelora.jobs.job import Failure, Job, JobProgress, Output, Status
from fidelora.recipe import Recipe

_TIME_FIELDS = ("created_at", "started_at", "finished_at", "lease_expires_at", "retry_at")


def job_to_dict(job: Job) -> dict[str, Any]:
    """Return the whole job as JSON-ready data; the inverse of `job_from_dict`."""
    plain = {entry.name: getattr(job, entry.name) for entry in fields(job)}
    for name in _TIME_FIELDS:
        time = plain[name]
        plain[name] = time.isoformat() if time else None
    return plain | {
        "recipes": [recipe.to_dict(paths=True) for recipe in job.recipes],
        "status": job.status.value,
        "progress": asdict(job.progress) if job.progress else None,
        "outputs": [asdict(output) for output in job.outputs],
        "error": asdict(job.error) if job.error else None,
        "timings": dict(job.timings),
    }


def job_from_dict(plain: Mapping[str, Any]) -> Job:
    """Return the job for data that `job_to_dict` returned.

    Raises:
        RecipeError: a recipe has a format that this version does not support.
    """
    times = {
        name: datetime.fromisoformat(plain[name]) if plain.get(name) else None
        for name in _TIME_FIELDS  # `retry_at` is absent in jobs stored by older versions
    }
    created_at = times.pop("created_at")
    assert created_at is not None
    job = Job(
        id=plain["id"],
        created_at=created_at,
        recipes=tuple(map(Recipe.from_dict, plain["recipes"])),
    )
    return replace(
        job,
        **times,  # type: ignore[arg-type]
        image_format=plain["image_format"],
        image_quality=plain.get("image_quality"),  # absent in jobs stored by older versions
        status=Status(plain["status"]),
        attempts=plain["attempts"],
        epoch=plain["epoch"],
        worker=plain["worker"],
        cancel_requested=plain["cancel_requested"],
        passed_over=plain["passed_over"],
        progress=JobProgress(**plain["progress"]) if plain["progress"] else None,
        outputs=tuple(Output(**output) for output in plain["outputs"]),
        error=Failure(**plain["error"]) if plain["error"] else None,
        timings=plain["timings"],
        notes=tuple(plain.get("notes", ())),  # absent in jobs stored by older versions
        owner=plain.get("owner", ""),  # absent in jobs stored by older versions
        version=plain["version"],
    )
