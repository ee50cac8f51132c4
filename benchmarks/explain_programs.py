"""Programs that make pictures for `benchmarks.explain_pictures`: ComfyUI, A1111 and diffusers."""

from __future__ import annotations

import base64
import json
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import torch
from diffusers import StableDiffusionPipeline, schedulers
from tests.explain.other_programs import graph, png

from fidelora.explain.nearest import Target
from fidelora.families import get_family

CHECKPOINT, LORA = "narrow.safetensors", "sks"


@dataclass(frozen=True)
class Settings:
    """Settings of a picture.

    Attributes:
        lora: strength for the denoiser and for the text encoder.
        clip_skip: layer of the text encoder, from the last one (1).
        sampler, scheduler: in the program's words; for diffusers, the name of a class and a
            spacing of timesteps.
        noise, seed_delta: A1111's settings *Random number generator source* and *Eta noise seed
            delta*.
        dtype: precision; only for diffusers.
    """

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
    noise: str = "CPU"
    seed_delta: int = 0
    dtype: str = "float32"


class ComfyUI:
    """Requests pictures with `POST /prompt`; the graph has ComfyUI's own nodes only."""

    name: Target = "ComfyUI"
    nearest = ("ddim", "ddim_uniform")
    """Sampler and scheduler that make the trainer's sample of `ddim`, apart from rounding."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")

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

    name: Target = "A1111"
    nearest = ("Euler", "DDIM")

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")

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
                    "randn_source": settings.noise,
                    "eta_noise_seed_delta": settings.seed_delta,
                },
            },
        )  # fmt: skip
        return base64.b64decode(answer["images"][0])


class Diffusers:
    """Makes pictures with diffusers' pipeline, as a script does; the files contain no settings."""

    name: Target = "diffusers"
    nearest = ("DDIMScheduler", "")

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pipes: dict[str, Any] = {}

    def picture(self, settings: Settings) -> bytes:
        """Return a PNG file without settings."""
        pipe = self._pipe(settings.dtype)
        config = dict(get_family("sd15").samplers["ddim"].config)
        if settings.scheduler:
            config["timestep_spacing"] = settings.scheduler
        pipe.scheduler = getattr(schedulers, settings.sampler).from_config(config)
        model, text = settings.lora
        pipe.set_adapters(["lora"], [{"unet": model, "text_encoder": text}])
        made = pipe(
            prompt=settings.prompt,
            negative_prompt=settings.negative,
            width=settings.width,
            height=settings.height,
            num_inference_steps=settings.steps,
            guidance_scale=settings.cfg,
            # Counts from the usual layer: 1 is what A1111 calls 2.
            clip_skip=settings.clip_skip - 1 or None,
            generator=torch.Generator("cpu").manual_seed(settings.seed),
            output_type="np",
        )
        return png((made.images[0] * 255).round().astype(np.uint8))

    def _pipe(self, dtype: str) -> Any:
        if dtype not in self._pipes:
            pipe: Any = StableDiffusionPipeline.from_pretrained(
                self._folder / "base", torch_dtype=getattr(torch, dtype), safety_checker=None
            )
            pipe.set_progress_bar_config(disable=True)
            pipe.load_lora_weights(
                str(self._folder / "sks" / "sks.safetensors"), adapter_name="lora"
            )
            # With clip_skip, diffusers 0.42 reads an attribute that transformers 5 removed. Not set
            # as a submodule, because the encoder would then contain itself.
            encoder = pipe.text_encoder
            if not hasattr(encoder, "text_model"):
                object.__setattr__(encoder, "text_model", encoder)
            self._pipes = {dtype: pipe}
        return self._pipes[dtype]


Program = ComfyUI | A1111 | Diffusers


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
