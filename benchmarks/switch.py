"""What does it cost to switch adapters? `python benchmarks/switch.py [--folder FOLDER] [--switches 1000] [--peer]`

A full-size base with random weights (`full_size.py`) and two adapters that each change nearly every weight of its UNet. Everything
is measured in turns in one process that keeps freed memory, as the workers of a server do; medians, as ratios to copying the same
weights once (the least that any way of writing them can take). `--peer` adds the `fuse_lora` of diffusers in its own process.

Prints one JSON object. `growth` is the memory of the process (without files) after all switches minus that after the first ten.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import full_size

from fidelora.engine.allocator import keep_freed_memory

ROUNDS = 12
PEER = """
import json, sys, time
import torch
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.float32)
seconds = []
for _ in range(3):
    start = time.perf_counter()
    pipe.load_lora_weights(sys.argv[2])
    loaded = time.perf_counter()
    pipe.fuse_lora(lora_scale=0.7)
    fused = time.perf_counter()
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    seconds.append([loaded - start, fused - loaded, time.perf_counter() - fused])
print(json.dumps(min(seconds, key=sum)))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=full_size.default_folder(), help="where the model is kept between runs")
    parser.add_argument("--switches", type=int, default=1000)
    parser.add_argument("--peer", action="store_true", help="measure fuse_lora, too; needs peft")
    options = parser.parse_args()
    keep_freed_memory()
    folder, paths = full_size.base(options.folder), [full_size.adapter(options.folder, number) for number in (0, 1)]
    print(json.dumps(measure(folder, paths, options.switches, options.peer), indent=2))


def measure(folder: Path, paths: list[Path], switches: int, with_peer: bool) -> dict[str, Any]:
    import torch

    from fidelora import Recipe
    from fidelora.adapters.formats import read_adapter
    from fidelora.engine.base import BaseKey, load_base

    base = load_base(BaseKey.of(Recipe(prompt="", base_model=str(folder))), torch.device("cpu"))
    first, second = (base.targets.bind(read_adapter(path)) for path in paths)
    touched = [base.targets.by_name[name] for name in first.deltas]

    def copy() -> None:
        for target in touched:
            assert target.pristine is not None
            target.weight.copy_(target.pristine)

    turns: dict[str, Callable[[], object]] = {
        "copy": copy,
        "merge": lambda: base.merged.apply([(first, 1.0)]),
        "scale": lambda: base.merged.apply([(first, 0.7)]),
        "switch": lambda: base.merged.apply([(second, 0.7)]),
        "restore": lambda: base.merged.apply([]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(ROUNDS):
        for name, turn in turns.items():
            start = time.perf_counter()
            turn()
            seconds[name].append(time.perf_counter() - start)
    floor = statistics.median(seconds["copy"])
    result: dict[str, Any] = {
        "weights": len(touched),
        "numbers": sum(target.weight.numel() for target in touched),
        "seconds": {name: round(statistics.median(runs), 3) for name, runs in seconds.items()},
        "times a copy": {name: round(statistics.median(runs) / floor, 2) for name, runs in seconds.items()},
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }
    if with_peer:
        command = [sys.executable, "-c", PEER, str(folder), str(paths[1])]
        load, fuse, undo = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        result["fuse_lora"] = {"load": round(load, 2), "fuse": round(fuse, 2), "undo": round(undo, 2)}
        result["fuse_lora, times a switch"] = round((load + fuse + undo) / statistics.median(seconds["switch"]), 1)
    memory = 0
    for number in range(switches):
        base.merged.apply([((first, second)[number % 2], 0.5 + number % 3 / 4)])
        if number == 9:
            memory = _own_memory()
    weights = sum(weight.nbytes for part in (base.unet, base.text_encoder, base.vae) for weight in part.parameters())
    result["memory in MB"] = {
        "weights": round(weights / 1e6),
        "process": round(_own_memory() / 1e6),
        f"growth in {switches} switches": round((_own_memory() - memory) / 1e6),
    }
    return result


def _own_memory() -> int:
    """Bytes of the process that are not the pages of files."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
