"""Explanations as JSON and as text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from fidelora.explain.differences import Difference
from fidelora.explain.explain import Explanation
from fidelora.explain.nearest import NearestThere
from fidelora.recipe import short_name


def document_of(explanation: Explanation) -> dict[str, Any]:
    """Return an explanation as JSON-ready data; see docs/cli.md for the fields."""
    plan, reading = explanation.alignment.plan, explanation.reading
    there = explanation.nearest_there
    return {
        "picture": explanation.picture.name,
        "program": explanation.program,
        "version": reading.version,
        "has_settings": not reading.is_empty,
        "sample": {
            "step": plan.step,
            "index": plan.index,
            "chosen": explanation.alignment.reason,
            "base_model": short_name(plan.recipe.base_model),
        },
        "same": explanation.is_same,
        "explained": explanation.is_explained,
        "distance_before": round(explanation.before, 4),
        "distance_after": round(explanation.after, 4),
        "differences": [
            {
                "cause": one.cause,
                "theirs": one.theirs,
                "ours": one.ours,
                "effect": one.effect,
                "in_file": one.is_in_file,
                "always": one.is_always,
                "advice": one.advice,
            }
            for one in explanation.differences
        ],
        "nearest": asdict(explanation.nearest),
        "nearest_there": _of_there(there),
        "notes": list(explanation.notes),
        "images": explanation.images,
    }


def _of_there(there: NearestThere | None) -> dict[str, object] | None:
    return None if there is None else {"sampling": there.sampling, "distance": there.distance}


def lines_of(explanation: Explanation) -> Iterator[str]:
    """Yield an explanation as lines of text."""
    plan = explanation.alignment.plan
    program = explanation.program
    if program == "unknown":
        program_text = "an unknown program (the file has no settings)"
    elif explanation.reading.program == "unknown":
        start = "no settings in the file" if explanation.reading.is_empty else "another program"
        program_text = f"{start}; nearest to {program}"
    else:
        version = explanation.reading.version
        program_text = f"{program} {version}".strip()
    yield (
        f"{explanation.picture.name}: {program_text}; compared with sample {plan.index} of step "
        f"{plan.round}, because {explanation.alignment.reason}."
    )
    if explanation.is_same:
        yield "It is the trainer's sample, apart from rounding."
    else:
        yield (
            f"The mean difference from the sample is {explanation.before:.2f} levels. With these "
            f"settings, a simulated picture differs by {explanation.after:.2f}:"
        )
    for one in explanation.chosen:
        yield from _lines_of_difference(one)
    if explanation.always:
        yield always_sentence(explanation)
    for one in explanation.always:
        yield from _lines_of_difference(one)
    if not explanation.is_explained:
        yield (
            "These settings do not explain the picture. Another base model, a LoRA of another step "
            "or a setting that is not simulated may be the reason."
        )
    for note in explanation.notes:
        yield f"  Note: {note}"


def always_sentence(explanation: Explanation) -> str:
    """Return the sentence before the differences that the program always causes."""
    has_only_these = explanation.is_explained and not explanation.chosen
    start = "No setting that you can change differs. " if has_only_these else ""
    return f"{start}{explanation.program} always does this differently:"


def _lines_of_difference(difference: Difference) -> Iterator[str]:
    effect = "not measured" if difference.effect is None else f"{difference.effect:.2f} levels"
    yield f"  {difference.cause} ({effect}): {difference.theirs}; in training: {difference.ours}."
    if difference.advice:
        yield f"    {difference.advice}"
