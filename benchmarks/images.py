"""Time of a step and of an image: diffusers with a PEFT adapter, compared with `exact` and `fast`.

An image of 25 steps takes minutes at 512x512. Therefore each round makes images of few steps and
measures their parts. The time of an image is the sum text + 25 x step + decode + encode. One whole
image is made to check the sum. The processes stay alive and take turns.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from benchmarks import full_size, sdcpp
from benchmarks.processes import MeasuredProcess, rounds
from benchmarks.report import Findings, Row, Settings, shown

WHOLE_STEPS = 25
STEPS, BATCH = 2, 4

Rounds = dict[str, list[dict[str, float]]]
"""Results of each process, round by round."""


def measure(settings: Settings) -> Findings:
    folder, lora = str(full_size.base(settings.folder)), str(full_size.adapter(settings.folder))
    budgets_s = {128: 20.0} if settings.quick else {256: 170.0, 512: 330.0}
    found = Findings()
    with ExitStack() as processes:
        peer, exact, fast, limits = (
            processes.enter_context(MeasuredProcess(f"benchmarks.{module}", *arguments))
            for module, *arguments in (
                ("peer", folder),
                ("ours", "exact", folder),
                ("ours", "fast", folder),
                ("limits",),
            )
        )
        for size, budget_s in budgets_s.items():
            measured: Rounds = {}
            peer.ask("adapter", path=lora)
            if size == min(budgets_s):  # the first image includes one-time costs
                peer.ask("image", prompt="warm up", seed=0, size=size, steps=1)
                for ours in (exact, fast):
                    ours.ask("image", prompt="warm up", seed=0, adapter=lora, size=size, steps=1)
            batch = min(BATCH, fast.ask("max_batch", size=size))
            for number in rounds(budget_s, least=1 if settings.quick else 2, most=6):
                requests = _requests(peer, exact, fast, limits, lora, number, size, batch)
                for name, ask in requests if number % 2 == 0 else reversed(requests):  # alternate
                    measured.setdefault(name, []).append(ask())
            found.raw[f"{size}"] = measured
            _disk(found, size, measured)
            _rows(found, size, measured, batch)
            _share_of_limit(found, size, measured, limits)
            _memory(found, size, {"peer": peer, "exact": exact, "fast": fast})
        _whole_image(found, settings, fast, lora, min(budgets_s))
        _sdcpp(found, settings, {"exact": exact, "fast": fast}, lora, min(budgets_s))
    found.notes += [
        "Peer, unless noted otherwise: diffusers' StableDiffusionPipeline in float32, an adapter "
        "by PEFT (`load_lora_weights`, not fused), not tuned. Peer and Fidelora use a full-size "
        "base model with random weights, an adapter of rank 32 (convolutions 16), "
        "guidance 6, sampler ddpm.",
        "The time of a step is (end of the last step - end of text encoding) / steps, of images of "
        f"{STEPS} steps. An image of {WHOLE_STEPS} steps is a sum in each round: text + "
        f"{WHOLE_STEPS} x step + decode + PNG. Each image has a new prompt. The negative prompt is "
        "always the same; the peer encodes it for each image, Fidelora caches it.",
    ]
    return found


def _requests(
    peer: MeasuredProcess,
    exact: MeasuredProcess,
    fast: MeasuredProcess,
    limits: MeasuredProcess,
    lora: str,
    number: int,
    size: int,
    batch: int,
) -> list[tuple[str, Callable[[], dict[str, float]]]]:
    """Return the requests of one round, by name."""
    prompt = f"a photo of a thing, number {number}"
    common: dict[str, Any] = {"size": size, "steps": STEPS, "seed": number}

    def ask_peer(adapter: str | None) -> dict[str, float]:
        peer.ask("adapter", path=adapter)
        figures: dict[str, float] = peer.ask(
            "image", prompt=prompt, latents_only=adapter is None, **common
        )
        return figures

    requests: list[tuple[str, Callable[[], dict[str, float]]]] = [
        ("peer without adapter", lambda: ask_peer(None)),
        ("peer", lambda: ask_peer(lora)),
        ("exact", lambda: exact.ask("image", prompt=prompt, adapter=lora, **common)),
        ("fast", lambda: fast.ask("image", prompt=prompt, adapter=lora, **common)),
        ("limits", lambda: limits.ask("measure")),
    ]
    if batch > 1:
        prompts = [f"{prompt} of {index}" for index in range(batch)]
        requests.append(
            ("batch", lambda: fast.ask("batch", prompts=prompts, adapter=lora, **common))
        )
    return requests


def image_seconds(parts: Mapping[str, float], steps: int = WHOLE_STEPS) -> float:
    """Return the seconds of an image with this number of steps, as the sum of its parts."""
    return parts["text"] + steps * parts["step"] + parts["decode"] + parts["encode"]


def _disk(found: Findings, size: int, measured: Rounds) -> None:
    waits = {
        name: sum(int(one.get("disk", 0)) for one in results) for name, results in measured.items()
    }
    if any(waits.values()):
        found.notes.append(
            f"At {size} processes waited for the disk, so the figures are too large. "
            f"Pages read: {waits}."
        )


def _rows(found: Findings, size: int, measured: Rounds, batch: int) -> None:
    steps = {
        name: [one["step"] for one in results]
        for name, results in measured.items()
        if name != "limits"
    }
    for way in ("exact", "fast"):
        found.add_times(f"step at {size}, adapter: {way}", steps["peer"], steps[way])
        found.add_times(
            f"step at {size}: {way} with an adapter, peer without",
            steps["peer without adapter"],
            steps[way],
        )
    images = {
        name: [image_seconds(one) for one in results]
        for name, results in measured.items()
        if "decode" in results[0]
    }
    for way in ("exact", "fast"):
        found.add_times(f"image at {size}, {WHOLE_STEPS} steps: {way}", images["peer"], images[way])
    if batch > 1:
        found.add_times(
            f"image at {size}, {WHOLE_STEPS} steps: fast, {batch} in one request",
            images["peer"],
            images["batch"],
        )
    else:
        found.notes.append(f"At {size} the engine does not batch images (`max_batch` is 1).")


def _share_of_limit(found: Findings, size: int, measured: Rounds, limits: MeasuredProcess) -> None:
    """Add rows that compare the rate of a step with the rate of a matrix product."""
    flops, fast = limits.ask("step_flops", size=size), limits.ask("fast_dtype")
    medians = {
        name: statistics.median(one[name] for one in measured["limits"])
        for name in measured["limits"][0]
    }
    for way, dtype in (("peer", "float32"), ("exact", "float32"), ("fast", fast)):
        reached = flops / statistics.median(one["step"] for one in measured[way]) / 1e9
        figures = (
            f"{shown(medians[dtype])} GFLOP/s",
            f"{shown(reached)} GFLOP/s",
            f"{reached / medians[dtype]:.0%} of the limit",
        )
        found.rows.append(
            Row(
                f"step at {size}: {way}, compared with a matrix product in {dtype}",
                *figures,
                len(measured[way]),
            )
        )
    found.notes.append(
        f"A step at {size} is {flops / 1e9:.0f} GFLOP. The limit is `torch.mm` of 2048x2048, the "
        f"median of the rounds' best; the copy rate of memory was {shown(medians['copy'])} GB/s."
    )


def _memory(found: Findings, size: int, processes: Mapping[str, MeasuredProcess]) -> None:
    peaks = {name: process.ask("memory") for name, process in processes.items()}
    found.raw[f"{size} memory"] = peaks
    for way in ("exact", "fast"):
        peer, ours = peaks["peer"], peaks[way]
        figures = [
            f"{one['peak'] / 1e9:.2f} GB ({one['own'] / 1e9:.2f} without mapped files)"
            for one in (peer, ours)
        ]
        ratio = f"{peer['peak'] / ours['peak']:.2f} x"
        found.rows.append(
            Row(
                f"peak resident memory, images at {size}: {way}",
                figures[0],
                figures[1],
                ratio,
                1,
            )
        )


def _whole_image(
    found: Findings, settings: Settings, fast: MeasuredProcess, lora: str, size: int
) -> None:
    steps = 4 if settings.quick else WHOLE_STEPS
    parts = fast.ask(
        "image", prompt="a photo of the last thing", seed=99, adapter=lora, size=size, steps=steps
    )
    results = found.raw[f"{size}"]["fast"]
    composed = image_seconds(
        {part: statistics.median(one[part] for one in results) for part in results[0]}, steps
    )
    found.raw["whole image"] = {"size": size, "steps": steps, "composed": composed, "real": parts}
    found.notes.append(
        f"One whole image, fast, {size}, {steps} steps: {parts['total']:.2f} s; composed: "
        f"{composed:.2f} s ({composed / parts['total']:.2f} x the measured time)."
    )


def _sdcpp(
    found: Findings, settings: Settings, ours: Mapping[str, MeasuredProcess], lora: str, size: int
) -> None:
    """Measure images of one step of stable-diffusion.cpp, which is too slow for whole images."""
    if not sdcpp.is_installed(settings.sdcpp):
        found.notes.append(
            "stable-diffusion.cpp: not installed. `pip install stable-diffusion-cpp-python` "
            "builds it; `--sdcpp PYTHON` selects the interpreter."
        )
        return
    measured: Rounds = {"theirs": [], **{way: [] for way in ours}}
    folder = str(full_size.with_older_names(settings.folder))
    with MeasuredProcess("benchmarks.sdcpp", folder, python=settings.sdcpp) as theirs:
        for number in rounds(0.0 if settings.quick else 60.0, least=1, most=3):
            request: dict[str, Any] = {
                "prompt": f"a photo of thing {number}",
                "size": size,
                "steps": 1,
                "seed": number,
            }
            measured["theirs"].append(theirs.ask("image", **request))
            for way, process in ours.items():
                measured[way].append(process.ask("image", adapter=lora, **request))
    found.raw["stable-diffusion.cpp"] = measured
    for way in ours:
        peer = "peer stable-diffusion.cpp (float32) without"
        for what, figure in (
            (f"step at {size}", _step),
            (f"image at {size}, {WHOLE_STEPS} steps", image_seconds),
        ):
            theirs_s, ours_s = ([figure(one) for one in measured[name]] for name in ("theirs", way))
            found.add_times(f"{what}: {way} with an adapter, {peer}", theirs_s, ours_s)
    found.notes.append(
        "stable-diffusion.cpp: images of one step; its sampler is euler_a, and its convolutions "
        "are float16."
    )


def _step(parts: Mapping[str, float]) -> float:
    return parts["step"]
