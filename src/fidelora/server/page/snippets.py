"""Snippets that reproduce an image: a request body, a shell command and Python code."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import PurePosixPath
from typing import Any

from fidelora.loras.trigger import has_placeholder
from fidelora.recipe import Recipe, short_name
from fidelora.server.page.form import request_body
from fidelora.texts import printable

_PLACEHOLDER = "BASE"


def request_route(recipe: Recipe) -> str:
    """Return the route for the body from `as_request`.

    `POST /v1/inference` requires a LoRA, as in the `ai-toolkit-inference` API, so an image without
    one is requested with its recipe.
    """
    return "POST /v1/inference" if recipe.adapters else "POST /v1/replay"


def as_request(recipe: Recipe, paths: Sequence[str], image_format: str) -> str:
    """Return the body of a request as indented JSON; `request_route` returns its route.

    Args:
        paths: path of each of the recipe's adapters in API requests.
    """
    body = (
        request_body(recipe, paths, image_format)
        if recipe.adapters
        else {"recipe": recipe.to_dict(), "output_format": image_format}
    )
    return json.dumps(body, indent=2, ensure_ascii=False)


def command_notes(recipe: Recipe, paths: Sequence[str]) -> str:
    """Return comment lines for `as_command`: the files to have in the current folder.

    Args:
        paths: as in `as_command`.
    """
    lines = []
    if _shown_base(recipe) == _PLACEHOLDER:
        name = short_name(recipe.base_model)
        lines.append(f"Replace {_PLACEHOLDER} by the path or hub id of the base model {name}.")
    if paths:
        where = "GET /v1/loras lists them with their sha256"
        lines.append(f"Run it in a folder with {', '.join(map(_file_name, paths))} ({where}).")
    # `printable` keeps line feeds, which would end the comment.
    return "".join(f"# {printable(' '.join(line.splitlines()))}\n" for line in lines)


def _shown_base(recipe: Recipe) -> str:
    """Return a hub id or the name of a bundled model; a placeholder for a path of the server."""
    name = short_name(recipe.base_model)
    return name if name == recipe.base_model and ("/" in name or ":" in name) else _PLACEHOLDER


def _file_name(path: str) -> str:
    return PurePosixPath(path).name


def as_command(recipe: Recipe, paths: Sequence[str], image_format: str) -> str:
    """Return the `fidelora generate` command for a POSIX shell, for a folder with the LoRAs.

    Paths of the server mean nothing to other people: LoRAs have the names of their files, the base
    model is a placeholder (`command_notes`), and the VAE and the configurations have short names.
    """
    words = ["fidelora", "generate", recipe.prompt]
    for path, adapter in zip(paths, recipe.adapters, strict=True):
        words += ["--lora", f"{_file_name(path)}:{_decimal(adapter.multiplier)}"]
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
        "--base-model": _shown_base(recipe),
        "--variant": recipe.variant,
        "--vae": short_name(recipe.vae),
        "--config": short_name(recipe.config),
        "--dtype": recipe.dtype,
        "--vae-dtype": recipe.vae_dtype if recipe.vae_dtype != recipe.dtype else "",
        "--text-encoder-dtype": recipe.text_encoder_dtype
        if recipe.text_encoder_dtype != recipe.dtype
        else "",
        "--noise": recipe.noise,
        "--fidelity": recipe.fidelity,
    }
    words += [f"{option}={value}" for option, value in options.items() if value != ""]
    if recipe.negative_prompt_2 is not None:
        words.append(f"--negative-2={recipe.negative_prompt_2}")
    if has_placeholder(recipe.prompt):
        words.append("--trigger=")  # the placeholder is plain text here
    if recipe.guidance_rescale:
        words.append(f"--guidance-rescale={_decimal(recipe.guidance_rescale)}")
    if recipe.emphasis != "none":
        words.append(f"--emphasis={recipe.emphasis}")
    if recipe.timestep_spacing != "default":
        words.append(f"--spacing={recipe.timestep_spacing}")
    if recipe.eta is not None:
        words.append(f"--eta={_decimal(recipe.eta)}")
    if recipe.vae_tiling:
        words.append("--vae-tiling")
    if recipe.frames > 1:
        words += [f"--frames={recipe.frames}", f"--fps={recipe.fps}"]
    for option, kind in (
        ("--quantize", recipe.quantization),
        ("--quantize-te", recipe.text_encoder_quantization),
    ):
        if kind != "none":
            words.append(f"{option}={kind}")
    words += [f"--training-adapter={one.name}.safetensors" for one in recipe.training_adapters]
    if recipe.adapter_mode == "live" and recipe.quantization == "none":
        words.append("--live")
    if recipe.prompt.startswith("-"):
        words = [*words[:2], *words[3:], "--", recipe.prompt]
    command = shlex.join(words)
    # The argument `-` reads prompts from stdin, so the prompt `-` can only come from there.
    return f"echo - | {command}" if recipe.prompt == "-" else command


def as_python(recipe: Recipe, paths: Sequence[str], image_format: str, url: str) -> str:
    """Return Python code that sends the request with `fidelora.Client` and saves the image."""
    if not recipe.adapters:
        return _replay_in_python(recipe, image_format, url)
    body = request_body(recipe, paths, image_format)
    fields = body["prompts"][0]
    prompt = fields.pop("prompt")
    fields |= {name: body[name] for name in ("model", "fidelity", "output_format")}
    loras = ", ".join(map(_lora_in_python, body["loras"]))
    lines = [
        "from fidelora import Client",
        "",
        f"with Client({url!r}) as client:",
        "    result = client.generate(",
        f"        {prompt!r},",
        f"        [{loras}],",
        *(f"        {name}={value!r}," for name, value in fields.items()),
        "    )",
        '    client.save_images(result, "pictures")',
    ]
    return "\n".join(lines)


def _lora_in_python(lora: Mapping[str, Any]) -> str:
    if "transformer" not in lora:
        return f"({lora['path']!r}, {lora['network_multiplier']!r})"
    return repr({name: lora[name] for name in ("path", "network_multiplier", "transformer")})


def _replay_in_python(recipe: Recipe, image_format: str, url: str) -> str:
    lines = [
        "from fidelora import Client, Recipe",
        "",
        f"recipe = Recipe.from_dict({recipe.to_dict()!r})",
        f"with Client({url!r}) as client:",
        f"    accepted = client.replay(recipe, output_format={image_format!r})",
        '    client.save_images(client.wait(accepted.request_id), "pictures")',
    ]
    return "\n".join(lines)


def _decimal(number: float) -> str:
    """Format a number without an exponent, so that the command line parses the same float."""
    return format(Decimal(repr(number)), "f").removesuffix(".0")
