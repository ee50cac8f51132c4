"""Full-size SDXL on the CPU in bfloat16: diffusers, `exact` and `fast`, without an adapter.

    python -m benchmarks.sdxl [--folder FOLDER] [--size 512]

This is not part of `make bench`, because the model needs 7 GB of disk, and each party as much
memory. The parties run one after the other, each in its own process, in this order and then in
reverse order. Prints one table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks import full_size

STEPS, WHOLE_STEPS, GUIDANCE = 2, 25, 6.0
PARTIES = ("peer", "exact", "fast")

Painted = tuple[list[float], float]
"""Finish times of steps (`perf_counter`), and seconds of decoding."""


def peer(folder: Path) -> Callable[[int, int], Painted]:
    """Return a function that makes an image with diffusers' pipeline, not tuned."""
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(
        folder, torch_dtype=torch.bfloat16, add_watermarker=False
    )
    pipe.set_progress_bar_config(disable=True)

    def paint(size: int, steps: int) -> Painted:
        done: list[float] = []

        def note(_pipe: Any, _step: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            done.append(time.perf_counter())
            return tensors

        generator = torch.Generator().manual_seed(1)
        pipe(
            "a photo",
            width=size,
            height=size,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            generator=generator,
            callback_on_step_end=note,
        )
        return done, time.perf_counter() - done[-1]

    return paint


def ours(folder: Path, fidelity: str) -> Callable[[int, int], Painted]:
    """Return a function that makes an image with an engine, set up as by the command line."""
    from fidelora.cli.console import make_engine
    from fidelora.recipe import Recipe

    engine = make_engine("cpu")

    def paint(size: int, steps: int) -> Painted:
        done: list[float] = []
        recipe = Recipe(
            prompt="a photo",
            model="sdxl",
            base_model=str(folder),
            width=size,
            height=size,
            steps=steps,
            dtype="bfloat16",
            seed=1,
            guidance_scale=GUIDANCE,
            fidelity=fidelity,  # type: ignore[arg-type]  # checked by the recipe
        )
        image = engine.generate(recipe, lambda _: done.append(time.perf_counter()))
        return done, image.seconds["decode"]

    return paint


def measure(party: str, folder: Path, size: int) -> dict[str, float]:
    """Return the seconds of a step and of decoding, and the peak resident bytes.

    The first step is a warm-up.
    """
    import resource

    start = time.perf_counter()
    paint = peer(folder) if party == "peer" else ours(folder, party)
    paint(size, 1)
    first = time.perf_counter() - start
    done, decode = paint(size, STEPS + 1)
    step = (done[-1] - done[0]) / STEPS
    return {
        "first": first,
        "step": step,
        "decode": decode,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=full_size.default_folder(),
        help="folder that keeps models between runs",
    )
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--party", choices=PARTIES, help=argparse.SUPPRESS)
    parser.add_argument("--once", action="store_true", help="measure each party only once")
    options = parser.parse_args()
    base = full_size.sdxl_base(options.folder)
    if options.party:
        print(json.dumps(measure(options.party, base, options.size)))
        return
    found: dict[str, list[dict[str, float]]] = {party: [] for party in PARTIES}
    for party in PARTIES if options.once else (*PARTIES, *reversed(PARTIES)):
        command = [
            sys.executable,
            "-m",
            "benchmarks.sdxl",
            "--party",
            party,
            "--size",
            str(options.size),
        ]
        said = subprocess.run(
            [*command, "--folder", str(options.folder)], check=True, capture_output=True, text=True
        ).stdout
        found[party].append(json.loads(said.splitlines()[-1]))
        print(party, found[party][-1], file=sys.stderr, flush=True)
    medians = {
        party: {name: statistics.median(one[name] for one in said) for name in said[0]}
        for party, said in found.items()
    }
    title = f"{options.size}x{options.size}, bfloat16"
    columns = (
        title,
        "step",
        f"image, {WHOLE_STEPS} steps (composed)",
        "load, and an image of one step",
    )
    print(f"| {' | '.join(columns)} | peak memory |\n|---|---|---|---|---|")
    for party, one in medians.items():
        whole = WHOLE_STEPS * one["step"] + one["decode"]
        beside = {name: medians["peer"][name] / one[name] for name in ("step", "first")}
        of_peer = WHOLE_STEPS * medians["peer"]["step"] + medians["peer"]["decode"]
        print(
            f"| {party} | {one['step']:.2f} s ({beside['step']:.2f} x) "
            f"| {whole:.0f} s ({of_peer / whole:.2f} x) "
            f"| {one['first']:.1f} s ({beside['first']:.2f} x) | {one['peak'] / 1e9:.1f} GB |"
        )


if __name__ == "__main__":
    main()
