"""Calibration of `fidelora verify`: false alarms, and mistakes that are detected.

    python -m benchmarks.verdicts [--runs 40] [--first 0] [--samples 4] [--size 64] [--steps 12]

Simulates training runs of the miniature, with the settings of the trainer's web UI. The samples are
jpg files, computed in bfloat16 on another processor from a LoRA in float32. The LoRA is saved in
bfloat16. Each simulated run has a LoRA of its own.

* False alarms: the samples are made in the same way as the draws (images with random values in
  place of lost information; `training/consistency.py`). Each draw therefore takes the place of the
  samples once, and is judged like samples with right settings.
* Detected mistakes: the samples are made with a setting that differs from the configuration. The
  draws and the tried settings are the same as for the right samples, because they depend only on
  the configuration.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml
from PIL import Image

from fidelora import Engine
from fidelora.recipe import AdapterRef, Recipe
from fidelora.training.compare import reencode
from fidelora.training.consistency import Differences
from fidelora.training.judge import Experiment, Pixels
from fidelora.training.plan import PlannedSample, plan_samples
from fidelora.training.run_folder import read_run

BASE = "fidelora:miniature"
LORA = Path(__file__).parents[1] / "src" / "fidelora" / "demo_data" / "sks.safetensors"
PROMPTS = [
    "a red [trigger] on a blue background",
    "a large yellow [trigger] on white",
    "a green circle on a white background",
    "a black [trigger] on an orange background",
]
LOST_INFORMATION = ("simulated",)


def _with_multiplier(recipe: Recipe, multiplier: float) -> Recipe:
    return replace(recipe, adapters=(replace(recipe.adapters[0], multiplier=multiplier),))


MISTAKES: dict[str, Callable[[Recipe], Recipe]] = {
    "none": lambda recipe: recipe,
    "guidance + 0.5": lambda recipe: replace(recipe, guidance_scale=recipe.guidance_scale + 0.5),
    "guidance - 0.5": lambda recipe: replace(recipe, guidance_scale=recipe.guidance_scale - 0.5),
    "one step more": lambda recipe: replace(recipe, steps=recipe.steps + 1),
    "one step less": lambda recipe: replace(recipe, steps=recipe.steps - 1),
    "multiplier + 0.1": lambda recipe: _with_multiplier(recipe, 1.1),
    "multiplier - 0.1": lambda recipe: _with_multiplier(recipe, 0.9),
    "another sampler": lambda recipe: replace(recipe, sampler="ddim"),
    "another seed": lambda recipe: replace(recipe, seed=recipe.seed + 1000),
    "no negative prompt": lambda recipe: replace(recipe, negative_prompt=""),
    "literal [trigger]": lambda recipe: replace(
        recipe, prompt=recipe.prompt.replace("sks", "[trigger]")
    ),
    "steps_offset 0": lambda recipe: recipe,
}


def main() -> None:
    """Print, after each run, the number of verdicts of each kind so far, by mistake."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--first", type=int, default=0, help="number of the first run")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    engine = Engine(device="cpu")
    counts: dict[str, Counter[str]] = {name: Counter() for name in [*MISTAKES, "each in turn"]}
    for number in range(options.first, options.first + options.runs):
        with tempfile.TemporaryDirectory() as folder:
            for name, verdicts in verdicts_of(Path(folder), engine, number, options).items():
                counts[name].update(verdicts)
        print(json.dumps({name: dict(count) for name, count in counts.items()}), flush=True)


def verdicts_of(
    folder: Path, engine: Engine, number: int, options: argparse.Namespace
) -> dict[str, list[str]]:
    """Return a simulated run's verdicts, by name of the mistake.

    `each in turn` has the verdicts on the draws, which are made with the right settings.
    """
    exact = simulated_run(folder, number, options)
    run = read_run(folder)
    plans = plan_samples(run, 100)
    formats = ["JPEG"] * len(plans)
    replayed = [encoded(engine.generate(plan.recipe).pixels) for plan in plans]
    experiment = Experiment(run, engine, plans, replayed, formats)
    verdicts: dict[str, list[str]] = {}
    genuine: list[Differences] = []
    for name, mistake in MISTAKES.items():
        scheduler_options = {"steps_offset": 0} if name == "steps_offset 0" else {}
        made = trainer_samples(engine, plans, exact, mistake, scheduler_options)
        samples = experiment.differences(made)
        genuine = genuine or samples
        verdicts[name] = [experiment.conclude(samples, LOST_INFORMATION).verdict.value]
    in_turn = []
    for turn in range(len(genuine[0].draws)):
        samples = []
        for sample in genuine:
            draws = list(sample.draws)
            judged, draws[turn] = draws[turn], sample.trainer
            samples.append(Differences(judged, tuple(draws)))
        in_turn.append(experiment.conclude(samples, LOST_INFORMATION).verdict.value)
    return verdicts | {"each in turn": in_turn}


def trainer_samples(
    engine: Engine,
    plans: list[PlannedSample],
    exact: AdapterRef,
    mistake: Callable[[Recipe], Recipe],
    scheduler_options: dict[str, Any],
) -> list[Pixels]:
    """Make samples as the trainer does: weights not rounded to bfloat16, other rounding errors.

    `jitter` simulates the rounding errors of another processor.
    """
    made = []
    for plan in plans:
        recipe = mistake(replace(plan.recipe, adapters=(exact,)))
        image = engine.generate(recipe, scheduler_options=scheduler_options, jitter=1000)
        made.append(encoded(image.pixels))
    return made


def encoded(pixels: Pixels) -> Pixels:
    """Return the pixels as the trainer's jpg file contains them."""
    return reencode(pixels, "JPEG")


def simulated_run(folder: Path, number: int, options: argparse.Namespace) -> AdapterRef:
    """Write a run with weights in bfloat16; return a reference to its exact weights."""
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
    metadata = {"software": json.dumps({"name": "ai-toolkit", "version": "0.12.26"})}
    saved = {
        key: tensor if key.endswith(".alpha") else tensor.to(torch.bfloat16)
        for key, tensor in moved.items()
    }
    safetensors.torch.save_file(saved, folder / "simulated.safetensors", metadata)
    exact = folder / "exact.safetensors"
    safetensors.torch.save_file(moved, exact, metadata)
    return AdapterRef.from_file(exact)


if __name__ == "__main__":
    main()
