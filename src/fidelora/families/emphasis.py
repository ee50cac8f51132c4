r"""Emphasis in prompts, as AUTOMATIC1111's web UI computes it. Does not import torch.

In round brackets, the weight of words is multiplied by 1.1, or by a number: `(word:1.3)`. In square
brackets, it is divided by 1.1. `\(` is a plain bracket. `BREAK` starts a new part of 75 tokens.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from fidelora.errors import RecipeError

Emphasis = Literal["none", "ignore", "original", "no_norm"]
"""Rule for the weights of words. `none` treats brackets as text, as the trainer does. The
others are settings of the web UI: `original` weights the states of the text encoder and restores
their mean, `no_norm` does not restore it, and `ignore` only removes the brackets."""

_UP, _DOWN = 1.1, 1 / 1.1
_TOKEN = re.compile(
    r"\\[()\[\]\\]?"  # escaped character, or a backslash, which is dropped
    r"|[(\[\])]"
    r"|:(?P<weight>[+-]?[.\d]+)\)"
    r"|[^\\()\[\]:]+|:"
)
_BREAK = re.compile(r"\bBREAK\b")
_SWITCH_TOKEN = re.compile(r"\\.|[\[\]:|]", re.DOTALL)
"""Tokens of `[from:to:when]` and `[one|two]`; escaped characters are skipped."""
_WHEN = re.compile(r"\s*[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?\s*")
"""The number `when` of `[from:to:when]`: a step, or a fraction of all steps."""
_PROMPT_WEIGHT = re.compile(r":\s*[+-]?(\d+(\.\d*)?|\.\d+)\s*\Z")
"""Weight of a whole prompt, `a cat :1.2`, which belongs to the syntax of `AND`."""
_MAX_DEPTH = 100  # brackets that are open at the same time; 1.1**100 is already 13,780
MAX_WEIGHT = 1000.0
"""Largest weight of a word; larger ones could overflow in float32."""
_AND = re.compile(r"\bAND\b")


class Span(NamedTuple):
    """A part of a prompt whose words have the same weight."""

    text: str
    weight: float


BREAK = Span("BREAK", -1.0)
"""Marks where a new part of 75 tokens starts."""


def spans_of(prompt: str) -> list[Span]:
    """Return the parts of a prompt with their weights, in order; at least one.

    Unmatched opening brackets have an effect up to the end; unmatched closing ones are text.

    Raises:
        RecipeError: too many brackets are open at the same time, or a weight is not a number.
    """
    texts: list[str] = []
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def close(bracket: str, factor: float) -> None:
        # A BREAK in brackets gets another weight than -1 and is then encoded as a word, as in the
        # web UI.
        for index in range(opened[bracket].pop(), len(weights)):
            weights[index] *= factor

    def add(text: str, weight: float = 1.0) -> None:
        texts.append(text)
        weights.append(weight)

    for token in _TOKEN.finditer(prompt):
        text = token[0]
        if text[0] == "\\":
            add(text[1:])
        elif text in opened:
            opened[text].append(len(texts))
            if len(opened["("]) + len(opened["["]) > _MAX_DEPTH:
                raise RecipeError(
                    f"{prompt!r:.80} has more than {_MAX_DEPTH} open brackets, whose weight could "
                    "overflow; close them, or set emphasis to none."
                )
        elif token["weight"] is not None and opened["("]:
            close("(", _number(token["weight"], prompt))
        elif text == ")" and opened["("]:
            close("(", _UP)
        elif text == "]" and opened["["]:
            close("[", _DOWN)
        else:
            parts = _BREAK.split(text)
            for index, part in enumerate(parts):
                if index:
                    add(*BREAK)
                    part = part.lstrip()
                add(part.rstrip() if index < len(parts) - 1 else part)
    for bracket, factor in (("(", _UP), ("[", _DOWN)):
        while opened[bracket]:
            close(bracket, factor)
    return _joined(texts, weights)


def check_emphasis(name: str, prompt: str) -> None:
    """Raise if a prompt has syntax of the web UI that is not emphasis.

    Args:
        name: name of the prompt's field.

    Raises:
        RecipeError: the prompt switches words during sampling, combines prompts, is weighted as a
            whole, has too many open brackets, or has a weight that is too large or not a number.
    """
    found = [(_switch_in(prompt), "switches words during sampling")]
    if match := _AND.search(prompt):
        found.append((match[0], "combines prompts"))
    if name == "prompt" and (match := _PROMPT_WEIGHT.search(prompt)):
        found.append((match[0], "weights the whole prompt"))
    for text, what in found:
        if text:
            raise RecipeError(
                f"{text!r:.80} in {name} {what} in A1111, which is not supported; remove it.",
                field=name,
            )
    try:
        spans = spans_of(prompt)
    except RecipeError as error:
        raise RecipeError(str(error), field=name) from error
    if any(not abs(span.weight) <= MAX_WEIGHT for span in spans):
        raise RecipeError(
            f"{name} has a word with a weight of more than {MAX_WEIGHT:,.0f}; use fewer brackets "
            "or a smaller number.",
            field=name,
        )


def _switch_in(prompt: str) -> str:
    """Return the first `[from:to:when]` or `[one|two]` of a prompt, or an empty string."""
    starts: list[int] = []
    colons: list[int | None] = []  # position after the last colon in each open bracket
    bars: list[bool] = []
    for mark in _SWITCH_TOKEN.finditer(prompt):
        if mark[0] == "[":
            starts.append(mark.start())
            colons.append(None)
            bars.append(False)
        elif not starts:
            continue
        elif mark[0] == "]":
            start, colon, bar = starts.pop(), colons.pop(), bars.pop()
            if bar or (colon is not None and _WHEN.fullmatch(prompt, colon, mark.start())):
                return prompt[start : mark.end()]
        elif mark[0] == ":":
            colons[-1] = mark.end()
        elif mark[0] == "|":
            bars[-1] = True
    return ""


def _number(text: str, prompt: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise RecipeError(
            f"{text!r:.40} in {prompt!r:.80} is not a weight; write a number such as 1.2."
        ) from None


def _joined(texts: list[str], weights: list[float]) -> list[Span]:
    """Join neighbours of equal weight, so that words are tokenized as they are written."""
    joined: list[Span] = []
    for text, weight in zip(texts, weights, strict=True):
        if joined and joined[-1].weight == weight:
            joined[-1] = Span(joined[-1].text + text, weight)
        else:
            joined.append(Span(text, weight))
    return joined or [Span("", 1.0)]
