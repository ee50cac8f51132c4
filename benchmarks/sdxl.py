"""Full-size SDXL on the CPU in bfloat16: diffusers, `exact` and `fast`, without an adapter.

    python -m benchmarks.sdxl [--folder FOLDER] [--size 512]

This is not part of `make bench`, because the model needs 7 GB of disk, and each
implementation as much memory. They run one after the other, each in its own process, in this order
and then in reverse order. Prints one table.
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
IMPLEMENTATIONS = ("peer", "exact", "fast")

Timings = tuple[list[float], float]
"""Finish times of steps (`perf_counter`), and seconds of decoding."""


def peer(folder: Path) -> Callable[[int, int], Timings]:
    """Return a function that makes an image with diffusers' pipeline, not tuned."""
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(
        folder, torch_dtype=torch.bfloat16, add_watermarker=False
    )
    pipe.set_progress_bar_config(disable=True)

    def generate(size: int, steps: int) -> Timings:
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

    return generate


def ours(folder: Path, fidelity: str) -> Callable[[int, int], Timings]:
    """Return a function that makes an image with an engine as the command line sets it up."""
    from fidelora.cli.console import make_engine
    from fidelora.recipe import Recipe

    engine = make_engine("cpu")

    def generate(size: int, steps: int) -> Timings:
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

    return generate


def measure(implementation: str, folder: Path, size: int) -> dict[str, float]:
    """Return the seconds of a step and of decoding, and the peak resident bytes.

    The first step is a warm-up.
    """
    import resource

    start = time.perf_counter()
    generate = peer(folder) if implementation == "peer" else ours(folder, implementation)
    generate(size, 1)
    first = time.perf_counter() - start
    done, decode = generate(size, STEPS + 1)
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
    parser.add_argument("--implementation", choices=IMPLEMENTATIONS, help=argparse.SUPPRESS)
    parser.add_argument("--once", action="store_true", help="measure each implementation only once")
    options = parser.parse_args()
    base = full_size.sdxl_base(options.folder)
    if options.implementation:
        print(json.dumps(measure(options.implementation, base, options.size)))
        return
    found: dict[str, list[dict[str, float]]] = {
        implementation: [] for implementation in IMPLEMENTATIONS
    }
    for implementation in (
        IMPLEMENTATIONS if options.once else (*IMPLEMENTATIONS, *reversed(IMPLEMENTATIONS))
    ):
        command = [
            sys.executable,
            "-m",
            "benchmarks.sdxl",
            "--implementation",
            implementation,
            "--size",
            str(options.size),
        ]
        output = subprocess.run(
            [*command, "--folder", str(options.folder)], check=True, capture_output=True, text=True
        ).stdout
        found[implementation].append(json.loads(output.splitlines()[-1]))
        print(implementation, found[implementation][-1], file=sys.stderr, flush=True)
    medians = {
        implementation: {
            name: statistics.median(one[name] for one in results) for name in results[0]
        }
        for implementation, results in found.items()
    }
    title = f"{options.size}x{options.size}, bfloat16"
    columns = (
        title,
        "step",
        f"image, {WHOLE_STEPS} steps (composed)",
        "load, and an image of one step",
    )
    print(f"| {' | '.join(columns)} | peak memory |\n|---|---|---|---|---|")
    for implementation, one in medians.items():
        whole = WHOLE_STEPS * one["step"] + one["decode"]
        ratios = {name: medians["peer"][name] / one[name] for name in ("step", "first")}
        peer_whole = WHOLE_STEPS * medians["peer"]["step"] + medians["peer"]["decode"]
        print(
            f"| {implementation} | {one['step']:.2f} s ({ratios['step']:.2f} x) "
            f"| {whole:.0f} s ({peer_whole / whole:.2f} x) "
            f"| {one['first']:.1f} s ({ratios['first']:.2f} x) | {one['peak'] / 1e9:.1f} GB |"
        )


if __name__ == "__main__":
    main()
