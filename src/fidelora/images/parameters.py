"""Write and read the generation parameters that AUTOMATIC1111's web UI stores in images as text.

The text contains the prompt, a `Negative prompt:` line, and a line of `Key: value` pairs, in which
values with commas, colons or quotes are JSON strings. Many other programs also read this format.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fidelora.errors import PromptSyntaxError, RecipeError
from fidelora.families import Family
from fidelora.families.emphasis import check_emphasis
from fidelora.images.a1111_prompt import (
    NO_EMPHASIS,
    NamedLora,
    describe_brackets,
    describe_syntax,
    lora_of,
    name_of_emphasis,
    tags_in,
    unescaped,
)
from fidelora.images.a1111_samplers import name_of
from fidelora.images.parameter_pairs import REASONS, Ignored, is_own, read_emphasis, read_pairs
from fidelora.recipe import AdapterRef, Recipe
from fidelora.texts import cleaned

_NEGATIVE = "Negative prompt:"
_PAIR = re.compile(
    r"(?P<key>\w[\w \-/]{0,60}):\s*"
    r'(?P<value>"(?:\\.|[^\\"])*"|\([^()]*\)|-?\d+,\d+(?=\s*(?:,|$))|[^,]*)(?:,|$)'
)
_DECIMAL_COMMA = re.compile(r"(-?\d+),(\d+)")
"""Number that a user or a program wrote in another language: `7,5`."""
_FEWEST_PAIRS = 3
"""A last line with fewer pairs belongs to the prompt, as in the web UI."""
_SETTINGS = "Steps: "
"""Start of the line of pairs in A1111's texts; extensions of A1111 add lines after it."""
_JSON_VALUE = re.compile(r"(?:^|, )(?P<key>Hashes|Civitai (?:resources|metadata)):\s*(?=[\[{])")


@dataclass(frozen=True)
class Parameters:
    """Parsed generation parameters.

    Attributes:
        text: the whole text.
        prompt: prompt without LoRA tags.
        loras: LoRAs of the tags, with the hashes from the text.
        fields: recipe fields in the text: any of `steps`, `sampler`, `timestep_spacing`, `eta`,
            `guidance_scale`, `guidance_rescale`, `seed`, `width`, `height`, `emphasis` and
            `fidelity`.
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
        own = {"prompt": self.prompt, "negative_prompt": self.negative_prompt, **self.fields}
        return Recipe(**{**own, **others, "adapters": refs})


def parameters_text(
    recipe: Recipe,
    environment: Mapping[str, str],
    lora_hashes: Mapping[str, str] | None = None,
) -> str:
    """Return the parameters text of a recipe, as A1111 writes it.

    Samplers that A1111 does not have keep Fidelora's name. `Emphasis: None` makes A1111 encode
    brackets as text, as Fidelora does.

    Args:
        environment: versions; `fidelora` is one of them.
        lora_hashes: sha256 of the tensors of each adapter by the sha256 of its file. For adapters
            that are missing here, the sha256 of the file is used.
    """
    loras = "".join(
        f" <lora:{ref.name or ref.sha256[:12]}:{ref.multiplier:g}>" for ref in recipe.adapters
    )
    lines = [recipe.prompt + loras]
    if recipe.negative_prompt:
        lines.append(f"{_NEGATIVE} {recipe.negative_prompt}")
    sampler, schedule = name_of(recipe.sampler, recipe.timestep_spacing)
    pairs = {
        "Steps": str(recipe.steps),
        "Sampler": sampler,
        **({"Schedule type": schedule} if schedule else {}),
        "CFG scale": f"{recipe.guidance_scale:g}",
        "Seed": str(recipe.seed),
        "Size": f"{recipe.width}x{recipe.height}",
        "Model": Path(recipe.base_model).name,
    }
    if recipe.eta is not None:
        pairs["Eta DDIM" if recipe.sampler == "ddim" else "Eta"] = repr(recipe.eta)
    if recipe.fidelity != "exact":
        pairs["Fidelity"] = recipe.fidelity
    if recipe.emphasis != "none" or any(
        mark in recipe.prompt + recipe.negative_prompt for mark in "()[]\\"
    ):
        pairs["Emphasis"] = name_of_emphasis(recipe.emphasis)
    if recipe.adapters:
        known = lora_hashes or {}
        pairs["Lora hashes"] = ", ".join(
            f"{ref.name or ref.sha256[:12]}: {known.get(ref.sha256, ref.sha256)[:12]}"
            for ref in recipe.adapters
        )
    pairs["Version"] = f"Fidelora {environment['fidelora']}"
    lines.append(", ".join(f"{key}: {_quoted(value)}" for key, value in pairs.items()))
    return "\n".join(lines)


@dataclass(frozen=True)
class TextParts:
    """Parts of a parameters text, not interpreted.

    Attributes:
        prompt, negative_prompt: as written, with tags.
        pairs: `Key: value` pairs by key.
        objects: values that are JSON objects or lists, by key.
        added: lines after the line of pairs, which extensions add.
    """

    prompt: str
    negative_prompt: str
    pairs: Mapping[str, str]
    objects: Mapping[str, Any]
    added: Sequence[str]


def split_parameters(text: str) -> TextParts:
    """Divide a parameters text into its parts. Accepts any text, and raises no errors."""
    lines, last, added = _split(text.strip().replace("\r\n", "\n").split("\n"))
    last, objects = _without_objects(last)
    pairs = {
        match["key"].strip(): _read_value(match["value"].strip()) for match in _PAIR.finditer(last)
    }
    start = next(
        (index for index, line in enumerate(lines) if line.lstrip().startswith(_NEGATIVE)),
        len(lines),
    )
    negative = "\n".join(lines[start:]).lstrip().removeprefix(_NEGATIVE).strip()
    return TextParts("\n".join(lines[:start]), negative, pairs, objects, added)


def read_parameters(text: str, spec: Family, *, with_emphasis: bool = False) -> Parameters:
    """Parse the parameters that this model supports. Accepts any text, and raises no errors.

    Args:
        text: text from an image, written by any program.
        spec: model family that will make the image.
        with_emphasis: True to weight words as the web UI did. Fidelora's own texts contain this
            choice.
    """
    parts = split_parameters(text)
    prompt, negative, pairs, objects = (
        parts.prompt,
        parts.negative_prompt,
        parts.pairs,
        parts.objects,
    )
    fields, ignored = read_pairs(pairs, spec)
    ignored += [
        Ignored(name, value.strip(), "The parameter is not supported.")
        for name, _, value in (line.partition(":") for line in parts.added if line.strip())
    ]
    ignored += _resources(objects)
    prompt, tags = tags_in(prompt)
    loras = []
    for network, arguments in tags:
        try:
            loras.append(lora_of(network, arguments))
        except PromptSyntaxError as error:
            ignored.append(Ignored("prompt", f"<{network}:{arguments}>", str(error)))
    hashes = hashes_of_loras(pairs.get("Lora hashes", ""), objects)
    ignored += [
        Ignored(
            "Lora hashes",
            f"{name}: {digits}",
            "The image was made with this LoRA, which is not applied: no tag in the prompt names "
            "it and its multiplier.",
        )
        for name, digits in hashes.items()
        if name not in {lora.name for lora in loras}
    ]
    emphasis = read_emphasis(pairs, with_emphasis=with_emphasis)
    if emphasis != "none":
        fields["emphasis"] = emphasis
        for name, words in (("prompt", prompt), ("negative prompt", negative)):
            try:
                check_emphasis(name, words)
            except RecipeError as error:
                ignored.append(Ignored(name, words[:80], str(error)))
                fields.pop("emphasis", None)
        emphasis = fields.get("emphasis", "none")
    if emphasis == "none" and not is_own(pairs):
        for name, words in (("prompt", prompt), ("negative prompt", negative)):
            if mark := describe_syntax(words) or describe_brackets(words):
                ignored.append(
                    Ignored(
                        name,
                        words[:80],
                        f"{mark} in A1111; Fidelora encodes prompts as they are written, unless "
                        "emphasis is switched on.",
                    )
                )
        if pairs.get("Emphasis") != NO_EMPHASIS:
            prompt, negative = unescaped(prompt), unescaped(negative)
    return Parameters(
        text,
        prompt,
        negative,
        tuple(replace(lora, hash=hashes.get(lora.name, "")) for lora in loras),
        fields,
        tuple(ignored),
    )


def _split(lines: list[str]) -> tuple[list[str], str, list[str]]:
    """Return the lines of the prompts, the line of pairs, and the lines after it."""
    for index in reversed(range(len(lines))):
        is_settings = lines[index].startswith(_SETTINGS) or index == len(lines) - 1
        if is_settings and len(_PAIR.findall(lines[index])) >= _FEWEST_PAIRS:
            return lines[:index], lines[index], lines[index + 1 :]
    return lines, "", []


def _without_objects(line: str) -> tuple[str, dict[str, Any]]:
    """Return the line of pairs without values that are JSON objects or lists, and these values."""
    found: dict[str, Any] = {}
    while match := _JSON_VALUE.search(line):
        try:
            value, end = json.JSONDecoder().raw_decode(line, match.end())
            found[match["key"]] = cleaned(value)
        except (ValueError, RecursionError):
            break
        line = line[: match.start()] + line[end:]
    return line.removeprefix(", "), found


def _resources(objects: Mapping[str, Any]) -> list[Ignored]:
    """Return the resources and parameters in the JSON values, none of which is supported.

    `hashes_of_loras` reads the hashes of LoRAs.
    """
    ignored = []
    for key, value in objects.items():
        if key == "Hashes" or not value:
            continue
        resources = value if key == "Civitai resources" and isinstance(value, list) else []
        for one in resources:
            kind = _kind_of_resource(one)
            if kind in ("lora", "lycoris", "locon", "dora"):
                reason = "The image was made with this LoRA, which is not applied: no tag names it."
            elif kind == "checkpoint":
                reason = REASONS["Model"]
            else:
                reason = "The resource is not supported."
            ignored.append(Ignored(key, json.dumps(one, ensure_ascii=False), reason))
        if not resources:
            text = json.dumps(value, ensure_ascii=False)
            ignored.append(Ignored(key, text, "The parameter is not supported."))
    return ignored


def _kind_of_resource(resource: object) -> str:
    """Return the kind of a resource of Civitai in lower case; empty if it has none.

    It is the `type`, or a part of the `air`: `urn:air:sd1:lora:civitai:1@2`.
    """
    if not isinstance(resource, dict):
        return ""
    name = str(resource.get("air", "")).split(":")
    return str(resource.get("type") or (name[3] if len(name) > 3 else "")).lower()


def hashes_of_loras(text: str, objects: Mapping[str, Any]) -> dict[str, str]:
    """Return the hashes of LoRAs by name.

    Args:
        text: value of `Lora hashes`: `name: hash, name: hash`.
        objects: JSON values; `Hashes` has keys such as `lora:name`.
    """
    pairs = [pair.rpartition(":")[::2] for pair in text.split(",")]
    others = objects.get("Hashes")
    if isinstance(others, dict):
        pairs += [
            (name.partition(":")[2], digits)
            for name, digits in others.items()
            if name.lower().startswith("lora:") and isinstance(digits, str)
        ]
    return {
        name.strip(): digits.strip().lower()
        for name, digits in pairs
        if re.fullmatch(r"\s*[0-9a-fA-F]{8,64}\s*", digits)
    }


def _quoted(value: str) -> str:
    return (
        json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ',:"\n') else value
    )


def _read_value(value: str) -> str:
    """Return a value without quotes, and a number with a decimal point instead of a comma."""
    read = _unquoted(value)
    number = _DECIMAL_COMMA.fullmatch(read)
    return f"{number[1]}.{number[2]}" if number else read


def _unquoted(value: str) -> str:
    try:
        read = json.loads(value) if value.startswith('"') else value
    except ValueError:
        return value
    return str(cleaned(read))
