"""Calibration of `fidelora verify`: false alarms, and mistakes that are detected.

    python -m benchmarks.verdicts [--runs 20] [--first 0] [--only MISTAKE] [--samples 4] ...

Simulates training runs with the miniature as the trainer's web UI sets them up: sampled with
float32 weights in bfloat16, saved in bfloat16. Each simulated run has a LoRA of its own. The images
of one run serve for all mistakes: a mistake is a change of the configuration after sampling.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml
from PIL import Image

from fidelora import Engine
from fidelora.training.judge import Verdict
from fidelora.training.plan import plan_samples
from fidelora.training.run_folder import read_run
from fidelora.training.verify import verify

BASE = "fidelora:miniature"
LORA = Path(__file__).parents[1] / "src" / "fidelora" / "demo_data" / "sks.safetensors"
PROMPTS = [
    "a red [trigger] on a blue background",
    "a large yellow [trigger] on white",
    "a green circle on a white background",
    "a black [trigger] on an orange background",
]

MISTAKES: dict[str, Callable[[dict[str, Any]], object]] = {
    "none": lambda process: None,
    "guidance + 0.5": lambda process: process["sample"].update(guidance_scale=6.5),
    "guidance - 0.5": lambda process: process["sample"].update(guidance_scale=5.5),
    "one step more": lambda process: process["sample"].update(
        sample_steps=process["sample"]["sample_steps"] + 1
    ),
    "one step less": lambda process: process["sample"].update(
        sample_steps=process["sample"]["sample_steps"] - 1
    ),
    "multiplier + 0.1": lambda process: process["sample"].update(network_multiplier=1.1),
    "multiplier - 0.1": lambda process: process["sample"].update(network_multiplier=0.9),
    "another sampler": lambda process: process["sample"].update(sampler="ddim"),
    "another seed": lambda process: process["sample"].update(seed=43),
    "negative prompt forgotten": lambda process: process["sample"].update(neg=""),
    "trigger literal": lambda process: process.update(trigger_word=None),
}


def main() -> None:
    """Print the share of runs that are called a mismatch, for each mistake."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--first", type=int, default=0, help="number of the first run")
    parser.add_argument("--only", action="append", help="a mistake; repeatable")
    options = parser.parse_args()
    engine = Engine(device="cpu")
    names = options.only or [*MISTAKES, "steps_offset 0"]
    called: dict[str, Counter[str]] = {name: Counter() for name in names}
    for number in range(options.first, options.first + options.runs):
        with tempfile.TemporaryDirectory() as folder:
            run = simulated_run(Path(folder), engine, number, options)
            for name in names:
                if name == "steps_offset 0":
                    sample(run, engine, {"steps_offset": 0})
                mistake = MISTAKES.get(name, MISTAKES["none"])
                called[name][verdict_of(run, engine, mistake)] += 1
        print(json.dumps({name: dict(counts) for name, counts in called.items()}), flush=True)
    for name, counts in called.items():
        print(f"{name:<28} {counts['mismatch']:>4} of {options.runs} called a mismatch")


def simulated_run(folder: Path, engine: Engine, number: int, options: argparse.Namespace) -> Path:
    """Write a run whose samples were made before its weights were rounded to bfloat16."""
    generator = torch.Generator().manual_seed(number)
    tensors = safetensors.torch.load_file(LORA)
    moved = {
        key: tensor.float()
        if key.endswith(".alpha")
        else tensor.float() * (1 + 0.3 * torch.randn(tensor.shape, generator=generator))
        for key, tensor in tensors.items()
    }
    process = {
        "trigger_word": "sks",
        "model": {"name_or_path": BASE},
        "train": {"dtype": "bf16", "steps": 100},
        "network": {"type": "lora"},
        "sample": {
            "sampler": "ddpm",
            "sample_every": 100,
            "width": options.size,
            "height": options.size,
            "neg": "blurry",
            "seed": 42 + 100 * number,
            "walk_seed": True,
            "guidance_scale": 6,
            "sample_steps": options.steps,
            "format": "jpg",
            "samples": [{"prompt": prompt} for prompt in PROMPTS[: options.samples]],
        },
    }
    document = {"config": {"name": "simulated", "process": [process]}}
    (folder / "samples").mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(document))
    for index in range(options.samples):
        Image.new("RGB", (8, 8)).save(folder / "samples" / f"1__000000100_{index}.jpg")
    path = folder / "simulated.safetensors"
    metadata = {"software": json.dumps({"name": "ai-toolkit", "version": "0.12.26"})}
    safetensors.torch.save_file(moved, path, metadata)
    sample(folder, engine, {})
    saved = {
        key: tensor if key.endswith(".alpha") else tensor.to(torch.bfloat16)
        for key, tensor in moved.items()
    }
    exact = folder / "exact"
    exact.mkdir()
    shutil.move(path, exact / path.name)
    safetensors.torch.save_file(saved, path, metadata)
    return folder


def sample(folder: Path, engine: Engine, scheduler_options: dict[str, Any]) -> None:
    """Make the samples with the exact weights, as the trainer does."""
    exact = folder / "exact" / "simulated.safetensors"
    saved = folder / "simulated.safetensors"
    kept = saved.read_bytes()
    if exact.is_file():
        shutil.copyfile(exact, saved)
    for plan in plan_samples(read_run(folder), 100):
        assert plan.trainer_image is not None
        made = engine.generate(plan.recipe, scheduler_options=scheduler_options, jitter=1000)
        Image.fromarray(made.pixels).save(plan.trainer_image)
    saved.write_bytes(kept)


def verdict_of(folder: Path, engine: Engine, mistake: Callable[[dict[str, Any]], object]) -> str:
    """Return the verdict with a mistake in the configuration."""
    path = folder / "config.yaml"
    original = path.read_text()
    document = yaml.safe_load(original)
    mistake(document["config"]["process"][0])
    path.write_text(yaml.safe_dump(document))
    try:
        samples = verify(read_run(folder), engine, [100])
    finally:
        path.write_text(original)
    worst = max((one.verdict for one in samples), key=list(Verdict).index)
    return worst.value


if __name__ == "__main__":
    main()
