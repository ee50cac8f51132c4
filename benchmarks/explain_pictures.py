"""Pictures of running programs with known differences, for `benchmarks.explain --folder`.

    python -m benchmarks.explain_base FOLDER
    python -m benchmarks.explain_pictures FOLDER OUT --comfyui URL [--a1111 URL] [--pictures 20]

Start the programs on the CPU in float32, with `narrow.safetensors` of FOLDER among their
checkpoints (for A1111 with `narrow.yaml` beside it), and `sks.safetensors` among their LoRAs. Each
program makes its pictures and writes their metadata itself. OUT gets the files and
`pictures.json`, with the settings of each picture and the effects of its differences. A picture
that needs no difference has the sampler that comes nearest to the trainer's.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import random
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
from PIL import Image
from tests.explain.other_programs import graph

from fidelora.explain.simulation import Pixels
from fidelora.training.plan import PlannedSample, plan_samples
from fidelora.training.run_folder import read_run

MIN_EFFECT = 0.3
"""Smallest effect of a difference that has to be named, in levels."""
CHECKPOINT, LORA = "narrow.safetensors", "sks"


@dataclass(frozen=True)
class Settings:
    """Settings of a picture; `lora` is the strength for the model and for the text encoder."""

    prompt: str
    negative: str
    seed: int
    steps: int
    cfg: float
    width: int
    height: int
    lora: tuple[float, float] = (1.0, 1.0)
    clip_skip: int = 1
    sampler: str = ""
    scheduler: str = ""


class ComfyUI:
    """Requests pictures with `POST /prompt`; the graph has ComfyUI's own nodes only."""

    name = "ComfyUI"
    nearest = ("ddim", "ddim_uniform")
    """Sampler and scheduler that make the trainer's sample of `ddim`, apart from rounding."""
    samplers = (("euler", "normal"), ("dpmpp_2m", "karras"), ("euler_ancestral", "normal"))

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")

    def version(self) -> str:
        """Return the version that the program reports."""
        return str(_get_json(f"{self._url}/system_stats")["system"]["comfyui_version"])

    def picture(self, settings: Settings) -> bytes:
        """Return the file that `SaveImage` writes."""
        model, text = settings.lora
        nodes = json.loads(
            graph(
                prompt=settings.prompt, negative=settings.negative, seed=settings.seed,
                steps=settings.steps, cfg=settings.cfg, sampler=settings.sampler,
                scheduler=settings.scheduler, width=settings.width, height=settings.height,
                lora=(f"{LORA}.safetensors", model, text) if (model, text) != (0, 0) else None,
                skip=settings.clip_skip,
            )
        )  # fmt: skip
        nodes["4"]["inputs"]["ckpt_name"] = CHECKPOINT
        nodes["9"]["inputs"]["filename_prefix"] = "fidelora"
        job = _post_json(f"{self._url}/prompt", {"prompt": nodes})["prompt_id"]
        while not (history := _get_json(f"{self._url}/history/{job}")):
            time.sleep(0.05)
        if history[job]["status"]["status_str"] != "success":
            raise RuntimeError(f"ComfyUI could not make a picture: {history[job]['status']}")
        (image,) = history[job]["outputs"]["9"]["images"]
        return _get(f"{self._url}/view?{urlencode(image)}")


class A1111:
    """Requests pictures with `POST /sdapi/v1/txt2img`."""

    name = "A1111"
    nearest = ("Euler", "DDIM")
    samplers = (("Euler", "Uniform"), ("DPM++ 2M", "Karras"), ("Euler a", "Automatic"))

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")

    def version(self) -> str:
        """Return the version that the program writes into its pictures."""
        return str(_get_json(f"{self._url}/sdapi/v1/options").get("version", ""))

    def picture(self, settings: Settings) -> bytes:
        """Return the file with the infotext that the program writes."""
        model, text = settings.lora
        tag = "" if (model, text) == (0, 0) else f" <lora:{LORA}:{text:g}:{model:g}>"
        if model == text != 0:
            tag = f" <lora:{LORA}:{model:g}>"
        answer = _post_json(
            f"{self._url}/sdapi/v1/txt2img",
            {
                "prompt": settings.prompt + tag, "negative_prompt": settings.negative,
                "seed": settings.seed, "steps": settings.steps, "cfg_scale": settings.cfg,
                "width": settings.width, "height": settings.height,
                "sampler_name": settings.sampler, "scheduler": settings.scheduler,
                "override_settings": {
                    "CLIP_stop_at_last_layers": settings.clip_skip,
                    "randn_source": "CPU",
                    # The default divides by the mean of the prompt embeddings, which is 0 for the
                    # weights of `explain_base`: the picture would be black.
                    "emphasis": "None",
                },
            },
        )  # fmt: skip
        return base64.b64decode(answer["images"][0])


Program = ComfyUI | A1111


def changes(draw: random.Random, program: Program, amount: int) -> dict[str, dict[str, Any]]:
    """Return the changed settings of a picture by difference."""
    strength = draw.choice((0.0, 0.5, 0.7))
    sampler, scheduler = draw.choice(program.samplers)
    choices: dict[str, dict[str, Any]] = {
        "guidance": {"cfg": draw.choice((2.0, 8.0, 10.0))},
        "steps": {"steps": draw.choice((8, 20))},
        "lora": {"lora": draw.choice(((strength, strength), (1.0, 0.0)))},
        "seed": {"seed": draw.choice((1, 1234))},
        "trigger": {},  # depends on the sample
        "negative_prompt": {"negative": ""},
        "clip_skip": {"clip_skip": 2},
        "sampler": {"sampler": sampler, "scheduler": scheduler},
    }
    names = draw.sample(sorted(choices), amount)
    return {name: choices[name] for name in names}


def own_settings(planned: PlannedSample, program: Program) -> Settings:
    """Return the settings with which the program comes nearest to the sample."""
    recipe = planned.recipe
    sampler, scheduler = program.nearest
    return Settings(
        recipe.prompt, recipe.negative_prompt, recipe.seed, recipe.steps, recipe.guidance_scale,
        recipe.width, recipe.height, sampler=sampler, scheduler=scheduler,
    )  # fmt: skip


def entries(
    program: Program, plan: list[PlannedSample], count: int, seed: int, out: Path
) -> Iterator[dict[str, Any]]:
    """Make pictures and yield their entries of `pictures.json`."""
    draw = random.Random(f"{program.name} {seed}")
    for number in range(count):
        index = number % len(plan)
        own = own_settings(plan[index], program)
        changed = changes(draw, program, number % 4)
        if "trigger" in changed:
            changed["trigger"] = {"prompt": own.prompt.replace("sks", "it")}
        content = program.picture(_changed(own, changed))
        pixels = _pixels(content)
        effects = {}
        for name in changed:
            rest = {key: value for key, value in changed.items() if key != name}
            without = _pixels(program.picture(_changed(own, rest)))
            effects[name] = round(float(np.abs(without.astype(int) - pixels).mean()), 3)
        file = f"{program.name}_{number:02d}_{'_'.join(sorted(changed)) or 'none'}.png".lower()
        (out / file).write_bytes(content)
        yield {
            "file": file,
            "program": program.name,
            "index": index,
            "settings": asdict(_changed(own, changed)),
            "effects": effects,
            "differences": sorted(name for name in effects if effects[name] >= MIN_EFFECT),
        }


def _changed(own: Settings, changed: dict[str, dict[str, Any]]) -> Settings:
    for values in changed.values():
        own = replace(own, **values)
    return own


def _pixels(content: bytes) -> Pixels:
    pixels: Pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    if pixels.max() == 0:
        raise RuntimeError("A picture is black, because the program's numbers became NaN.")
    return pixels


def _get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=300) as answer:
        return bytes(answer.read())


def _get_json(url: str) -> Any:
    return json.loads(_get(url))


def _post_json(url: str, body: Any) -> Any:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


def main() -> None:
    """Make the pictures of each program whose URL is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--comfyui")
    parser.add_argument("--a1111")
    parser.add_argument("--pictures", type=int, default=20, help="of each program")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    run = read_run(options.folder / "sks")
    plan = list(plan_samples(run, run.steps, base_model=str(options.folder / "base")))
    options.out.mkdir(parents=True, exist_ok=True)
    manifest = options.out / "pictures.json"
    made = json.loads(manifest.read_text()) if manifest.exists() else []
    programs: list[Program] = []
    if options.comfyui:
        programs.append(ComfyUI(options.comfyui))
    if options.a1111:
        programs.append(A1111(options.a1111))
    for program in programs:
        made = [one for one in made if one["program"] != program.name]
        for entry in entries(program, plan, options.pictures, options.seed, options.out):
            made.append(entry)
            print(json.dumps(entry), flush=True)
            manifest.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
