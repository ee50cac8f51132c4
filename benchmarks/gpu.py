"""`make bench-gpu`: measure everything that depends on a CUDA device; prints one Markdown table.

    python -m benchmarks.gpu [--device cuda] [--quick] [--folder FOLDER] [--out FOLDER]

Parts: the samples of the golden training runs, whose trainer ran on a CPU; seconds per image, per
step and for compiling; several images in one request; a switch of the adapter, compared with a copy
of the same weights on the device; device memory. diffusers with PEFT makes the same images in the
same run, alternately, if PEFT is installed (`pip install --group bench`). `--device cpu --quick`
checks that the command works.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from benchmarks import full_size, report
from benchmarks.processes import ROOT
from benchmarks.report import Findings, Row, shown

from fidelora import AdapterRef, Engine, Recipe
from fidelora.accel.device import resolve_device
from fidelora.errors import DeviceError, FideloraError
from fidelora.training.compare import compare_with_sample
from fidelora.training.plan import plan_samples
from fidelora.training.run_folder import read_run

GOLDENS = ROOT / "tests" / "goldens"
GUIDANCE = 6.0
WAYS = ("exact, float32", "exact, half precision", "fast")
_FAMILY_BASES = {
    "xl": "tiny-sdxl", "zimage": "tiny-zimage", "lumina2": "tiny-lumina2",
    "klein": "tiny-flux2-klein", "qwen": "tiny-qwen-image", "flux": "tiny-flux",
    "chroma": "tiny-chroma", "wan21": "tiny-wan21", "wan22": "tiny-wan22",
}  # fmt: skip


_ON_THE_MINIATURE = ("first_sample", "embed")


@dataclass(frozen=True)
class Run:
    """Settings of a run.

    Attributes:
        device: the measured device.
        folder: keeps the models between runs.
        rounds: repetitions of each figure, of which the median is taken.
        sizes: widths and heights of the images, in pixels.
        steps: sampling steps of each image.
    """

    device: torch.device
    folder: Path
    rounds: int
    sizes: tuple[int, ...]
    steps: int


def main() -> None:
    """Measure all parts and write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, mps or cpu")
    parser.add_argument(
        "--quick", action="store_true", help="few small images, to check the command"
    )
    parser.add_argument("--folder", type=Path, default=full_size.default_folder())
    parser.add_argument("--out", type=Path, default=ROOT / "bench-results" / "gpu")
    options = parser.parse_args()
    device = resolve_device(options.device)
    rounds, sizes, steps = (2, (64,), 2) if options.quick else (5, (512, 1024), 30)
    run = Run(device, options.folder, rounds, sizes, steps)
    parts: dict[str, Callable[[Run], Findings]] = {
        "goldens": goldens, "images": images, "switch": switch,
    }  # fmt: skip
    found = {name: measure(run) for name, measure in parts.items()}
    environment = report.environment() | _device_description(device)
    written = report.write(found, environment, options.out)
    print(report.markdown(found, environment))
    print("\n".join(map(str, written)))


def goldens(run: Run) -> Findings:
    """Compare the golden samples, which a CPU made, with those of this device."""
    found = Findings()
    engine = Engine(device=str(run.device), base_budget_bytes=2**30)
    for folder in sorted((GOLDENS / "jobs").iterdir()):
        if not (folder / "config.yaml").exists():
            continue
        training = read_run(folder)
        if training.training_adapter:
            adapter = GOLDENS / "base" / "tiny-zimage-adapter.safetensors"
            training = training.with_settings(training_adapter=str(adapter))
        if "_pin_before_0_10_25" in folder.name:  # its metadata does not name the old release
            training = training.with_settings(trainer_version=(0, 10, 24))
        family = _FAMILY_BASES.get(folder.name.partition("_")[0], "tiny-sd15")
        base = str(GOLDENS / "base" / family)
        if folder.name.startswith(_ON_THE_MINIATURE):
            base = "fidelora:miniature"
        try:
            compared = [
                compare_with_sample(
                    engine.generate(plan.recipe).all_pixels, plan.trainer_image, plan.recipe.fps
                )
                for plan in plan_samples(training, training.steps, base_model=base)
                if plan.trainer_image is not None and not plan.is_undefined
            ]
        except FideloraError as error:
            found.notes.append(f"{folder.name}: {error}")
            continue
        same = min(one.identical_percent for one in compared)
        most = max(one.max_difference for one in compared)
        found.raw[folder.name] = {"identical_percent": same, "max_difference": most}
        text = f"{same:.2f} % identical, at most {most} levels"
        what = f"golden run {folder.name}, sample with the fewest identical pixels"
        found.rows.append(Row(what, "trainer on a CPU", text, "-", len(compared)))
    return found


def images(run: Run) -> Findings:
    """Measure the seconds of images, steps and compiling, and the memory of the device."""
    found = Findings()
    base, lora = str(full_size.base(run.folder)), full_size.adapter(run.folder)
    with _peer(run, base, lora) as peer:
        for way in WAYS:
            engine = Engine(device=str(run.device))
            for size in run.sizes:
                recipe = _recipe(run, way, base, size, lora)
                try:
                    first, memory = _with_memory(run.device, partial(_seconds, engine, recipe))
                except DeviceError as error:
                    found.notes.append(f"{way}: {error}")
                    break
                ours: list[float] = []
                steps: list[float] = []
                theirs: list[float] = []
                for number in range(run.rounds):
                    seconds = _seconds(engine, replace(recipe, seed=number))
                    ours.append(seconds["total"])
                    steps.append(seconds["denoise"] / run.steps)
                    if peer is not None:
                        theirs.append(peer(size, number))
                what = f"image, {size} x {size}, {run.steps} steps, {way}"
                found.raw[what] = {"first": first, "ours": ours, "peer": theirs, "bytes": memory}
                if theirs:
                    found.add_times(f"{what}; peer: PEFT, not fused, half precision", theirs, ours)
                else:
                    _add(found, what, f"{shown(statistics.median(ours))} s", run.rounds)
                rate = 1 / statistics.median(steps)
                _add(found, f"steps per second, {size} x {size}, {way}", shown(rate), run.rounds)
                extra = first["total"] - statistics.median(ours)
                text = f"{shown(extra)} s"
                _add(found, f"load, compile and first launch, {size} x {size}, {way}", text, 1)
                if memory:
                    text = f"{memory / 1e9:.2f} GB"
                    _add(found, f"most device memory, {size} x {size}, {way}", text, 1)
            if way == "fast" and not found.notes:
                _batch(run, engine, base, lora, found)
    return found


def _batch(run: Run, engine: Engine, base: str, lora: Path, found: Findings) -> None:
    """Compare four images in one batch with four images one after the other."""
    size = run.sizes[0]
    recipes = [replace(_recipe(run, "fast", base, size, lora), seed=number) for number in range(4)]
    together: list[float] = []
    apart: list[float] = []
    for number in range(run.rounds + 1):
        start = time.perf_counter()
        engine.generate_batch(recipes)
        between = time.perf_counter()
        for recipe in recipes:
            engine.generate(recipe)
        if number > 0:  # the first round compiles
            together.append((between - start) / 4)
            apart.append((time.perf_counter() - between) / 4)
    found.raw["batch"] = {"together": together, "apart": apart}
    found.add_times(
        f"each of four images, {size} x {size}, fast; peer: one by one", apart, together
    )


def switch(run: Run) -> Findings:
    """Compare a switch between two adapters with a copy of the UNet's weights on the device."""
    found = Findings()
    base = str(full_size.base(run.folder))
    adapters = [full_size.adapter(run.folder, number) for number in (0, 1)]
    copies = _copy_seconds(run)
    for way in WAYS:
        engine = Engine(device=str(run.device))
        recipes = [replace(_recipe(run, way, base, 64, lora), steps=1) for lora in adapters]
        try:
            for recipe in recipes:  # reads the files
                engine.generate(recipe)
        except DeviceError as error:
            found.notes.append(f"{way}: {error}")
            continue
        seconds = [
            _seconds(engine, recipes[number % 2])["adapters"] for number in range(2 * run.rounds)
        ]
        found.raw[way] = {"switch": seconds, "copy": copies}
        text = f"{statistics.median(seconds) * 1000:.1f} ms"
        copy = statistics.median(copies)
        ratio = f"{statistics.median(seconds) / copy:.2f} times the copy"
        what = f"switch of the adapter, {way}; peer: copy of the UNet's weights in float32"
        found.rows.append(Row(what, f"{copy * 1000:.1f} ms", text, ratio, len(seconds)))
    return found


def _recipe(run: Run, way: str, base: str, size: int, lora: Path) -> Recipe:
    half = "float32" if way == WAYS[0] else _half(run.device)
    dtype: Any = half
    return Recipe(
        prompt="a photo of a ball on grass",
        base_model=base,
        width=size,
        height=size,
        steps=run.steps,
        guidance_scale=GUIDANCE,
        seed=0,
        dtype=dtype,
        fidelity="fast" if way == "fast" else "exact",
        adapters=(AdapterRef.from_file(lora),),
    )


def _half(device: torch.device) -> str:
    from fidelora.accel.device import auto_dtype

    found = auto_dtype(device)
    return "bfloat16" if found == "float32" else found


def _seconds(engine: Engine, recipe: Recipe) -> dict[str, float]:
    """Return the seconds of each part of one image, and `total`."""
    start = time.perf_counter()
    image = engine.generate(recipe)  # ends with pixels in memory, so the device is idle
    return {**image.seconds, "total": time.perf_counter() - start}


def _with_memory(device: torch.device, action: Callable[[], Any]) -> tuple[Any, int]:
    """Return the result of an action and the most device memory allocated in it, in bytes."""
    if device.type != "cuda":
        return action(), 0
    torch.cuda.reset_peak_memory_stats(device)
    result = action()
    return result, torch.cuda.max_memory_allocated(device)


def _copy_seconds(run: Run) -> list[float]:
    """Return the seconds of copies of as many float32 values as the UNet has, on the device."""
    source = torch.zeros(859_520_964, device=run.device)  # parameters of SD 1.5's UNet
    target = torch.empty_like(source)
    seconds = []
    for _ in range(run.rounds + 1):
        _synchronize(run.device)
        start = time.perf_counter()
        target.copy_(source)
        _synchronize(run.device)
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _peer(run: Run, base: str, lora: Path) -> Iterator[Callable[[int, int], float] | None]:
    """Yield a function that returns the seconds of an image of diffusers; None without PEFT."""
    if find_spec("peft") is None:
        yield None
        return
    from diffusers import StableDiffusionPipeline

    pipe: Any = StableDiffusionPipeline.from_pretrained(
        base, torch_dtype=getattr(torch, _half(run.device)), safety_checker=None
    ).to(run.device)
    pipe.load_lora_weights(str(lora))
    pipe.set_progress_bar_config(disable=True)

    def seconds(size: int, seed: int) -> float:
        start = time.perf_counter()
        pipe(
            "a photo of a ball on grass", width=size, height=size, num_inference_steps=run.steps,
            guidance_scale=GUIDANCE, generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
        return time.perf_counter() - start

    seconds(run.sizes[0], 0)
    yield seconds


def _add(found: Findings, what: str, ours: str, rounds: int) -> None:
    found.rows.append(Row(what, "-", ours, "-", rounds))


def _device_description(device: torch.device) -> dict[str, str]:
    if device.type != "cuda":
        return {"device": str(device)}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "device memory": f"{properties.total_memory / 1e9:.0f} GB",
        "compute capability": f"{properties.major}.{properties.minor}",
        "cuda": str(torch.version.cuda),
    }


if __name__ == "__main__":
    main()
