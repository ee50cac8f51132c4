"""Recipe fields in the `Key: value` pairs of AUTOMATIC1111's generation parameters."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fidelora.errors import RecipeError
from fidelora.families import Family
from fidelora.families.emphasis import Emphasis
from fidelora.families.sampler_options import check_sampler_options
from fidelora.images.a1111_prompt import EMPHASIS, NO_EMPHASIS
from fidelora.images.a1111_samplers import AUTOMATIC, UNIFORM, from_comfy, sampler_of
from fidelora.recipe import MAX_SEED, Recipe

_WITHOUT_NOTE = {
    "Version": None,
    "Clip skip": "1",
    "Schedule type": None,
    "Emphasis": None,
    "Lora hashes": None,
    "Batch size": None,
    "Batch pos": None,
    "Created Date": None,  # Civitai
    "Noise Schedule": "Default",
    "CFG true": "1",  # this key and those up to Pipeline: SD.Next
    "CLIP skip": "1",
    "Parser": None,
    "LoRA networks": None,
    "LoRA method": None,
    "LoRA mode": None,
    "Network load": None,
    "App": None,
    "Backend": None,
    "Operations": "txt2img",
    "Pipeline": None,
    "Metadata scheme": None,  # Fooocus
}
"""Keys that need no note, with any value (None) or only with the given value: they do not change
the image, or are read together with another key."""


_ETA = ("Eta", "Eta DDIM")


@dataclass(frozen=True)
class Ignored:
    """A parameter of an image that is ignored when the image is made again, and the reason."""

    name: str
    value: str
    reason: str


def read_pairs(pairs: Mapping[str, str], spec: Family) -> tuple[dict[str, Any], list[Ignored]]:
    """Return the recipe fields in the pairs, and the pairs that are ignored."""
    fields: dict[str, Any] = {}
    ignored = []
    for key, value in pairs.items():
        if key in _READ:
            try:
                found = _READ[key](value, pairs, spec)
                if key not in _ETA:  # checked together with the sampler
                    Recipe(prompt="", model=spec.id, **found)  # raises if it is out of range
                fields |= found
            except RecipeError as error:
                ignored.append(Ignored(key, value, str(error)))
            except ValueError:
                ignored.append(Ignored(key, value, "The value is not valid for this key."))
        elif key not in _WITHOUT_NOTE or _WITHOUT_NOTE[key] not in (None, value):
            ignored.append(Ignored(key, value, _reason(key)))
    return fields, ignored


def _reason(key: str) -> str:
    if re.fullmatch(r"AddNet Model \d+", key):  # extension of A1111 for LoRAs, until 2023
        return "The image was made with this LoRA, which is not applied: no tag names it."
    return REASONS.get(key, "The parameter is not supported.")


def read_emphasis(pairs: Mapping[str, str], *, with_emphasis: bool) -> Emphasis:
    """Return the emphasis of the image; `with_emphasis` applies to other programs' images."""
    if not (with_emphasis or is_own(pairs)):
        return "none"
    default = NO_EMPHASIS if is_own(pairs) else "Original"  # A1111 does not write its default
    return EMPHASIS.get(pairs.get("Emphasis", default), "none")


def is_own(pairs: Mapping[str, str]) -> bool:
    """Return True if Fidelora wrote the parameters."""
    return pairs.get("Version", "").startswith("Fidelora")


def _sampler(value: str, pairs: Mapping[str, str], spec: Family) -> dict[str, Any]:
    # A1111 stores the schedule since version 1.9. Before, `DPM++ 2M` had the uniform one, because
    # `DPM++ 2M Karras` was another sampler.
    without = UNIFORM if value.lower() == "dpm++ 2m" and not is_own(pairs) else AUTOMATIC
    schedule = pairs.get("Schedule type", without)
    if not is_own(pairs):
        value, schedule = from_comfy(value, schedule)
    choice = sampler_of(value, schedule, spec, prefers_own=is_own(pairs))
    if choice.timestep_spacing == "default":
        return {"sampler": choice.sampler}
    return choice._asdict()


def _eta(value: str, pairs: Mapping[str, str], spec: Family) -> dict[str, Any]:
    """Read A1111's `Eta` (of ancestral samplers) or `Eta DDIM`, or Fidelora's `Eta` of `tcd`."""
    eta, sampler = float(value), spec.default_sampler
    if "Sampler" in pairs:
        sampler = _sampler(pairs["Sampler"], pairs, spec)["sampler"]
    check_sampler_options(spec, sampler, "default", eta)
    return {"eta": eta}


def _size(value: str, _pairs: Mapping[str, str], _spec: Family) -> dict[str, Any]:
    width, height = value.split("x")
    return {"width": _whole(width.strip()), "height": _whole(height.strip())}


def _whole(value: str) -> int:
    if not re.fullmatch(r"[0-9]{1,20}", value):
        raise ValueError(value)
    return int(value)


def _seed(value: str) -> int:
    seed = _whole(value)
    if seed > MAX_SEED:
        raise ValueError(value)
    return seed


def _fidelity(value: str, _pairs: Mapping[str, str], _spec: Family) -> dict[str, Any]:
    if value not in ("exact", "fast"):
        raise ValueError(value)
    return {"fidelity": value}


_READ: Mapping[str, Callable[[str, Mapping[str, str], Family], dict[str, Any]]] = {
    "Steps": lambda value, _pairs, _spec: {"steps": _whole(value)},
    "Seed": lambda value, _pairs, _spec: {"seed": _seed(value)},
    "CFG scale": lambda value, _pairs, _spec: {"guidance_scale": float(value)},
    "Sampler": _sampler,
    "Eta": _eta,
    "Eta DDIM": _eta,
    "Size": _size,
    "Fidelity": _fidelity,
}
REASONS = {
    "TI hashes": "The image was made with these embeddings; add their files as LoRAs.",
    "Model": "The base model is not selected by this name; a different one changes the image.",
    "Model hash": "The base model is not selected by this hash; a different one changes the image.",
}
"""Reasons for ignoring a parameter, by its key."""
