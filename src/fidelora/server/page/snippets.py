"""An image's recipe as something to copy: the request, the command and the Python that make it again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from fidelora.recipe import Recipe


def as_request(recipe: Recipe, names: Sequence[str], image_format: str) -> str:
    """The body of `POST /v1/inference`, which pins the bytes of each LoRA.

    Args:
        names: what the server calls each of the recipe's adapters.
    """
    body = {
        "model": recipe.model,
        "fidelity": recipe.fidelity,
        "output_format": image_format,
        "loras": [
            {"path": name, "network_multiplier": adapter.multiplier, "sha256": adapter.sha256}
            for name, adapter in zip(names, recipe.adapters, strict=True)
        ],
        "prompts": [{"prompt": recipe.prompt, "neg": recipe.negative_prompt, **_settings(recipe)}],
    }
    return json.dumps(body, indent=2, ensure_ascii=False)


def as_command(recipe: Recipe, names: Sequence[str], image_format: str) -> str:
    """The same with `fidelora generate`, for a POSIX shell; LoRAs are named from their folder."""
    words = ["fidelora", "generate", recipe.prompt]
    for name, adapter in zip(names, recipe.adapters, strict=True):
        words += ["--lora", f"{name}:{_decimal(adapter.multiplier)}"]
    options: dict[str, object] = {
        "--negative": recipe.negative_prompt,
        "--width": recipe.width,
        "--height": recipe.height,
        "--steps": recipe.steps,
        "--guidance": _decimal(recipe.guidance_scale),
        "--sampler": recipe.sampler,
        "--seed": recipe.seed,
        "--format": image_format,
        "--model": recipe.model,
        "--base-model": recipe.base_model,
        "--variant": recipe.variant,
        "--vae": recipe.vae,
        "--config": recipe.config,
        "--dtype": recipe.dtype,
        "--vae-dtype": recipe.vae_dtype if recipe.vae_dtype != recipe.dtype else "",
        "--text-encoder-dtype": recipe.text_encoder_dtype
        if recipe.text_encoder_dtype != recipe.dtype
        else "",
        "--noise": recipe.noise,
        "--fidelity": recipe.fidelity,
    }
    words += [f"{option}={value}" for option, value in options.items() if value != ""]
    if recipe.adapter_mode == "live":
        words.append("--live")
    if recipe.prompt.startswith("-"):
        words = [*words[:2], *words[3:], "--", recipe.prompt]
    return shlex.join(words)


def as_python(recipe: Recipe, names: Sequence[str], image_format: str, url: str) -> str:
    """The same through the client."""
    loras = ", ".join(
        f"({name!r}, {adapter.multiplier!r})" for name, adapter in zip(names, recipe.adapters, strict=True)
    )  # fmt: skip
    given = {"neg": recipe.negative_prompt, **_settings(recipe), "model": recipe.model}
    given |= {"fidelity": recipe.fidelity, "output_format": image_format}
    lines = [
        "from fidelora import Client",
        "",
        f"with Client({url!r}) as client:",
        "    result = client.generate(",
        f"        {recipe.prompt!r},",
        f"        [{loras}],",
        *(f"        {name}={value!r}," for name, value in given.items()),
        "    )",
        '    client.save_images(result, "pictures")',
    ]
    return "\n".join(lines)


def _settings(recipe: Recipe) -> dict[str, Any]:
    return {
        "width": recipe.width,
        "height": recipe.height,
        "guidance_scale": recipe.guidance_scale,
        "sample_steps": recipe.steps,
        "sampler": recipe.sampler,
        "seed": recipe.seed,
    }


def _decimal(number: float) -> str:
    """A number as the command line reads it back to the same bits, without an exponent."""
    return format(Decimal(repr(number)), "f").removesuffix(".0")
