"""Small implementations of other programs' ways to make an image, for pictures that tests explain.

They are independent of `fidelora.explain`: they use diffusers' and transformers' modules directly,
integer arithmetic for Philox, and torch formulas for samplers.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from diffusers.models.upsampling import Upsample2D
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin
from torch import Tensor, nn
from torch.nn import functional

from fidelora.engine.binding import with_adapters
from fidelora.engine.engine import Engine
from fidelora.engine.inputs import denoiser_settings
from fidelora.recipe import Recipe
from fidelora.training.judge import Pixels


def gpu_randn(seed: int, call: int, count: int) -> Tensor:
    """Return the numbers of the `call`-th `torch.randn` of a CUDA generator, one by one."""
    values = []
    for index in range(count):
        x, key = [call, 0, index, 0], [seed & 0xFFFFFFFF, seed >> 32]
        for _ in range(10):
            a, b = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
            x = [
                (b >> 32) ^ x[1] ^ key[0],
                b & 0xFFFFFFFF,
                (a >> 32) ^ x[3] ^ key[1],
                a & 0xFFFFFFFF,
            ]
            key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
        u, v = (x[0] + 0.5) / 2**32, (x[1] + 0.5) / 2**32
        values.append(math.sqrt(-2 * math.log(u)) * math.sin(2 * math.pi * v))
    return torch.tensor(values, dtype=torch.float32)


@dataclass
class OtherProgram:
    """Makes pictures as ComfyUI or A1111 does, in float32.

    Args:
        whole: True rounds timesteps to whole numbers and scales the noise as ComfyUI does; False
            resizes in the UNet as A1111 does.
        noise: returns the numbers of the n-th draw for a seed and a shape.
    """

    engine: Engine
    recipe: Recipe
    whole: bool
    noise: Callable[[int, int, tuple[int, ...]], Tensor]
    first_step_draw: int = 1

    def picture(
        self,
        *,
        sampler: str,
        schedule: str,
        strength: float = 1.0,
        skip: int = 1,
        **changes: Any,
    ) -> Pixels:
        """Return uint8 pixels [height, width, 3]."""
        values: dict[str, Any] = {
            "dtype": "float32",
            "vae_dtype": "float32",
            "text_encoder_dtype": "float32",
            "history": (),
            "sampler": "euler",
        }
        refs = tuple(
            type(ref)(ref.sha256, strength, ref.name, ref.path, ref.alpha)
            for ref in self.recipe.adapters
        )
        recipe = Recipe(**{**vars(self.recipe), **values, **changes, "adapters": refs})
        guidance, size, _ = denoiser_settings(recipe)
        shape = (1, 4, size.height // 8, size.width // 8)
        with self.engine.model_for(recipe) as (model, bound), with_adapters(model, recipe, bound):
            unet: Any = model.parts["unet"]
            vae: Any = model.parts["vae"]
            text_model: Any = model.text

            def encode(prompt: str) -> Tensor:
                tokenizer = text_model.encoders["text_encoder"].tokenizer
                encoder: Any = model.parts["text_encoder"]
                inner = getattr(encoder, "text_model", encoder)
                ids = tokenizer(
                    prompt, padding="max_length", max_length=77, truncation=True,
                    return_tensors="pt",
                ).input_ids  # fmt: skip
                states = encoder(ids, output_hidden_states=True).hidden_states[-skip]
                return cast(Tensor, inner.final_layer_norm(states))

            context = torch.cat([encode(recipe.negative_prompt), encode(recipe.prompt)])
            betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
            cumulative = np.cumprod(1 - betas)
            table = np.sqrt((1 - cumulative) / cumulative)

            def denoised(x: Tensor, sigma: float) -> Tensor:
                t = float(np.interp(math.log(sigma), np.log(table), np.arange(1000)))
                if self.whole:
                    t = float(np.abs(np.log(table) - math.log(sigma)).argmin())
                scaled = torch.cat([x, x]) / math.sqrt(sigma**2 + 1)
                with nullcontext() if self.whole else resizing_last(unet):
                    negative, positive = unet(scaled, t, context).sample.chunk(2)
                noise = negative + guidance.scale * (positive - negative)
                return cast(Tensor, x - sigma * noise)

            sigmas = levels(table, schedule, recipe.steps)
            x = self.noise(recipe.seed, 0, shape)
            is_largest = self.whole and math.isclose(sigmas[0], table[-1], rel_tol=1e-5)
            x = x * (math.sqrt(1 + sigmas[0] ** 2) if is_largest else sigmas[0])
            draw, previous, last = self.first_step_draw, None, 0.0
            for s, n in pairwise(sigmas):
                d = denoised(x, s)
                if sampler == "euler":
                    x = d + (x - d) * (n / s)
                elif sampler == "euler_ancestral":
                    up = math.sqrt(n**2 * (s**2 - n**2) / s**2)
                    down = math.sqrt(n**2 - up**2)
                    x = d + (x - d) * (down / s)
                    if n:
                        x = x + up * self.noise(recipe.seed, draw, shape)
                        draw += 1
                elif sampler == "dpmpp_2m":
                    estimate = d
                    if previous is not None and n:
                        h, h_last = math.log(s / n), math.log(last / s)
                        estimate = d + (d - previous) * h / (2 * h_last)
                    x = x * (n / s) + estimate * (1 - n / s)
                    previous, last = d, s
                else:
                    raise ValueError(sampler)
            image = vae.decode(x / vae.config.scaling_factor).sample[0]
            values_255 = (image / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy() * 255
            return cast(Pixels, values_255.astype(np.uint8))  # rounds down


@contextmanager
def resizing_last(unet: nn.Module) -> Iterator[None]:
    """Upsample as A1111 does: double the size, convolve, and then resize to the needed size."""

    def forward(module: Any, hidden: Tensor, size: Any = None) -> Tensor:
        result: Tensor = module.conv(hidden.repeat_interleave(2, -1).repeat_interleave(2, -2))
        return result if size is None else functional.interpolate(result, tuple(size))

    modules: list[Any] = [module for module in unet.modules() if isinstance(module, Upsample2D)]
    for module in modules:
        module.forward = partial(forward, module)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def levels(table: NDArray[np.float64], schedule: str, steps: int) -> list[float]:
    """Return sigmas from closed formulas."""
    low, high = table[0], table[-1]
    if schedule == "karras":
        ramp = np.linspace(high ** (1 / 7), low ** (1 / 7), steps)
        return [*(ramp**7).tolist(), 0.0]
    if schedule == "normal":
        timesteps = np.linspace(999, 0, steps)
    elif schedule == "sgm_uniform":
        timesteps = np.linspace(999, 0, steps + 1)[:-1]
    elif schedule == "exponential":
        return [*np.geomspace(high, low, steps).tolist(), 0.0]
    else:
        raise ValueError(schedule)
    return [*np.exp(np.interp(timesteps, np.arange(1000), np.log(table))).tolist(), 0.0]


def cpu_noise(seed: int, draw: int, shape: tuple[int, ...]) -> Tensor:
    """Numbers of one CPU generator; draw 0 is the initial noise."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(draw):
        torch.randn(shape, generator=generator)
    return torch.randn(shape, generator=generator)


def gpu_noise(seed: int, draw: int, shape: tuple[int, ...]) -> Tensor:
    return gpu_randn(seed, draw, math.prod(shape)).view(shape)


def comfyui_noise(seed: int, draw: int, shape: tuple[int, ...]) -> Tensor:
    """Initial noise of the CPU, then numbers of a new generator on the GPU."""
    return cpu_noise(seed, 0, shape) if draw == 0 else gpu_noise(seed, draw - 1, shape)


def png(pixels: Pixels, **texts: str) -> bytes:
    info = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def graph(
    *,
    prompt: str,
    negative: str = "",
    seed: int,
    steps: int,
    cfg: float,
    sampler: str,
    scheduler: str,
    width: int,
    height: int,
    lora: tuple[str, float, float] | None = None,
    skip: int = 1,
) -> str:
    """Return a graph of ComfyUI's standard nodes as JSON."""
    model, clip = ["4", 0], ["4", 1]
    nodes: dict[str, Any] = {
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "mini.safetensors"}},
        "5": {
            "class_type": "EmptyLatentImage",
            "inputs": {"width": width, "height": height, "batch_size": 1},
        },
    }
    if lora is not None:
        name, strength_model, strength_clip = lora
        nodes["10"] = {
            "class_type": "LoraLoader",
            "inputs": {
                "lora_name": name, "strength_model": strength_model, "strength_clip": strength_clip,
                "model": model, "clip": clip,
            },
        }  # fmt: skip
        model, clip = ["10", 0], ["10", 1]
    if skip > 1:
        nodes["11"] = {
            "class_type": "CLIPSetLastLayer",
            "inputs": {"stop_at_clip_layer": -skip, "clip": clip},
        }
        clip = ["11", 0]
    nodes |= {
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": prompt, "clip": clip}},
        "7": {"class_type": "CLIPTextEncode", "inputs": {"text": negative, "clip": clip}},
        "3": {
            "class_type": "KSampler",
            "inputs": {
                "seed": seed, "steps": steps, "cfg": cfg, "sampler_name": sampler,
                "scheduler": scheduler, "denoise": 1.0, "model": model, "positive": ["6", 0],
                "negative": ["7", 0], "latent_image": ["5", 0],
            },
        },
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
        "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0]}},
    }  # fmt: skip
    return json.dumps(nodes)


def infotext(
    *,
    prompt: str,
    negative: str = "",
    seed: int,
    steps: int,
    cfg: float,
    sampler: str,
    scheduler: str,
    width: int,
    height: int,
    lora: str = "",
    **pairs: str,
) -> str:
    """Return A1111's parameters text."""
    lines = [prompt + lora]
    if negative:
        lines.append(f"Negative prompt: {negative}")
    others = "".join(f", {key.replace('_', ' ')}: {value}" for key, value in pairs.items())
    lines.append(
        f"Steps: {steps}, Sampler: {sampler}, Schedule type: {scheduler}, CFG scale: {cfg}, "
        f"Seed: {seed}, Size: {width}x{height}, Model: mini{others}, Version: v1.10.1"
    )
    return "\n".join(lines)
