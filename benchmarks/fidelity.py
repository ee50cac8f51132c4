"""Difference between `fast` and `exact`, with the miniature: PSNR and largest difference."""

from __future__ import annotations

import itertools
import math
import statistics
from pathlib import Path
from typing import Any

from benchmarks import full_size
from benchmarks.processes import MeasuredProcess
from benchmarks.report import Findings, Row, Settings

import fidelora

ADAPTER = Path(fidelora.__file__).parent / "demo_data" / "sks.safetensors"
SAMPLERS = ("ddpm", "euler_a", "k_dpmsolver++")
SIZE, STEPS, IMAGES = 128, 20, 50
_COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink", "white", "black")
_SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "ring")


def measure(settings: Settings) -> Findings:
    found = Findings()
    images = 2 if settings.quick else IMAGES
    with MeasuredProcess("benchmarks.ours", "fast", str(full_size.base(settings.folder))) as ours:
        for sampler, adapter in itertools.product(SAMPLERS, (None, str(ADAPTER))):
            request: dict[str, Any] = {
                "sampler": sampler,
                "adapter": adapter,
                "size": SIZE,
                "steps": STEPS,
            }
            results = ours.ask("compare", prompts=prompts(images, bool(adapter)), **request)
            name = f"{sampler}, {'with' if adapter else 'no'} adapter"
            found.raw[name] = results
            psnr = [math.inf if one["psnr"] is None else one["psnr"] for one in results]
            figures = f"PSNR {min(psnr):.1f} dB minimum, {statistics.median(psnr):.1f} median"
            levels = f"{max(one['levels'] for one in results)} of 255 levels at most"
            found.rows.append(
                Row(f"fast compared with exact: {name}", "exact", figures, levels, images)
            )
    found.notes.append(
        f"Fast compared with exact: the miniature, {SIZE}x{SIZE}, {STEPS} steps, guidance 6, "
        f"seeds 0 to {images - 1}."
    )
    return found


def prompts(number: int, with_adapter: bool) -> list[str]:
    """Return different prompts; with the adapter, every other one contains the trigger word."""
    pairs = [
        (one, other)
        for shift in range(1, len(_COLOURS))
        for one, other in zip(_COLOURS, _COLOURS[shift:] + _COLOURS[:shift], strict=True)
    ]
    things = itertools.cycle(_SHAPES)
    found = []
    for index, (colour, background) in zip(range(number), pairs, strict=False):
        thing = "sks" if with_adapter and index % 2 else next(things)
        found.append(f"a {colour} {thing} on a {background} background")
    return found
