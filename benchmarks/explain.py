"""Evaluation of `fidelora explain`: how often it names the differences, and invents others.

    python -m benchmarks.explain [--pictures 48] [--seed 0] [--json FILE] [--keep DIR]
    python -m benchmarks.explain --folder DIR --run RUN_DIR --base-model PATH [--json FILE]

The second form explains the pictures in DIR, which `benchmarks.explain_pictures` requested from
running programs; a FILE with results is continued.

The first form needs peft (`pip install --group bench`). It makes pictures of the samples of golden
training runs, most with one to three other settings, some with none:

* with diffusers, the real program, whose pictures do not contain settings. For every second
  picture, the settings that its author can read in the script are given: sampler, steps, guidance,
  seed and prompt.
* with an independent implementation of ComfyUI and A1111 (`tests/explain/other_programs.py`), a
  stand-in for the programs, whose pictures contain their settings. It is not the simulation of
  `src/fidelora/explain`, but follows the same description of the programs.

A difference counts only if it changes the picture by at least `MIN_EFFECT` levels. A picture is
*named* if all its differences are reported, and *invented* if any other is reported.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.explain_folder import evaluate_folder
from diffusers import StableDiffusionPipeline, schedulers
from numpy.typing import NDArray
from tests.explain.other_programs import (
    OtherProgram,
    comfyui_noise,
    cpu_noise,
    gpu_noise,
    graph,
    infotext,
    png,
)
from tests.support import GOLDEN_JOBS, TINY_BASE, copy_base

from fidelora import Engine
from fidelora.explain.explain import explain
from fidelora.explain.picture import Picture
from fidelora.explain.read_picture import read_picture, with_options
from fidelora.families import get_family
from fidelora.training.plan import PlannedSample, plan_samples
from fidelora.training.run_folder import TrainingRun, read_run

MIN_EFFECT = 0.3
"""Smallest effect of a difference that has to be named, in levels."""
_JOBS = ("sampler_ddim", "lora_linear_f32", "sampler_k_dpmsolverpp")
_DIFFERENT_SAMPLERS = {"euler": "EulerDiscreteScheduler", "pndm": "PNDMScheduler"}
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Case:
    """One picture: its program, sample and different settings."""

    program: str
    job: str
    index: int
    differences: tuple[str, ...]
    has_known_settings: bool = True
    values: dict[str, Any] = field(default_factory=dict)


def cases(count: int, seed: int) -> Iterator[Case]:
    """Yield pictures with 0 to 3 differences; half of them from diffusers."""
    draw = random.Random(seed)
    for number in range(count):
        program = ("diffusers", "A1111", "diffusers", "ComfyUI")[number % 4]
        job = draw.choice(_JOBS)
        index = draw.choice((0, 1))
        kinds = ["guidance", "steps", "lora", "seed"]
        if index == 0:
            kinds.append("trigger")
        else:
            kinds.append("negative_prompt")
        kinds.append("sampler" if program == "diffusers" else "clip_skip")
        amount = number // 4 % 4
        chosen = tuple(draw.sample(kinds, amount))
        values = {
            "guidance": draw.choice((2.0, 8.0, 10.0)),
            "steps": draw.choice((15, 20)),
            "lora": draw.choice((0.0, 0.5, 0.7)),
            "clip_skip": 2,
            "seed": draw.choice((1, 1234)),
            "sampler": draw.choice(tuple(_DIFFERENT_SAMPLERS)),
        }
        yield Case(program, job, index, chosen, number // 2 % 2 == 0, values)


class Diffusers:
    """Pictures of diffusers' own pipeline."""

    def __init__(self, folder: Path) -> None:
        self._pipe: Any = StableDiffusionPipeline.from_pretrained(
            copy_base(folder), torch_dtype=torch.float32, safety_checker=None
        )
        self._pipe.set_progress_bar_config(disable=True)
        # With clip_skip, diffusers 0.42 reads an attribute that transformers 5 removed. Not set as
        # a submodule, because the encoder would then contain itself.
        encoder = self._pipe.text_encoder
        if not hasattr(encoder, "text_model"):
            object.__setattr__(encoder, "text_model", encoder)
        self._job = ""

    def picture(self, case: Case, plan: PlannedSample) -> Pixels:
        """Return uint8 pixels [height, width, 3]."""
        recipe, found = plan.recipe, case.differences
        sampler: Any = get_family("sd15").samplers[recipe.sampler]
        name, config = sampler.scheduler, dict(sampler.config)
        if "sampler" in found:
            name = _DIFFERENT_SAMPLERS[case.values["sampler"]]
        self._pipe.scheduler = getattr(schedulers, name).from_config(config)
        if case.job != self._job:
            self._pipe.unload_lora_weights()
            self._pipe.load_lora_weights(str(recipe.adapters[0].path), adapter_name="lora")
            self._job = case.job
        self._pipe.set_adapters(["lora"], [case.values["lora"] if "lora" in found else 1.0])
        # At strength 0, PEFT adds a zero, which changes nothing.
        made = self._pipe(
            prompt=prompt_of(case, plan),
            negative_prompt="" if "negative_prompt" in found else recipe.negative_prompt,
            width=recipe.width,
            height=recipe.height,
            num_inference_steps=case.values["steps"] if "steps" in found else recipe.steps,
            guidance_scale=(
                case.values["guidance"] if "guidance" in found else recipe.guidance_scale
            ),
            # Counts from the usual layer: 1 is what A1111 calls 2.
            clip_skip=case.values["clip_skip"] - 1 if "clip_skip" in found else None,
            generator=torch.Generator("cpu").manual_seed(seed_of(case, plan)),
            output_type="np",
        )
        pixels: Pixels = (made.images[0] * 255).round().astype(np.uint8)
        return pixels


def prompt_of(case: Case, plan: PlannedSample) -> str:
    """Return the prompt, without the trigger word if that is a difference."""
    prompt = plan.recipe.prompt
    return prompt.replace("sks ", "") if "trigger" in case.differences else prompt


def seed_of(case: Case, plan: PlannedSample) -> int:
    """Return the seed of the picture."""
    return int(case.values["seed"]) if "seed" in case.differences else plan.recipe.seed


def stand_in(case: Case, plan: PlannedSample, engine: Engine) -> tuple[Pixels, bytes]:
    """Return the pixels and the file of a picture of ComfyUI's or A1111's stand-in."""
    recipe, found = plan.recipe, case.differences
    is_comfyui = case.program == "ComfyUI"
    noise = comfyui_noise if is_comfyui else cpu_noise
    strength = float(case.values["lora"]) if "lora" in found else 1.0
    skip = 2 if "clip_skip" in found else 1
    settings: dict[str, Any] = {
        "prompt": prompt_of(case, plan),
        "seed": seed_of(case, plan),
        "steps": case.values["steps"] if "steps" in found else recipe.steps,
        "width": recipe.width,
        "height": recipe.height,
    }
    negative = "" if "negative_prompt" in found else recipe.negative_prompt
    guidance = case.values["guidance"] if "guidance" in found else recipe.guidance_scale
    device: dict[str, Any] = {}
    if not is_comfyui and "gpu" in case.values:
        noise = gpu_noise
    elif not is_comfyui:
        device = {"RNG": "CPU"}
    program = OtherProgram(engine, recipe, whole=is_comfyui, noise=noise)
    pixels = program.picture(
        sampler="dpmpp_2m", schedule="karras", strength=strength, skip=skip,
        negative_prompt=negative, guidance_scale=guidance, **settings,
    )  # fmt: skip
    common = {**settings, "negative": negative, "cfg": guidance}
    if is_comfyui:
        lora = (f"{case.job}.safetensors", strength, strength)
        text = graph(**common, sampler="dpmpp_2m", scheduler="karras", lora=lora, skip=skip)
        return pixels, png(pixels, prompt=text)
    clip_skip: dict[str, Any] = {"Clip_skip": "2"} if skip == 2 else {}
    text = infotext(
        **common, sampler="DPM++ 2M", scheduler="Karras",
        lora=f" <lora:{case.job}:{strength:g}>", **device,
        **clip_skip,
    )  # fmt: skip
    return pixels, png(pixels, parameters=text)


def known_settings(case: Case, plan: PlannedSample) -> dict[str, Any]:
    """Return the settings that the author of the picture can read in the script."""
    recipe, found = plan.recipe, case.differences
    if not case.has_known_settings:
        return {}
    return {
        "prompt": prompt_of(case, plan),
        "steps": case.values["steps"] if "steps" in found else recipe.steps,
        "sampler": case.values["sampler"] if "sampler" in found else recipe.sampler,
        "guidance_scale": (
            case.values["guidance"] if "guidance" in found else recipe.guidance_scale
        ),
        "seed": seed_of(case, plan),
    }


def evaluate(case: Case, diffusers: Diffusers, engine: Engine, keep: Path | None) -> dict[str, Any]:
    """Make a picture, explain it, and return the result."""
    run: TrainingRun = read_run(GOLDEN_JOBS / case.job)
    plan = plan_samples(run, 6, base_model=str(TINY_BASE))[case.index]

    def made(one: Case) -> tuple[Pixels, bytes]:
        if one.program == "diffusers":
            pixels = diffusers.picture(one, plan)
            return pixels, png(pixels)
        return stand_in(one, plan, engine)

    pixels, content = made(case)
    truth = set()
    for name in case.differences:
        without, _ = made(
            replace(case, differences=tuple(one for one in case.differences if one != name))
        )
        if np.abs(without.astype(int) - pixels).mean() >= MIN_EFFECT:
            truth.add(name)
    if case.program != "diffusers":
        # Both have other noise levels than diffusers, even with the same sampler.
        own = stand_in(replace(case, differences=()), plan, engine)[0]
        if np.abs(own.astype(int) - engine.generate(plan.recipe).pixels).mean() >= MIN_EFFECT:
            truth.add("sampler")
    reading = read_picture(content, "picture.png")
    options = known_settings(case, plan) if case.program == "diffusers" else {}
    reading = with_options(reading, options)
    if case.program == "diffusers":
        reading = replace(reading, program="diffusers")
    start = time.perf_counter()
    found = explain(
        run, Picture.read(content, "picture.png"), reading, engine, index=case.index,
        base_model=str(TINY_BASE),
    )  # fmt: skip
    seconds = time.perf_counter() - start
    named = {_alias(one.cause) for one in found.differences}
    result = {
        "program": case.program,
        "known": bool(options) or case.program != "diffusers",
        "job": case.job,
        "index": case.index,
        "truth": sorted(truth),
        "reported": sorted(named),
        "is_named": truth <= named,
        "is_invented": not named <= truth | set(case.differences),
        "before": round(found.before, 3),
        "after": round(found.after, 3),
        "images": found.images,
        "seconds": round(seconds, 1),
    }
    if keep is not None:
        name = f"{case.program}_{case.job}_{case.index}_{'_'.join(sorted(truth)) or 'none'}"
        (keep / f"{name.lower()}.png").write_bytes(content)
    return result


def _alias(cause: str) -> str:
    return {"schedule": "sampler", "prompt": "trigger"}.get(cause, cause)


def _evaluate_made(count: int, seed: int, keep: Path | None) -> list[dict[str, Any]]:
    engine = Engine(device="cpu")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        diffusers = Diffusers(Path(folder))
        for case in cases(count, seed):
            result = evaluate(case, diffusers, engine, keep)
            results.append(result)
            print(json.dumps(result), flush=True)
    return results


def _print_shares(results: list[dict[str, Any]]) -> None:
    groups: Counter[tuple[str, bool]] = Counter()
    for one in results:
        key = one["program"], one["known"]
        if groups[key]:
            continue
        same = [each for each in results if (each["program"], each["known"]) == key]
        groups[key] = len(same)
        named = sum(each["is_named"] for each in same)
        invented = sum(each["is_invented"] for each in same)
        kind = "settings known" if one["known"] else "settings searched"
        print(f"{one['program']}, {kind}: {named}/{len(same)} named, {invented} invented")
    count = len(results)
    named = sum(one["is_named"] for one in results)
    invented = sum(one["is_invented"] for one in results)
    print(f"all: {named}/{count} named, {invented}/{count} with an invented difference")


def main() -> None:
    """Evaluate all pictures and print the shares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--folder", type=Path, help="pictures of running programs")
    parser.add_argument("--run", type=Path, help="training run of --folder")
    parser.add_argument("--base-model", type=Path, help="base model of --folder")
    options = parser.parse_args()
    if options.folder and not (options.run and options.base_model):
        parser.error("--folder needs --run and --base-model.")
    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
    if options.folder:
        results = evaluate_folder(
            options.folder, options.run, str(options.base_model), options.json
        )
    else:
        results = _evaluate_made(options.pictures, options.seed, options.keep)
    _print_shares(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
