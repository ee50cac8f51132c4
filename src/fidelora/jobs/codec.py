"""Conversion between jobs and JSON-ready data, for stores that serialize them.

The document of a job holds everything that never changes: it is written once. A result is written
when the job ends. Everything else changes often and is stored in columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from typing import Any

from fidelora.jobs.job import Failure, Job, JobProgress, Output
from fidelora.recipe import Recipe

DOCUMENT_FORMAT = 3
"""Format of the documents that this version writes. It reads this format and all smaller ones.

Increase it if an older version could not read a document or would make another image from it. This
is the case for every new field of a recipe. During a rolling upgrade, older workers then leave new
jobs in the queue for newer workers.
"""


def document_of(job: Job) -> dict[str, Any]:
    """Return the fields of a job that never change; the inverse of `job_of_document`."""
    return {
        "id": job.id,
        "created_at": job.created_at.isoformat(),
        "recipes": [recipe.to_dict(paths=True) for recipe in job.recipes],
        "image_format": job.image_format,
        "image_quality": job.image_quality,
        "notes": job.notes,
        "owner": job.owner,
        "device_kind": job.device_kind,
    }


def job_of_document(plain: Mapping[str, Any]) -> Job:
    """Return the job for data that `document_of` returned, as it was when it was added.

    Documents of older versions have more fields, which are ignored.

    Raises:
        RecipeError: a recipe has a format that this version does not support.
    """
    return Job(
        id=plain["id"],
        created_at=datetime.fromisoformat(plain["created_at"]),
        recipes=tuple(map(Recipe.from_dict, plain["recipes"])),
        image_format=plain["image_format"],
        image_quality=plain.get("image_quality"),  # absent in jobs stored by older versions
        notes=tuple(plain.get("notes", ())),  # absent in jobs stored by older versions
        owner=plain.get("owner", ""),  # absent in jobs stored by older versions
        device_kind=plain.get("device_kind", ""),  # absent in jobs stored by older versions
    )


def result_of(job: Job) -> dict[str, Any] | None:
    """Return the outputs, the error and the timings of a job; None if it has none of them."""
    if not (job.outputs or job.error or job.timings):
        return None
    return {
        "outputs": [asdict(output) for output in job.outputs],
        "error": asdict(job.error) if job.error else None,
        "timings": dict(job.timings),
    }


def fields_of_result(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `Job` for data that `result_of` returned."""
    return {
        "outputs": tuple(Output(**output) for output in plain["outputs"]),
        "error": Failure(**plain["error"]) if plain["error"] else None,
        "timings": plain["timings"],
    }


def progress_to_dict(progress: JobProgress) -> dict[str, Any]:
    """Return the progress without its preview, which is stored separately."""
    plain = asdict(progress)
    del plain["preview"]
    return plain
