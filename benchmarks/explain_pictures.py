"""Pictures of running programs with known differences, for `benchmarks.explain --folder`.

    python -m benchmarks.explain_base FOLDER
    python -m benchmarks.explain_pictures FOLDER OUT [--comfyui URL] [--a1111 URL] [--diffusers]

Start the programs on the CPU in float32, with `narrow.safetensors` of FOLDER among their
checkpoints (for A1111 with `narrow.yaml` beside it), and `sks.safetensors` among their LoRAs. Each
program makes its pictures and writes their metadata itself. `--diffusers` needs peft (`pip install
--group bench`). OUT gets the files and `pictures.json`, with the settings of each picture and the
effects of its differences; pictures that it contains are not made again. Unless a case changes the
sampler, the program uses the one of its samplers that comes nearest to the trainer's.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks import explain_cases
from benchmarks.explain_cases import Case, Changes
from benchmarks.explain_programs import A1111, ComfyUI, Diffusers, Program, Settings
from PIL import Image

from fidelora import Engine
from fidelora.explain.nearest import written_prompt
from fidelora.explain.simulation import Pixels, Simulator
from fidelora.training.plan import PlannedSample, plan_samples
from fidelora.training.run_folder import read_run

MIN_EFFECT = 0.3
"""Smallest effect of a difference that has to be named, in levels."""


def own_settings(planned: PlannedSample, program: Program, simulator: Simulator) -> Settings:
    """Return the settings with which the program comes nearest to the sample."""
    recipe = planned.recipe
    sampler, scheduler = program.nearest
    prompt = recipe.prompt
    if not isinstance(program, Diffusers):
        prompt = written_prompt(program.name, simulator.fitting_prompt(prompt))
    return Settings(
        prompt, recipe.negative_prompt, recipe.seed, recipe.steps, recipe.guidance_scale,
        recipe.width, recipe.height, sampler=sampler, scheduler=scheduler,
    )  # fmt: skip


def changes_of(case: Case, own: Settings, planned: PlannedSample) -> dict[str, Changes]:
    """Return the changed settings by cause, with those that depend on the sample."""
    changes = dict(case.changes)
    if "emphasis" in changes:
        changes["emphasis"] = {"prompt": planned.recipe.prompt}
    if "trigger" in changes:
        changes["trigger"] = explain_cases.trigger(own)
    return changes


def entry_of(
    program: Program, case: Case, own: Settings, changes: dict[str, Changes], path: Path
) -> dict[str, Any]:
    """Make a picture and return its entry of `pictures.json`."""
    settings = _changed(own, changes)
    content = program.picture(settings)
    pixels = _pixels(content)
    effects: dict[str, float | None] = {}
    for name in changes:
        rest = {key: value for key, value in changes.items() if key != name}
        without = _pixels(program.picture(_changed(own, rest)))
        effects[name] = None
        if without.shape == pixels.shape:
            effects[name] = round(float(np.abs(without.astype(int) - pixels).mean()), 3)
    path.write_bytes(content)
    return {
        "file": path.name,
        "program": program.name,
        "index": case.index,
        "settings": asdict(settings),
        "given": _given(settings) if case.is_known else {},
        "effects": effects,
        "differences": sorted(
            name for name, one in effects.items() if one is None or one >= MIN_EFFECT
        ),
    }


def _given(settings: Settings) -> dict[str, Any]:
    """Return the settings that the author of a script can read in it."""
    return {
        "prompt": settings.prompt,
        "steps": settings.steps,
        "sampler": _SAMPLERS[settings.sampler],
        "guidance_scale": settings.cfg,
        "seed": settings.seed,
    }


_SAMPLERS = {
    "DDIMScheduler": "ddim",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_a",
    "DPMSolverMultistepScheduler": "dpmsolver++",
}
"""Fidelora's name by class of diffusers."""


def _changed(own: Settings, changes: dict[str, Changes]) -> Settings:
    for values in changes.values():
        own = replace(own, **values)
    return own


def _pixels(content: bytes) -> Pixels:
    pixels: Pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    if pixels.max() == 0:
        raise RuntimeError("A picture is black, because the program's numbers became NaN.")
    return pixels


def _programs(options: argparse.Namespace) -> Iterator[tuple[Program, tuple[Case, ...]]]:
    if options.comfyui:
        yield ComfyUI(options.comfyui), explain_cases.COMFYUI
    if options.a1111:
        yield A1111(options.a1111), explain_cases.A1111
    if options.diffusers:
        yield Diffusers(options.folder), explain_cases.DIFFUSERS


def main() -> None:
    """Make the pictures of each program that is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--comfyui")
    parser.add_argument("--a1111")
    parser.add_argument("--diffusers", action="store_true")
    options = parser.parse_args()
    run = read_run(options.folder / "sks")
    plan = list(plan_samples(run, run.steps, base_model=str(options.folder / "base")))
    simulator = Simulator(Engine(device="cpu"), plan[0].recipe)
    options.out.mkdir(parents=True, exist_ok=True)
    manifest = options.out / "pictures.json"
    made = json.loads(manifest.read_text()) if manifest.exists() else []
    for program, cases in _programs(options):
        for number, case in enumerate(cases):
            file = f"{program.name}_{number:02d}_{'_'.join(sorted(case.changes)) or 'none'}.png"
            if any(one["file"] == file.lower() for one in made):
                continue
            planned = plan[case.index]
            own = own_settings(planned, program, simulator)
            changes = changes_of(case, own, planned)
            entry = entry_of(program, case, own, changes, options.out / file.lower())
            made.append(entry)
            print(json.dumps(entry), flush=True)
            manifest.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
