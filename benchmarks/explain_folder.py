"""Evaluation of `explain` on a folder of pictures that `explain_pictures` made."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from fidelora import Engine
from fidelora.explain.explain import Explanation, explain
from fidelora.explain.picture import Picture
from fidelora.explain.read_picture import read_picture, with_options
from fidelora.training.run_folder import TrainingRun, read_run

_ALIASES = {"schedule": "sampler", "prompt": "trigger"}
_ALWAYS_POSSIBLE = {"sampler", "upsampling"}


def evaluate_folder(
    folder: Path, run_folder: Path, base_model: str, file: Path | None
) -> list[dict[str, Any]]:
    """Explain each picture of the folder, and return all results.

    Args:
        file: JSON file to which each result is written as soon as it is known; pictures whose
            results it contains are not explained again.
    """
    known = json.loads(file.read_text()) if file is not None and file.exists() else []
    run = read_run(run_folder)
    engine = Engine(device="cpu")
    results = list(known)
    finished = {one["file"] for one in known}
    for entry in json.loads((folder / "pictures.json").read_text()):
        if entry["file"] in finished:
            continue
        start = time.perf_counter()
        found = _explained(folder / entry["file"], run, entry, engine, base_model)
        result = result_of(entry, found)
        result["seconds"] = round(time.perf_counter() - start, 1)
        results.append(result)
        print(json.dumps(result), flush=True)
        if file is not None:
            file.write_text(json.dumps(results, indent=1))
    return results


def _explained(
    path: Path, run: TrainingRun, entry: dict[str, Any], engine: Engine, base_model: str
) -> Explanation:
    content = path.read_bytes()
    reading = with_options(read_picture(content, path.name), entry.get("given", {}))
    if reading.program == "unknown":
        reading = replace(reading, program="diffusers")
    picture = Picture.read(content, path.name)
    return explain(run, picture, reading, engine, index=entry["index"], base_model=base_model)


def result_of(entry: dict[str, Any], found: Explanation) -> dict[str, Any]:
    """Return the result of one picture.

    `truth` are the differences with an effect, and `reported` those that `explain` names. Changed
    settings without an effect may be reported, because they are not wrong. The same applies to the
    sampler, because even the nearest one of these programs is not the trainer's, and to A1111's
    upsampling at sizes that are not multiples of 64.
    """
    truth = set(entry["differences"])
    effects = {_ALIASES.get(one.cause, one.cause): one.effect for one in found.differences}
    named = set(effects)
    possible = truth | set(entry["effects"]) | _ALWAYS_POSSIBLE
    return {
        "file": entry["file"],
        "program": entry["program"],
        "known": entry["program"] != "diffusers" or bool(entry.get("given")),
        "truth": sorted(truth),
        "reported": sorted(named),
        "effects": effects,
        "is_named": truth <= named,
        "is_invented": not named <= possible,
        "before": round(found.before, 3),
        "after": round(found.after, 4),
        "images": found.images,
    }
