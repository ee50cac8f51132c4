"""Read the settings that SwarmUI and InvokeAI store in images as JSON.

Images of other programs are only recognised: ComfyUI stores a graph of nodes, and Fooocus and
NovelAI change prompts before they encode them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fidelora.errors import RecipeError, UnknownSamplerError
from fidelora.families import Family
from fidelora.images.a1111_prompt import NamedLora, describe_brackets, describe_syntax, tags_in
from fidelora.images.a1111_samplers import (
    SamplerChoice,
    from_comfy,
    sampler_of,
)
from fidelora.images.parameter_pairs import Ignored
from fidelora.images.parameters import Parameters
from fidelora.recipe import MAX_MULTIPLIER, MAX_SEED, Recipe
from fidelora.texts import read_json

PARAMETERS_KEY = "parameters"
"""PNG text field of AUTOMATIC1111 and SwarmUI; in JPEG and WebP it is the EXIF field UserComment.
"""

_MAX_CHARACTERS = 2**20
"""Longest JSON that is read; graphs of nodes can be long."""

_Texts = Mapping[str, str]
_LoraEntry = tuple[object, object]
"""Name and multiplier of a LoRA as found in an image, not checked."""

# Fidelora's sampler names by InvokeAI's. InvokeAI uses the schedulers of diffusers, too.
INVOKEAI_SAMPLERS = {
    "euler": "euler",
    "euler_k": "k_euler",
    "euler_a": "euler_a",
    "lms": "lms",
    "lms_k": "k_lms",
    "heun": "heun",
    "kdpm_2": "dpm_2",
    "kdpm_2_a": "dpm_2_a",
    "dpmpp_2m": "dpmsolver++",
    "dpmpp_2m_k": "k_dpmsolver++",
    "ddim": "ddim",
    "ddpm": "ddpm",
    "pndm": "pndm",
    "lcm": "lcm",
}


@dataclass(frozen=True)
class _Program:
    """Layout of the settings that a program stores in an image.

    Attributes:
        settings: returns the settings from an image's texts; None if another program made it.
        fields: recipe fields by the program's keys.
        loras: returns the names and multipliers of the LoRAs.
        sampler: returns Fidelora's sampler and its timestep spacing; raises `UnknownSamplerError`.
        sampler_keys, lora_keys: keys that these two functions read.
        about: keys that do not affect the image.
        has_default_sampler: True if settings without a sampler mean the program's default one.
        weight: the program's own syntax for the weight of a word; None if it is A1111's.
    """

    name: str
    settings: Callable[[_Texts], dict[str, Any] | None]
    fields: Mapping[str, str]
    loras: Callable[[Mapping[str, Any]], Iterable[_LoraEntry]]
    sampler: Callable[[Mapping[str, Any], Family], SamplerChoice]
    sampler_keys: tuple[str, ...]
    lora_keys: frozenset[str]
    about: frozenset[str] = field(default_factory=frozenset)
    has_default_sampler: bool = False
    weight: re.Pattern[str] | None = None


def read_other_program(texts: Mapping[str, str], spec: Family) -> Parameters | None:
    """Return the settings that SwarmUI or InvokeAI stored; None if neither made the image.

    Args:
        texts: text fields of the image by name.
        spec: model family that will make the image.
    """
    for program in (_SWARM, _INVOKE):
        if (settings := program.settings(texts)) is not None:
            return _parameters(program, settings, spec)
    return None


def name_of_program(texts: Mapping[str, str]) -> str:
    """Return the name of the program that made an image, with a remark; "" if it is unknown."""
    if _object(texts.get("prompt")) is not None or _object(texts.get("workflow")) is not None:
        return "ComfyUI, which stores a graph of nodes"
    if texts.get("Software") == "NovelAI" or texts.get("Source", "").startswith("NovelAI"):
        return "NovelAI, whose models cannot be downloaded"
    settings = _object(texts.get(PARAMETERS_KEY))
    keys = {key.lower() for key in settings or ()}
    if "RuinedFooocus" in str((settings or {}).get("software")):
        return "RuinedFooocus, which extends prompts by its styles"
    if "fooocus_scheme" in texts or "performance" in keys:
        return "Fooocus, which extends prompts by its styles"
    if "NovelAI" in str((settings or {}).get("Software")):
        return "NovelAI, whose models cannot be downloaded"
    if "extrametadata" in keys:
        return "the generator of Civitai, which stores a graph of nodes"
    if "sd-metadata" in texts or "Dream" in texts:
        return "an old version of InvokeAI"
    if "invokeai_graph" in texts or "invokeai_workflow" in texts:
        return "a workflow of InvokeAI, which stores a graph of nodes"
    if {"use_stable_diffusion_model", "Stable Diffusion model"} & (texts.keys() | keys):
        return "Easy Diffusion"
    if "NMKDiffusion" in texts:
        return "NMKD Stable Diffusion GUI"
    if "exif:UserComment" in texts.get("XML:com.adobe.xmp", ""):
        return "a program that stores XMP, such as Draw Things"
    return "" if settings is None else "a program that stores unknown JSON"


def _parameters(program: _Program, settings: Mapping[str, Any], spec: Family) -> Parameters:
    values: dict[str, Any] = {}
    ignored: list[Ignored] = []
    for key, value in settings.items():
        if key in program.fields:
            try:
                read = {program.fields[key]: _READ[program.fields[key]](value)}
                Recipe(**{"prompt": "", "model": spec.id, **read})  # raises if it is out of range
                values |= read
            except RecipeError as error:
                ignored.append(_ignored(key, value, str(error)))
            except (TypeError, ValueError, OverflowError):  # OverflowError: a very long integer
                ignored.append(_ignored(key, value, "The value is not valid for this key."))
        elif key == "model" and value:
            ignored.append(
                _ignored(
                    key,
                    value,
                    "The base model is not selected by this name; a different one changes the "
                    "image.",
                )
            )
        elif key not in (*program.sampler_keys, *program.lora_keys, *program.about) and (
            value and value != "None"
        ):
            ignored.append(_ignored(key, value, "The parameter is not supported."))
    if program.has_default_sampler or any(settings.get(key) for key in program.sampler_keys):
        try:
            values |= program.sampler(settings, spec)._asdict()
        except UnknownSamplerError as error:
            text = ", ".join(str(settings.get(key, "")) for key in program.sampler_keys)
            ignored.append(Ignored("sampler", text, str(error)))
    loras = []
    for name, multiplier in program.loras(settings):
        try:
            loras.append(_lora(name, multiplier))
        except (TypeError, ValueError):
            shown = f"{name}: {multiplier}"
            ignored.append(_ignored("loras", shown, "The value is not valid for this key."))
    prompt, tags = tags_in(values.pop("prompt", ""))
    negative = values.pop("negative_prompt", "")
    ignored += [
        Ignored("prompt", f"<{network}:{arguments}>", "The tag is not supported.")
        for network, arguments in tags
        if network != "lora" or arguments.split(":")[0] not in {lora.name for lora in loras}
    ]
    for name, words in (("prompt", prompt), ("negative prompt", negative)):
        if mark := _describe_weight(program, words):
            ignored.append(
                Ignored(
                    name,
                    words[:80],
                    f"{mark} in {program.name}; Fidelora encodes prompts as they are written.",
                )
            )
    text = json.dumps(settings, ensure_ascii=False)
    return Parameters(text, prompt, negative, tuple(loras), values, tuple(ignored))


def _describe_weight(program: _Program, prompt: str) -> str:
    """Return a phrase that describes the first word with a weight, or an empty string."""
    if program.weight and (match := program.weight.search(prompt)):
        return f"{match[0]!r:.80} changes word weights"
    return describe_syntax(prompt) or describe_brackets(prompt)


def _lora(name: object, multiplier: object) -> NamedLora:
    value = float(str(multiplier))
    if not isinstance(name, str) or not name.strip() or not abs(value) <= MAX_MULTIPLIER:
        raise ValueError(name)
    return NamedLora(name.strip().removesuffix(".safetensors"), value)


def _ignored(key: str, value: object, reason: str) -> Ignored:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return Ignored(key, text[:200], reason)


def _object(text: object) -> dict[str, Any] | None:
    """Return the JSON object in a text; None if the text is not a JSON object."""
    if (
        not isinstance(text, str)
        or len(text) > _MAX_CHARACTERS
        or not text.lstrip().startswith("{")
    ):
        return None
    try:
        value = read_json(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


# --- SwarmUI: https://github.com/mcmonkeyprojects/SwarmUI, docs/Image Metadata Format.md ---------


def _swarm_settings(texts: _Texts) -> dict[str, Any] | None:
    settings = (_object(texts.get(PARAMETERS_KEY)) or {}).get("sui_image_params")
    return settings if isinstance(settings, dict) else None


def _swarm_loras(settings: Mapping[str, Any]) -> Iterator[_LoraEntry]:
    names, weights = (_listed(settings.get(key)) for key in ("loras", "loraweights"))
    for index, name in enumerate(names):
        yield name, weights[index] if index < len(weights) else 1.0


def _listed(value: object) -> list[Any]:
    """Return a list; old versions of SwarmUI store lists as text with commas."""
    if isinstance(value, str):
        return [one.strip() for one in value.split(",") if one.strip()]
    return value if isinstance(value, list) else []


def _swarm_sampler(settings: Mapping[str, Any], spec: Family) -> SamplerChoice:
    name, schedule = (str(settings.get(key) or "") for key in ("sampler", "scheduler"))
    return sampler_of(*from_comfy(name or "euler", schedule or "normal"), spec)


_SWARM = _Program(
    name="SwarmUI",
    settings=_swarm_settings,
    fields={
        "prompt": "prompt",
        "negativeprompt": "negative_prompt",
        "seed": "seed",
        "steps": "steps",
        "cfgscale": "guidance_scale",
        "width": "width",
        "height": "height",
    },
    loras=_swarm_loras,
    sampler=_swarm_sampler,
    sampler_keys=("sampler", "scheduler"),
    has_default_sampler=True,  # ComfyUI's sampler euler with its scheduler normal
    lora_keys=frozenset({"loras", "loraweights"}),
    about=frozenset(
        {
            "swarm_version", "date", "generation_time", "aspectratio", "nopreviews", "imageformat",
            "images", "batchsize", "wildcardseed", "used_wildcards", "original_prompt",
            "automaticvae", "donotsave", "personalnote", "resolution", "sidelength",
        }
    ),
)  # fmt: skip


# --- InvokeAI: its `CoreMetadata` ----------------------------------------------------------------


def _invoke_loras(settings: Mapping[str, Any]) -> Iterator[_LoraEntry]:
    for entry in _listed(settings.get("loras")):
        model = entry.get("model", entry.get("lora")) if isinstance(entry, dict) else None
        if isinstance(model, dict):
            yield model.get("name", model.get("model_name")), entry.get("weight", 1.0)


def _invoke_sampler(settings: Mapping[str, Any], spec: Family) -> SamplerChoice:
    name = str(settings["scheduler"])
    return sampler_of(INVOKEAI_SAMPLERS.get(name, name), "", spec, prefers_own=True)


_INVOKE = _Program(
    name="InvokeAI",
    settings=lambda texts: _object(texts.get("invokeai_metadata")),
    fields={
        "positive_prompt": "prompt",
        "negative_prompt": "negative_prompt",
        "seed": "seed",
        "steps": "steps",
        "cfg_scale": "guidance_scale",
        "cfg_rescale_multiplier": "guidance_rescale",
        "width": "width",
        "height": "height",
    },
    loras=_invoke_loras,
    sampler=_invoke_sampler,
    sampler_keys=("scheduler",),
    weight=re.compile(r"\w(\++|--+)(?=[\s,.)]|$)"),
    lora_keys=frozenset({"loras"}),
    about=frozenset(
        {"generation_mode", "app_version", "rand_device", "strength", "canvas_v2_metadata"}
    ),
)  # fmt: skip


# --- values --------------------------------------------------------------------------------------


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TypeError(value)
    return int(value)


def _seed(value: object) -> int:
    if not 0 <= (seed := _whole(value)) <= MAX_SEED:
        raise ValueError(value)
    return seed


def _text(value: object) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TypeError(value)
    return value


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError(value)
    return float(value)


_READ: Mapping[str, Callable[[object], Any]] = {
    "prompt": _text,
    "negative_prompt": _text,
    "seed": _seed,
    "steps": _whole,
    "width": _whole,
    "height": _whole,
    "guidance_scale": _number,
    "guidance_rescale": _number,
}
