"""Write and read the generation parameters that AUTOMATIC1111's web UI stores in images as text.

The text contains the prompt, a `Negative prompt:` line, and a line of `Key: value` pairs, in which
values with commas, colons or quotes are JSON strings. Many other programs also read this format.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fidelora.errors import PromptSyntaxError, UnknownSamplerError
from fidelora.families import Family
from fidelora.images.a1111_prompt import NamedLora, lora_of, marks_in, tags_in
from fidelora.images.a1111_samplers import AUTOMATIC, sampler_of
from fidelora.recipe import AdapterRef, Recipe

_NEGATIVE = "Negative prompt:"
_PAIR = re.compile(r'(?P<key>\w[\w \-/]{0,60}):\s*(?P<value>"(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')
_FEWEST_PAIRS = 3
"""A last line with fewer pairs belongs to the prompt, as in the web UI."""
_SAYS_NOTHING = {
    "Version": None,
    "Clip skip": "1",
    "Schedule type": None,
    "Lora hashes": None,
    "Batch size": None,
    "Batch pos": None,
}
"""Keys that need no note, with any value (None) or only with the given value: they do not change
the image, or are read together with another key."""


@dataclass(frozen=True)
class Ignored:
    """A parameter of an image that is ignored when the image is made again, and the reason."""

    name: str
    value: str
    reason: str


@dataclass(frozen=True)
class Parameters:
    """Parsed generation parameters.

    Attributes:
        text: the whole text.
        prompt: prompt without LoRA tags.
        loras: LoRAs of the tags, with the hashes from the text.
        fields: recipe fields in the text: any of `steps`, `sampler`, `guidance_scale`, `seed`,
            `width`, `height` and `fidelity`.
        ignored: all other parameters that affected the image.
    """

    text: str
    prompt: str
    negative_prompt: str = ""
    loras: tuple[NamedLora, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)
    ignored: tuple[Ignored, ...] = ()

    def recipe(self, adapters: Sequence[AdapterRef], **others: Any) -> Recipe:
        """Return the recipe with these parameters.

        Args:
            adapters: adapters of `loras`, in the same order.
            others: additional recipe fields, such as `base_model`; they override those of the text.

        Raises:
            RecipeError: a value is out of range.
        """
        refs = tuple(
            replace(ref, multiplier=lora.multiplier)
            for ref, lora in zip(adapters, self.loras, strict=True)
        )
        said = {"prompt": self.prompt, "negative_prompt": self.negative_prompt, **self.fields}
        return Recipe(**{**said, **others, "adapters": refs})


def parameters_text(recipe: Recipe, environment: Mapping[str, str]) -> str:
    """Return the parameters text of a recipe, with Fidelora's sampler name."""
    loras = "".join(
        f" <lora:{ref.name or ref.sha256[:12]}:{ref.multiplier:g}>" for ref in recipe.adapters
    )
    lines = [recipe.prompt + loras]
    if recipe.negative_prompt:
        lines.append(f"{_NEGATIVE} {recipe.negative_prompt}")
    pairs = {
        "Steps": str(recipe.steps),
        "Sampler": recipe.sampler,
        "CFG scale": f"{recipe.guidance_scale:g}",
        "Seed": str(recipe.seed),
        "Size": f"{recipe.width}x{recipe.height}",
        "Model": Path(recipe.base_model).name,
    }
    if recipe.fidelity != "exact":
        pairs["Fidelity"] = recipe.fidelity
    if recipe.adapters:
        hashes = ", ".join(
            f"{ref.name or ref.sha256[:12]}: {ref.sha256[:12]}" for ref in recipe.adapters
        )
        pairs["Lora hashes"] = hashes
    pairs["Version"] = f"Fidelora {environment['fidelora']}"
    lines.append(", ".join(f"{key}: {_quoted(value)}" for key, value in pairs.items()))
    return "\n".join(lines)


def read_parameters(text: str, spec: Family) -> Parameters:
    """Parse the parameters that this model supports. Accepts any text, and raises no errors.

    Args:
        text: text from an image, written by any program.
        spec: model family that will make the image.
    """
    *lines, last = text.strip().split("\n")
    if len(_PAIR.findall(last)) < _FEWEST_PAIRS:
        lines, last = [*lines, last], ""
    pairs = {
        match["key"].strip(): _unquoted(match["value"].strip()) for match in _PAIR.finditer(last)
    }
    start = next(
        (index for index, line in enumerate(lines) if line.lstrip().startswith(_NEGATIVE)),
        len(lines),
    )
    prompt = "\n".join(lines[:start])
    negative = "\n".join(lines[start:]).lstrip().removeprefix(_NEGATIVE).strip()

    fields, ignored = _fields(pairs, spec)
    prompt, tags = tags_in(prompt)
    loras = []
    for network, arguments in tags:
        try:
            loras.append(lora_of(network, arguments))
        except PromptSyntaxError as error:
            ignored.append(Ignored("prompt", f"<{network}:{arguments}>", str(error)))
    if not pairs.get("Version", "").startswith("Fidelora"):  # Fidelora has no prompt syntax
        for name, words in (("prompt", prompt), ("negative prompt", negative)):
            if mark := marks_in(words):
                ignored.append(
                    Ignored(
                        name,
                        words[:80],
                        f"{mark} in A1111; Fidelora encodes prompts as they are written.",
                    )
                )
    return Parameters(
        text,
        prompt,
        negative,
        _with_hashes(loras, pairs.get("Lora hashes", "")),
        fields,
        tuple(ignored),
    )


def _fields(pairs: Mapping[str, str], spec: Family) -> tuple[dict[str, Any], list[Ignored]]:
    fields: dict[str, Any] = {}
    ignored = []
    for key, value in pairs.items():
        if key in _READ:
            try:
                fields |= _READ[key](value, pairs, spec)
            except UnknownSamplerError as error:
                ignored.append(Ignored(key, value, str(error)))
            except ValueError:
                ignored.append(Ignored(key, value, "The value is not valid for this key."))
        elif key not in _SAYS_NOTHING or _SAYS_NOTHING[key] not in (None, value):
            ignored.append(
                Ignored(key, value, _REASONS.get(key, "The parameter is not supported."))
            )
    return fields, ignored


def _sampler(value: str, pairs: Mapping[str, str], spec: Family) -> dict[str, Any]:
    return {"sampler": sampler_of(value, pairs.get("Schedule type", AUTOMATIC), spec)}


def _size(value: str, _pairs: Mapping[str, str], _spec: Family) -> dict[str, Any]:
    width, height = value.split("x")
    return {"width": _whole(width), "height": _whole(height)}


def _whole(value: str) -> int:
    if not re.fullmatch(r"[0-9]{1,20}", value):
        raise ValueError(value)
    return int(value)


def _fidelity(value: str, _pairs: Mapping[str, str], _spec: Family) -> dict[str, Any]:
    if value not in ("exact", "fast"):
        raise ValueError(value)
    return {"fidelity": value}


_READ: Mapping[str, Callable[[str, Mapping[str, str], Family], dict[str, Any]]] = {
    "Steps": lambda value, _pairs, _spec: {"steps": _whole(value)},
    "Seed": lambda value, _pairs, _spec: {"seed": _whole(value)},
    "CFG scale": lambda value, _pairs, _spec: {"guidance_scale": float(value)},
    "Sampler": _sampler,
    "Size": _size,
    "Fidelity": _fidelity,
}
_REASONS = {
    "Model": "The base model is not selected by this name; a different one changes the image.",
    "Model hash": "The base model is not selected by this hash; a different one changes the image.",
}


def _with_hashes(loras: Sequence[NamedLora], hashes: str) -> tuple[NamedLora, ...]:
    """Add the hashes in the value of `Lora hashes` (`name: hash, name: hash`) to the LoRAs."""
    pairs = (pair.rpartition(":") for pair in hashes.split(","))
    known = {
        name.strip(): digits.strip()
        for name, _, digits in pairs
        if re.fullmatch(r"\s*[0-9a-fA-F]{8,64}\s*", digits)
    }
    return tuple(replace(lora, hash=known.get(lora.name, "").lower()) for lora in loras)


def _quoted(value: str) -> str:
    return (
        json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ',:"\n') else value
    )


def _unquoted(value: str) -> str:
    try:
        read = json.loads(value) if value.startswith('"') else value
    except ValueError:
        return value
    return str(read)
