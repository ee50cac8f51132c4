"""Prompts in AUTOMATIC1111's syntax: `<lora:name:multiplier>` and weighted brackets."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fidelora.errors import PromptSyntaxError
from fidelora.recipe import MAX_MULTIPLIER

_TAG = re.compile(r"<(?P<network>\w+):(?P<arguments>[^<>]+)>")
"""What A1111 takes for a tag of any extra network."""
_LORA = {"lora", "lyco"}
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)")
_BRACKET = re.compile(r"\\.|\(|:\s*[+-]?[\d.]+\s*\)|\)", re.DOTALL)
"""What A1111's parser looks for: an escaped character, a bracket that opens, and one that closes, with a weight or without."""
_MARKS = (
    (re.compile(r"(?<!\\)\[[^\[\]:|]*[:|][^\[\]]*\]"), "changes words while the image is made"),
    (re.compile(r"\b(AND|BREAK)\b"), "puts several prompts together"),
)


@dataclass(frozen=True)
class NamedLora:
    """An adapter that a prompt names.

    Attributes:
        name: as it is written, of a file without its ending.
        multiplier: -2..2.
        hash: the first digits of its hash as image parameters have it; empty if they do not.
    """

    name: str
    multiplier: float = 1.0
    hash: str = ""


def loras_in(prompt: str) -> tuple[str, tuple[NamedLora, ...]]:
    """Return the prompt without its tags, and the LoRAs that they name, in order.

    Raises:
        PromptSyntaxError: a tag means something that cannot be done here.
    """
    rest, tags = tags_in(prompt)
    return rest, tuple(lora_of(network, arguments) for network, arguments in tags)


def tags_in(prompt: str) -> tuple[str, list[tuple[str, str]]]:
    """Return the prompt without its tags and the blanks before them, and each tag's network and
    arguments, for `lora_of`.
    """
    tags, rest, end = [], "", 0
    for match in _TAG.finditer(prompt):
        rest += prompt[end : match.start()].rstrip()
        end = match.end()
        tags.append((match["network"], match["arguments"]))
    rest += prompt[end:]
    return rest.lstrip() if tags else rest, tags


def lora_of(network: str, arguments: str) -> NamedLora:
    """Parse one tag `<network:arguments>`: `name`, `name:multiplier`, or `name:text encoder:UNet`
    with two equal multipliers.

    Raises:
        PromptSyntaxError: it is no LoRA, or its multipliers cannot be used.
    """
    tag = f"<{network}:{arguments}>"
    if network not in _LORA:
        raise PromptSyntaxError(
            f"{tag} is no LoRA, and nothing else can be named in a prompt here; take it out."
        )
    name, *rest = arguments.split(":")
    multipliers: dict[str, str] = {}
    for place, part in zip(("te", "unet", "dyn"), rest, strict=False):
        key, equals, value = part.partition("=")
        multipliers[key if equals else place] = value if equals else part
    if not name.strip() or len(rest) > 3 or not multipliers.keys() <= {"te", "unet"}:
        raise PromptSyntaxError(
            f"{tag} has to be <lora:name:multiplier>; nothing else can be said of a LoRA here."
        )
    for value in multipliers.values():
        if not _NUMBER.fullmatch(value.strip()) or abs(float(value)) > MAX_MULTIPLIER:
            raise PromptSyntaxError(
                f"{tag}: a multiplier is a number from -{MAX_MULTIPLIER:g} to {MAX_MULTIPLIER:g}."
            )
    of_text = float(multipliers.get("te", "1"))
    if "unet" in multipliers and float(multipliers["unet"]) != of_text:
        raise PromptSyntaxError(
            f"{tag} has two multipliers; here a LoRA has one, for text encoder and UNet alike."
        )
    return NamedLora(name.strip(), of_text)


def marks_in(prompt: str) -> str:
    """Describe the first syntax in the prompt that A1111 would not encode literally; empty if there
    is none.

    Brackets alone, which weigh by a tenth there, are not looked for: they are punctuation, too.
    """
    if weighed := _weighed(prompt):
        return f"{weighed!r:.80} weighs words"
    for pattern, what in _MARKS:
        if match := pattern.search(prompt):
            return f"{match[0]!r:.80} {what}"
    return ""


def _weighed(prompt: str) -> str:
    """Return the first brackets with a weight, which may contain other brackets; empty if there are
    none.
    """
    opened: list[int] = []
    for token in _BRACKET.finditer(prompt):
        if token[0] == "(":
            opened.append(token.start())
        elif token[0][0] in ":)" and opened:
            start = opened.pop()
            if token[0][0] == ":":
                return prompt[start : token.end()]
    return ""
