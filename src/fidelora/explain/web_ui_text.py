"""Read the parameters text of AUTOMATIC1111's web UI, Forge and SD.Next. Does not import torch.

Sources: https://github.com/AUTOMATIC1111/stable-diffusion-webui, `modules/processing.py`
(`create_infotext`) and `modules/infotext_utils.py`;
https://github.com/lllyasviel/stable-diffusion-webui-forge;
https://github.com/vladmandic/sdnext, `modules/processing_info.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from fidelora.explain.json_programs import FOOOCUS_OWN
from fidelora.explain.reading import Program, Reading, UsedLora, UsedModel, stem
from fidelora.images.a1111_prompt import EMPHASIS, tags_in
from fidelora.images.parameters import TextParts, hashes_of_loras, split_parameters

_FORGE_VERSION = re.compile(r"f\d|neo|forge", re.IGNORECASE)
_UNSUPPORTED = {
    "Hires upscale": "hires. fix",
    "Hires upscaler": "hires. fix",
    "Denoising strength": "img2img or hires. fix",
    "Variation seed": "a variation seed",
    "Refiner": "a refiner",
    "Tiling": "tiling",
    "Token merging ratio": "token merging",
    "Mask blur": "inpainting",
    "Face restoration": "face restoration",
    "FreeU Enabled": "FreeU",
    "ADetailer model": "ADetailer",
    "Dynamic thresholding enabled": "dynamic thresholding",
    "NGMS": "negative guidance minimum sigma",
    "SGM noise multiplier": "the SGM noise multiplier",
    "Pad conds": "padded conditioning",
    "Skip Early CFG": "guidance that starts late",
    "Init image hash": "img2img",
    "Beta schedule alpha": "another beta schedule",
    "Script": "a script, such as a grid of several pictures",
    "RP Active": "prompts for regions",
    "Tiled Diffusion": "tiled diffusion",
    "Tiled VAE": "a tiled VAE",
    "Hypertile U-Net": "HyperTile",
    "kohya_hrfix_enabled": "Kohya's deep shrink",
    "Soft inpainting enabled": "soft inpainting",
    "freeu_enabled": "FreeU",
    "sag_enabled": "self-attention guidance",
    "pag_enabled": "perturbed-attention guidance",
    "dynthres_enabled": "dynamic thresholding",
    "layerdiffusion_enabled": "layer diffusion",
    "AnimateDiff": "AnimateDiff",
    "Seed resize from": "a resized seed",
    "Detailer": "a detailer",
    "Refine": "a refiner or hires. fix",
    "Postprocess upscale by": "upscaling after sampling",
    "Postprocess upscaler": "upscaling after sampling",
}
"""Name of the feature by key, for keys whose features are not simulated."""
_ZERO_SNR = "Zero Terminal SNR"
_OTHERS: Mapping[str, Callable[[Mapping[str, str]], bool]] = {
    "stable-diffusion.cpp": lambda pairs: "stable-diffusion.cpp" in pairs.get("Version", ""),
    "Draw Things": lambda pairs: "Seed Mode" in pairs,
    "the generator of Civitai": lambda pairs: "Created Date" in pairs,
}
"""Condition by name, for programs that write A1111's text and are not simulated."""
_LORA_TYPES = ("lora", "lycoris", "locon", "dora")
_ANY_NOISE = ("SD.Next", "unknown")
"""Programs whose texts do not contain where the noise was drawn, and the default clip skip."""
_SOURCES = {"CPU": "cpu", "GPU": "gpu", "NV": "gpu"}
"""Device by A1111's source of noise. `NV` computes the numbers of an NVIDIA GPU on the CPU."""


def read_web_ui_text(text: str, *, program: Program | None = None) -> Reading:
    """Return the settings in a parameters text. Accepts any text, and raises no errors.

    Args:
        program: program that made the picture; None to recognise it by the text.
    """
    parts = split_parameters(text)
    pairs = parts.pairs
    program = program or _program(pairs)
    prompt, tags = tags_in(parts.prompt)
    hashes = hashes_of_loras(pairs.get("Lora hashes", ""), parts.objects)
    loras = []
    unsupported = [
        f"The picture was made with {feature}, which is not simulated."
        for feature in dict.fromkeys(
            feature for key, feature in _UNSUPPORTED.items() if key in pairs
        )
    ]
    if any(key.startswith("ControlNet") for key in pairs):
        unsupported.append("The picture was made with ControlNet, which is not simulated.")
    for network, arguments in tags:
        if network in ("lora", "lyco"):
            loras.append(_lora(arguments, hashes))
        else:
            unsupported.append(f"<{network}:{arguments}> is not simulated.")
    if pairs.get("Noise Schedule") == _ZERO_SNR:
        unsupported.append(f"The noise schedule {_ZERO_SNR} is not simulated.")
    if program == "unknown":
        name = next(name for name, made_it in _OTHERS.items() if made_it(pairs))
        unsupported.append(f"The picture was made with {name}, which is not simulated.")
    loras += _resources(parts.objects.get("Civitai resources"))
    width, height = _size(pairs.get("Size", ""))
    if program == "Fooocus":
        return _fooocus(pairs, parts, width, height, unsupported)
    default_emphasis = "original" if program in ("A1111", "Forge") else None
    emphasis = EMPHASIS.get(pairs["Emphasis"]) if "Emphasis" in pairs else None
    return Reading(
        program=program,
        version=pairs.get("Version", ""),
        prompt=prompt,
        negative_prompt=parts.negative_prompt,
        steps=_value(int, pairs.get("Steps")),
        guidance_scale=_value(float, pairs.get("CFG scale")),
        guidance_rescale=_value(float, pairs.get("CFG Rescale") or pairs.get("CFG rescale")),
        seed=_value(int, pairs.get("Seed")),
        width=width,
        height=height,
        sampler=pairs.get("Sampler"),
        scheduler=pairs.get("Schedule type"),
        eta=_value(float, pairs.get("Eta")),
        emphasis="plain" if emphasis == "none" else emphasis or default_emphasis,
        # A1111 writes neither the default clip skip nor the default source of the noise.
        clip_skip=_value(int, pairs.get("Clip skip") or pairs.get("CLIP skip"))
        or (None if program in _ANY_NOISE else 1),
        noise_source=None if program in _ANY_NOISE else _SOURCES.get(pairs.get("RNG", "GPU")),
        seed_delta=_value(int, pairs.get("ENSD")) or 0,
        batch=_value(int, pairs.get("Batch size")),
        loras=tuple(loras),
        base_model=UsedModel(pairs.get("Model", ""), pairs.get("Model hash", "").lower()),
        vae=UsedModel(pairs.get("VAE", ""), pairs.get("VAE hash", "").lower()),
        unsupported=tuple(unsupported),
    )


def _program(pairs: Mapping[str, str]) -> Program:
    if "SD.Next" in pairs.get("App", "") or "Pipeline" in pairs or "Backend" in pairs:
        return "SD.Next"
    version = pairs.get("Version", "")
    if version.startswith("Fidelora"):
        return "Fidelora"
    if version.startswith("Fooocus") or "Performance" in pairs:
        return "Fooocus"
    if any(made_it(pairs) for made_it in _OTHERS.values()):
        return "unknown"
    if "ComfyUI" in version:
        return "ComfyUI"
    return "Forge" if _FORGE_VERSION.match(version) else "A1111"


def _fooocus(
    pairs: Mapping[str, str],
    parts: TextParts,
    width: int | None,
    height: int | None,
    unsupported: list[str],
) -> Reading:
    """Return the settings of Fooocus in A1111's form, which has its own names of samplers."""
    weights = pairs.get("Lora weights") or pairs.get("LoRA", "")
    hashes = hashes_of_loras(pairs.get("Lora hashes", ""), parts.objects)
    loras = []
    for name, _, weight in (pair.rpartition(":") for pair in weights.split(",")):
        strength = _value(float, weight.strip())
        if name.strip() and strength is not None:
            loras.append(
                UsedLora(stem(name.strip()), strength, strength, hashes.get(name.strip(), ""))
            )
    if pairs.get("Refiner model", "None") != "None":
        unsupported = [*unsupported, "The picture was made with a refiner, which is not simulated."]
    return Reading(
        program="Fooocus",
        version=pairs.get("Version", ""),
        prompt=parts.prompt,
        negative_prompt=parts.negative_prompt,
        steps=_value(int, pairs.get("Steps")),
        guidance_scale=_value(float, pairs.get("CFG scale")),
        seed=_value(int, pairs.get("Seed")),
        width=width,
        height=height,
        sampler=pairs.get("Sampler"),
        scheduler=pairs.get("Scheduler"),
        emphasis="original",
        clip_skip=_value(int, pairs.get("CLIP Skip")),
        noise_source="cpu",
        loras=tuple(loras),
        base_model=UsedModel(pairs.get("Base model", ""), pairs.get("Base model hash", "").lower()),
        vae=UsedModel(stem(pairs.get("VAE", "").removeprefix("Default (model)"))),
        unsupported=(FOOOCUS_OWN, *unsupported),
    )


def _resources(resources: object) -> list[UsedLora]:
    """Return the LoRAs in Civitai's list of resources; only older pictures contain their names."""
    loras = []
    for one in resources if isinstance(resources, list) else ():
        if isinstance(one, Mapping) and str(one.get("type", "")).lower() in _LORA_TYPES:
            name = str(one.get("modelName") or f"modelVersionId {one.get('modelVersionId')}")
            strength = _value(float, str(one.get("weight", 1)))
            strength = 1.0 if strength is None else strength
            loras.append(UsedLora(name, strength, strength))
    return loras


def _lora(arguments: str, hashes: Mapping[str, str]) -> UsedLora:
    """Return the LoRA of a tag: `name:text:unet`, where one number stands for both."""
    name, *rest = arguments.split(":")
    strengths: dict[str, float] = {}
    for key, part in zip(("te", "unet", "dyn"), rest, strict=False):
        given, equals, value = part.partition("=")
        number = _value(float, value if equals else part)
        if number is not None:
            strengths[given.strip() if equals else key] = number
    text = strengths.get("te", 1.0)
    return UsedLora(stem(name), strengths.get("unet", text), text, hashes.get(name, ""))


def _size(text: str) -> tuple[int | None, int | None]:
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    return (int(match[1]), int(match[2])) if match else (None, None)


def _value(kind: Callable[[str], Any], text: str | None) -> Any:
    """Return a number, also one with a decimal comma, or None."""
    if text and kind is float:
        text = re.sub(r"(?<=\d),(?=\d+$)", ".", text.strip())
    try:
        return kind(text) if text else None
    except ValueError:
        return None
