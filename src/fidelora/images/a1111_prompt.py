"""AUTOMATIC1111's prompt syntax: `<lora:name:multiplier>` tags, and brackets that weight words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from fidelora.errors import PromptSyntaxError
from fidelora.families.emphasis import Emphasis
from fidelora.recipe import MAX_MULTIPLIER

NO_EMPHASIS = "None"
"""Value of A1111's setting `emphasis` that treats brackets in prompts as text, as in training."""
EMPHASIS: Mapping[str, Emphasis] = {
    NO_EMPHASIS: "none",
    "Ignore": "ignore",
    "Original": "original",
    "No norm": "no_norm",
}
"""The recipe's `emphasis` for each value of A1111's setting of that name."""

_TAG = re.compile(r"<(?P<network>\w+):(?P<arguments>[^<>]+)>")
"""Tag of an extra network of any kind in A1111."""
_LORA = {"lora", "lyco"}
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)")
_BRACKET = re.compile(r"\\.|\(|:\s*[+-]?[\d.]+\s*\)|\)", re.DOTALL)
"""Tokens of A1111's parser: escaped character, opening bracket, closing bracket with or without a
weight."""
_SYNTAX = (
    (re.compile(r"(?<!\\)\[[^\[\]:|]*[:|][^\[\]]*\]"), "switches words during sampling"),
    (re.compile(r"\b(AND|BREAK)\b"), "combines several prompts"),
)


@dataclass(frozen=True)
class NamedLora:
    """An adapter named in a prompt.

    Attributes:
        name: file name without suffix, as written in the prompt.
        multiplier: -5..5.
        hash: first digits of its hash in the image parameters; empty if they have none.
    """

    name: str
    multiplier: float = 1.0
    hash: str = ""


def loras_in(prompt: str) -> tuple[str, tuple[NamedLora, ...]]:
    """Return the prompt without its tags, and the LoRAs named by the tags, in order.

    Raises:
        PromptSyntaxError: a tag is not supported.
    """
    rest, tags = tags_in(prompt)
    return rest, tuple(lora_of(network, arguments) for network, arguments in tags)


def tags_in(prompt: str) -> tuple[str, list[tuple[str, str]]]:
    """Return a prompt from which tags and the spaces before them are removed, and the tags.

    Each tag is a pair of network and arguments, as `lora_of` expects them.
    """
    tags, rest, end = [], "", 0
    for match in _TAG.finditer(prompt):
        rest += prompt[end : match.start()].rstrip()
        end = match.end()
        tags.append((match["network"], match["arguments"]))
    rest += prompt[end:]
    return rest.lstrip() if tags else rest, tags


def lora_of(network: str, arguments: str) -> NamedLora:
    """Return the LoRA of a tag `<network:arguments>`.

    Args:
        network: kind of extra network; `lora` and `lyco` are supported.
        arguments: `name`, `name:multiplier`, or `name:multiplier:multiplier` with equal multipliers
            for text encoder and UNet.

    Raises:
        PromptSyntaxError: the tag is not a LoRA, or its multipliers are not supported.
    """
    tag = f"<{network}:{arguments}>"
    if network not in _LORA:
        raise PromptSyntaxError(
            f"{tag} is not a LoRA. Other networks are not supported in prompts; remove the tag."
        )
    name, *rest = arguments.split(":")
    multipliers: dict[str, str] = {}
    for parameter, part in zip(("te", "unet", "dyn"), rest, strict=False):
        key, equals, value = part.partition("=")
        multipliers[key if equals else parameter] = value if equals else part
    if not name.strip() or len(rest) > 3 or not multipliers.keys() <= {"te", "unet"}:
        raise PromptSyntaxError(
            f"{tag} must be <lora:name:multiplier>; other arguments are not supported."
        )
    for value in multipliers.values():
        if not _NUMBER.fullmatch(value.strip()) or abs(float(value)) > MAX_MULTIPLIER:
            raise PromptSyntaxError(
                f"{tag}: a multiplier must be from -{MAX_MULTIPLIER:g} to {MAX_MULTIPLIER:g}."
            )
    text_multiplier = float(multipliers.get("te", "1"))
    if "unet" in multipliers and float(multipliers["unet"]) != text_multiplier:
        raise PromptSyntaxError(
            f"{tag} has two multipliers; use the same one for text encoder and UNet."
        )
    return NamedLora(name.strip(), text_multiplier)


def name_of_emphasis(emphasis: Emphasis) -> str:
    """Return A1111's name of an emphasis."""
    return next(name for name, value in EMPHASIS.items() if value == emphasis)


def describe_syntax(prompt: str) -> str:
    """Return a phrase that describes the first A1111 syntax in the prompt, or an empty string.

    Brackets without a weight are ignored although they change weights by 10 % in A1111, because
    they are also used as punctuation.
    """
    if weighted := _weighted_words(prompt):
        return f"{weighted!r:.80} changes word weights"
    for pattern, what in _SYNTAX:
        if match := pattern.search(prompt):
            return f"{match[0]!r:.80} {what}"
    return ""


def describe_brackets(prompt: str) -> str:
    """Return a phrase that describes the first brackets without a weight, or an empty string.

    In A1111, each pair of round brackets multiplies the weight by 1.1, square ones by 1 / 1.1.
    """
    match = re.search(r"(?<!\\)(\((?:\\.|[^()\\])*\)|\[(?:\\.|[^\[\]\\])*\])", prompt)
    return f"{match[0]!r:.80} changes word weights" if match else ""


def unescaped(prompt: str) -> str:
    r"""Return the prompt without its escaping backslashes, as A1111 encodes it.

    `\(` becomes `(`, `\\` becomes `\`, and `\a` becomes `a`.
    """
    return re.sub(r"\\([()\[\]\\]?)", r"\1", prompt)


def _weighted_words(prompt: str) -> str:
    """Return the first pair of brackets with a weight and its contents, or an empty string."""
    opened: list[int] = []
    for token in _BRACKET.finditer(prompt):
        if token[0] == "(":
            opened.append(token.start())
        elif token[0][0] in ":)" and opened:
            start = opened.pop()
            if token[0][0] == ":":
                return prompt[start : token.end()]
    return ""
