"""Read the JSON of Fooocus, NovelAI, SwarmUI and InvokeAI. Does not import torch.

Sources: https://github.com/lllyasviel/Fooocus, `modules/meta_parser.py`;
https://docs.novelai.net; https://github.com/mcmonkeyprojects/SwarmUI,
`docs/Image Metadata Format.md`; https://github.com/invoke-ai/InvokeAI, `CoreMetadata`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fidelora.explain.reading import Reading, UsedLora, UsedModel, stem
from fidelora.images.a1111_prompt import tags_in

FOOOCUS_OWN = (
    "Fooocus changes the guidance by its own rules (sharpness, ADM guidance), which are not "
    "simulated."
)
_NOVELAI_OWN = "The models of NovelAI cannot be downloaded, and it applies no LoRA."


def read_fooocus(settings: Mapping[str, Any]) -> Reading:
    """Return the settings in Fooocus' own JSON."""
    loras = [
        UsedLora(stem(str(one[0])), _float(one[1], 1.0), _float(one[1], 1.0), _hash(one[2:]))
        for one in _list(settings.get("loras"))
        if isinstance(one, list) and len(one) >= 2
    ]
    for key, value in settings.items():
        if key.startswith("lora_combined_") and isinstance(value, str) and " : " in value:
            # `name : strength`, in newer versions after `True : ` or `False : `
            *switch, name, text = value.split(" : ")
            strength = _float(text, 1.0)
            if switch != ["False"] and name != "None":
                loras.append(UsedLora(stem(name), strength, strength))
    unsupported = [FOOOCUS_OWN]
    if _text(settings.get("refiner_model")) not in ("", "None"):
        unsupported.append("The picture was made with a refiner, which is not simulated.")
    width, height = _resolution(settings.get("resolution"))
    # The full prompts include the texts of the styles; long ones are a list of parts.
    prompt = settings.get("full_prompt") or settings.get("prompt")
    negative = settings.get("full_negative_prompt") or settings.get("negative_prompt")
    return Reading(
        program="Fooocus",
        version=_text(settings.get("version")),
        prompt=_joined(prompt),
        negative_prompt=_joined(negative),
        steps=_int(settings.get("steps")),
        guidance_scale=_number(settings.get("guidance_scale")),
        seed=_int(settings.get("seed")),
        width=width,
        height=height,
        sampler=_text(settings.get("sampler")) or None,
        scheduler=_text(settings.get("scheduler")) or None,
        emphasis="original",
        clip_skip=_int(settings.get("clip_skip")),
        noise_source="cpu",
        loras=tuple(loras),
        base_model=UsedModel(
            stem(_text(settings.get("base_model"))), _text(settings.get("base_model_hash"))
        ),
        vae=UsedModel(stem(_text(settings.get("vae")).removeprefix("Default (model)"))),
        unsupported=tuple(unsupported),
    )


_NOVELAI_SAMPLERS = {
    "k_euler": "euler",
    "k_euler_ancestral": "euler_ancestral",
    "k_dpmpp_2m": "dpmpp_2m",
    "k_dpmpp_2s_ancestral": "dpmpp_2s_ancestral",
    "k_dpm_2": "dpm_2",
    "k_dpm_2_ancestral": "dpm_2_ancestral",
    "k_lms": "lms",
}


def read_novelai(comment: Mapping[str, Any], source: str) -> Reading:
    """Return the settings in NovelAI's comment.

    Args:
        source: the text field `Source`, which names the model.
    """
    sampler = _text(comment.get("sampler"))
    return Reading(
        program="NovelAI",
        version=source,
        prompt=_text(comment.get("prompt")),
        negative_prompt=_text(comment.get("uc")),
        steps=_int(comment.get("steps")),
        guidance_scale=_number(comment.get("scale")),
        guidance_rescale=_number(comment.get("cfg_rescale")),
        seed=_int(comment.get("seed")),
        width=_int(comment.get("width")),
        height=_int(comment.get("height")),
        sampler=_NOVELAI_SAMPLERS.get(sampler, sampler) or None,
        scheduler=_text(comment.get("noise_schedule")) or None,
        loras=(),
        base_model=UsedModel(source),
        unsupported=(_NOVELAI_OWN,),
    )


_SWARMUI_FEATURES = {
    "refinermodel": "a refiner", "refinerupscale": "upscaling by the refiner",
    "refinercontrolpercentage": "a refiner", "controlnetmodel": "ControlNet",
    "initimage": "img2img", "initimagecreativity": "img2img", "variationseed": "a variation seed",
    "variationseedstrength": "a variation seed", "seamlesstileable": "tiling",
    "freeuapplyto": "FreeU", "segmentmodel": "a segment",
}  # fmt: skip
"""Name of the feature by SwarmUI's parameter."""
_INVOKEAI_FEATURES = {
    "controlnets": "ControlNet", "ipAdapters": "an IP-Adapter", "t2iAdapters": "a T2I-Adapter",
    "control_layers": "ControlNet", "ref_images": "reference images", "regions": "regional prompts",
    "refiner_model": "a refiner", "hrf_enabled": "hires. fix", "init_image": "img2img",
    "seamless_x": "tiling", "seamless_y": "tiling",
}  # fmt: skip
"""Name of the feature by InvokeAI's key."""


def read_swarmui(settings: Mapping[str, Any], version: str) -> Reading:
    """Return the settings in SwarmUI's JSON. SwarmUI makes pictures with ComfyUI."""
    names, weights, text_weights = (
        _listed(settings.get(key)) for key in ("loras", "loraweights", "loratencweights")
    )
    loras = []
    for index, name in enumerate(names):
        strength = _float(weights[index], 1.0) if index < len(weights) else 1.0
        in_text = _float(text_weights[index], strength) if index < len(text_weights) else strength
        loras.append(UsedLora(stem(str(name)), strength, in_text))
    prompt, tags = tags_in(_text(settings.get("prompt")))
    unsupported = [
        f"<{network}:{rest}> is not simulated." for network, rest in tags if network != "lora"
    ]
    unsupported += _features(_SWARMUI_FEATURES, settings)
    return Reading(
        program="SwarmUI",
        version=version,
        prompt=prompt,
        negative_prompt=_text(settings.get("negativeprompt")),
        steps=_int(settings.get("steps")),
        guidance_scale=_number(settings.get("cfgscale")),
        seed=_int(settings.get("seed")),
        width=_int(settings.get("width")),
        height=_int(settings.get("height")),
        sampler=_text(settings.get("sampler")) or "euler",
        scheduler=_text(settings.get("scheduler")) or "normal",
        emphasis="comfyui",
        clip_skip=abs(_int(settings.get("clipstopatlayer")) or 0) or None,
        noise_source="cpu",
        batch=_int(settings.get("batchsize")),
        loras=tuple(loras),
        base_model=UsedModel(stem(_text(settings.get("model")))),
        vae=UsedModel(stem(_text(settings.get("vae")))),
        unsupported=tuple(unsupported),
    )


def read_invokeai(settings: Mapping[str, Any]) -> Reading:
    """Return the settings in InvokeAI's JSON. InvokeAI samples with the schedulers of diffusers."""
    loras = []
    for entry in _list(settings.get("loras")):
        model = entry.get("model", entry.get("lora")) if isinstance(entry, Mapping) else None
        if isinstance(model, Mapping):
            weight = _float(entry.get("weight"), 1.0)
            name = str(model.get("name", model.get("model_name", "")))
            loras.append(UsedLora(stem(name), weight, weight))
    model, vae = settings.get("model"), settings.get("vae")
    return Reading(
        program="InvokeAI",
        version=_text(settings.get("app_version")),
        prompt=_text(settings.get("positive_prompt")),
        negative_prompt=_text(settings.get("negative_prompt")),
        steps=_int(settings.get("steps")),
        guidance_scale=_number(settings.get("cfg_scale")),
        guidance_rescale=_number(settings.get("cfg_rescale_multiplier")),
        seed=_int(settings.get("seed")),
        width=_int(settings.get("width")),
        height=_int(settings.get("height")),
        sampler=_text(settings.get("scheduler")) or None,
        clip_skip=(_int(settings.get("clip_skip")) or 0) + 1,
        noise_source="gpu" if settings.get("rand_device") in ("cuda", "gpu") else "cpu",
        loras=tuple(loras),
        base_model=UsedModel(_name_of(model)),
        vae=UsedModel(_name_of(vae)),
        unsupported=tuple(_features(_INVOKEAI_FEATURES, settings)),
    )


def _features(names: Mapping[str, str], settings: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each feature that is used; `names` has its name by key."""
    used = dict.fromkeys(name for key, name in names.items() if settings.get(key))
    return [f"The picture was made with {name}, which is not simulated." for name in used]


def _name_of(model: object) -> str:
    if not isinstance(model, Mapping):
        return ""
    return str(model.get("name", model.get("model_name", "")))


def _joined(value: object) -> str:
    parts = value if isinstance(value, list) else [value]
    return ", ".join(part for part in parts if isinstance(part, str) and part)


def _resolution(value: object) -> tuple[int | None, int | None]:
    match = re.search(r"(\d{2,5})\D+(\d{2,5})", str(value))
    return (int(match[1]), int(match[2])) if match else (None, None)


def _hash(rest: list[Any]) -> str:
    return next((one for one in rest if isinstance(one, str)), "")


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _listed(value: object) -> list[Any]:
    if isinstance(value, str):
        return [one.strip() for one in value.split(",") if one.strip()]
    return _list(value)


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _converted(kind: Callable[[Any], Any], value: object) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return kind(value)
    except (ValueError, OverflowError):
        return None


def _int(value: object) -> int | None:
    number = _converted(float, value) if isinstance(value, str) else value
    result: int | None = _converted(int, number)
    return result


def _number(value: object) -> float | None:
    result: float | None = _converted(float, value)
    return result


def _float(value: object, default: float) -> float:
    number = _number(value)
    return default if number is None else number


def objects_of(texts: Mapping[str, str], read: Callable[[str], Any]) -> Iterator[tuple[str, Any]]:
    """Yield the names and values of text fields that are JSON objects."""
    for name, text in texts.items():
        if text.lstrip().startswith("{"):
            try:
                value = read(text)
            except ValueError:
                continue
            if isinstance(value, dict):
                yield name, value
