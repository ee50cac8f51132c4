"""Time of a step by kind of operator: diffusers with a PEFT adapter, compared with both fidelities.

Each process profiles an image of one step and one of three steps with `torch.profiler`. Half of
their difference is one step. The profiler measures the main thread, which waits for the other
threads of each operator.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from benchmarks import full_size
from benchmarks.processes import MeasuredProcess, rounds
from benchmarks.report import Findings, Row, Settings, shown

FEW_STEPS, MORE_STEPS = 1, 3

KINDS = {
    "convolutions": ("conv",),
    "attention": ("scaled_dot_product",),
    "matrix products": ("linear", "addmm", "mm", "matmul", "bmm", "mkl_"),
    "softmax": ("softmax",),
    "normalisation": ("norm",),
    "activations": ("silu", "gelu"),
}
"""Names of operators contain one of these words; the first kind that matches is taken."""
PRODUCTS = ("convolutions", "attention", "matrix products", "softmax")
"""Kinds that contain the counted floating-point operations; softmax is a part of attention."""


def measure(settings: Settings) -> Findings:
    folder, lora = str(full_size.base(settings.folder)), str(full_size.adapter(settings.folder))
    found = Findings()
    with ExitStack() as processes:
        asked = {
            name: processes.enter_context(MeasuredProcess(f"benchmarks.{module}", *arguments))
            for name, (module, *arguments) in {
                "peer": ("peer", folder),
                "exact": ("ours", "exact", folder),
                "fast": ("ours", "fast", folder),
            }.items()
        }
        limits = processes.enter_context(MeasuredProcess("benchmarks.limits"))
        for size in (128,) if settings.quick else (256, 512):
            measured: dict[str, list[dict[str, float]]] = {name: [] for name in (*asked, "limits")}
            for _ in rounds(0.0 if settings.quick else 60.0, least=1, most=3):
                measured["limits"].append(limits.ask("measure"))
                for name, process in asked.items():
                    measured[name].append(process.ask("operators", path=lora, size=size))
            found.raw[f"{size}"] = measured
            _rows(found, size, measured, limits.ask("step_flops", size=size), limits)
    found.notes.append(
        "Operators: self time in `torch.profiler`, of the main thread. In `fast`, attention is "
        "computed as matrix products and a softmax. *Products* are convolutions, matrix products "
        "and attention."
    )
    return found


def _rows(
    found: Findings,
    size: int,
    measured: dict[str, list[dict[str, float]]],
    flops: int,
    limits: MeasuredProcess,
) -> None:
    medians = {
        name: {kind: statistics.median(one[kind] for one in results) for kind in results[0]}
        for name, results in measured.items()
    }
    for way in ("exact", "fast"):
        ours, peer = medians[way], medians["peer"]
        for kind in (*KINDS, "other"):
            share = f"{ours[kind] / sum(ours.values()):.0%} of the step"
            figures = (f"{peer[kind] * 1000:.0f} ms", f"{ours[kind] * 1000:.0f} ms", share)
            found.rows.append(
                Row(f"operators of a step at {size}: {way}, {kind}", *figures, len(measured[way]))
            )
        dtype = "float32" if way == "exact" else limits.ask("fast_dtype")
        limit = medians["limits"][dtype]
        reached = flops / sum(ours[kind] for kind in PRODUCTS) / 1e9
        figures = (
            f"{shown(limit)} GFLOP/s",
            f"{shown(reached)} GFLOP/s",
            f"{reached / limit:.0%} of the limit",
        )
        found.rows.append(
            Row(
                f"products of a step at {size}: {way}, compared with a matrix product in {dtype}",
                *figures,
                len(measured[way]),
            )
        )


def step_seconds(make_image: Callable[[int], Any]) -> dict[str, float]:
    """Return the seconds of one step for each kind of operator.

    Args:
        make_image: makes an image with this number of steps.
    """
    make_image(FEW_STEPS)  # the first image includes one-time costs
    few, more = _profile(make_image, FEW_STEPS), _profile(make_image, MORE_STEPS)
    return {kind: (more[kind] - few[kind]) / (MORE_STEPS - FEW_STEPS) for kind in (*KINDS, "other")}


def _profile(make_image: Callable[[int], Any], steps: int) -> Counter[str]:
    import torch

    found: Counter[str] = Counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        make_image(steps)
    for event in profiler.key_averages():
        found[kind_of(event.key)] += event.self_cpu_time_total / 1e6
    return found


def kind_of(operator: str) -> str:
    """Return the kind of an operator by its name, such as `aten::native_group_norm`."""
    name = operator.rpartition("::")[2]
    matching = (kind for kind, words in KINDS.items() if any(word in name for word in words))
    return next(matching, "other")
