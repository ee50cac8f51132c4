"""Images per hour of a mixed queue: 200 jobs of one image with 50 adapters (Zipf, s = 1).

The baseline processes jobs in order of arrival and loads another adapter (`load_lora_weights`) when
the next job needs it. Fidelora's jobs go through a store and a worker, which chooses the next job
and, in `fast`, batches several jobs. 200 images of normal size take hours, so only small images are
made, within a time limit. The time of 200 images at 256x256 is computed from measured parts.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from benchmarks import full_size
from benchmarks.images import WHOLE_STEPS, image_seconds
from benchmarks.processes import MeasuredProcess, rounds
from benchmarks.report import Findings, Row, Settings

JOBS, ADAPTERS = 200, 50
SIZE, STEPS = 128, 2


def measure(settings: Settings, before: Mapping[str, Findings]) -> Findings:
    """Return the findings of this part.

    Args:
        before: findings of the earlier parts; the composed figures use those of `images`.
    """
    base = str(full_size.base(settings.folder))
    paths = [
        str(full_size.small_adapter(settings.folder, number)) for number in range(ADAPTERS + 1)
    ]
    sequence = order()
    request: dict[str, Any] = {"size": SIZE, "steps": STEPS}
    jobs: dict[str, list[dict[str, float]]] = {way: [] for way in ("peer", "exact", "fast")}
    with (
        MeasuredProcess("benchmarks.peer", base) as peer,
        MeasuredProcess("benchmarks.ours", "exact", base) as exact,
        MeasuredProcess("benchmarks.ours", "fast", base) as fast,
    ):
        ways = {"exact": exact, "fast": fast}
        side_by_side = fast.ask("max_batch", size=SIZE)
        peer.ask("adapter", path=paths[-1])
        peer.ask("image", prompt="warm up", seed=0, **request)
        for process in ways.values():
            process.ask("image", prompt="warm up", seed=0, adapter=paths[-1], **request)
            process.ask("queue", adapters=[paths[number] for number in sequence], **request)
        for index in rounds(20.0 if settings.quick else 110.0, least=3, most=JOBS):
            changing = peer.ask("adapter", path=paths[sequence[index]])["seconds"]
            image = peer.ask("image", prompt=f"a thing, number {index}", seed=index, **request)
            jobs["peer"].append(
                {
                    "seconds": changing + image["total"],
                    "adapters": changing,
                    "changed": changing > 0.001,
                }
            )
            for way, process in ways.items():
                jobs[way] += process.ask("next_jobs")
        size = SIZE if settings.quick else 256  # a size that `images` has measured
        request = {
            "adapters": [paths[number] for number in sequence],
            "size": size,
            "steps": WHOLE_STEPS,
        }
        batches = {way: process.ask("batches", **request) for way, process in ways.items()}
    found = Findings(raw={"order": sequence, "jobs": jobs, "batches of the whole queue": batches})
    changes = {
        "peer": _changes(sequence),
        **{way: _changes([one["adapter"] for one in made]) for way, made in batches.items()},
    }
    _measured(found, jobs)
    _composed(found, size, jobs, batches, changes, before)
    found.notes.append(
        f"Mixed queue: {JOBS} jobs of one image, {ADAPTERS} adapters of rank 8 for attention only; "
        "all jobs are queued at the beginning. In the whole queue, the adapter is switched "
        f"{changes['peer']} times in order of arrival (peer), {changes['exact']} times in the "
        f"worker's order in exact and {changes['fast']} times in fast, which makes its images in "
        f"{len(batches['fast'])} batches of at most "
        f"{max(one['images'] for one in batches['fast'])} (counted with the real store and worker, "
        f"and an engine that makes blank images). At the measured {SIZE}x{SIZE} a batch has up to "
        f"{side_by_side} images."
    )
    return found


def order() -> list[int]:
    """Return the adapter of each job."""
    return random.Random(1).choices(
        range(ADAPTERS), [1 / (index + 1) for index in range(ADAPTERS)], k=JOBS
    )


def _changes(adapters: Sequence[Any]) -> int:
    """Return the number of switches, including the first."""
    return 1 + sum(bool(one != other) for one, other in pairwise(adapters))


def _measured(found: Findings, jobs: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    rates = {
        way: 3600 * len(done) / sum(job["seconds"] for job in done) for way, done in jobs.items()
    }
    for way in ("exact", "fast"):
        what = (
            f"mixed queue, measured: its first {len(jobs[way])} jobs, {SIZE}x{SIZE}, "
            f"{STEPS} steps, {way}"
        )
        _rate_row(found, what, rates["peer"], rates[way], len(jobs["peer"]))


def _composed(
    found: Findings,
    size: int,
    jobs: Mapping[str, Sequence[Mapping[str, float]]],
    batches: Mapping[str, Sequence[Mapping[str, Any]]],
    changes: Mapping[str, int],
    before: Mapping[str, Findings],
) -> None:
    """Compute the time of the queue with 25 steps from measured switches and images."""
    changing = {
        way: statistics.median([job["adapters"] for job in done if job["changed"]])
        for way, done in jobs.items()
    }
    found.raw["seconds of a change"] = changing
    measured = before["images"].raw.get(str(size)) if "images" in before else None
    if measured is None:
        found.notes.append(
            f"The whole queue at {size} is not computed: run the part `images` in the same run."
        )
        return
    image = {
        name: statistics.median(map(image_seconds, results))
        for name, results in measured.items()
        if "decode" in results[0]
    }
    seconds = {way: changes[way] * changing[way] for way in jobs}
    bare = statistics.median(one["step"] for one in measured["peer without adapter"])
    around = statistics.median(image_seconds(one, 0) for one in measured["peer"])
    seconds["peer"] += JOBS * (around + WHOLE_STEPS * bare)
    seconds["exact"] += JOBS * image["exact"]
    # Batches of one and four images were measured; interpolate linearly.
    alone, side_by_side = image["fast"], 4 * image.get("batch", image["fast"])
    seconds["fast"] += sum(
        alone + (one["images"] - 1) / 3 * (side_by_side - alone) for one in batches["fast"]
    )
    for way in ("exact", "fast"):
        what = f"mixed queue, composed: all {JOBS} jobs, {size}x{size}, {WHOLE_STEPS} steps, {way}"
        _rate_row(found, what, 3600 * JOBS / seconds["peer"], 3600 * JOBS / seconds[way], 1)
    found.notes.append(
        "Composed: number of adapter switches x seconds of a switch, measured in this part "
        f"({', '.join(f'{way} {each:.2f} s' for way, each in changing.items())}) + images of 25 "
        "steps as composed above. The peer's steps are those without an adapter, which favours the "
        "peer: its steps with an adapter were measured only with a larger one. Batches of two and "
        "three images are interpolated linearly between one and four images."
    )


def _rate_row(found: Findings, what: str, peer: float, ours: float, rounds: int) -> None:
    found.rows.append(
        Row(
            what,
            f"{peer:.0f} images/hour",
            f"{ours:.0f} images/hour",
            f"{ours / peer:.2f} x as many",
            rounds,
        )
    )
