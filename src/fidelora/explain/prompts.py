"""Prompt embeddings as other programs compute them: word weights, long prompts and clip skip.

AUTOMATIC1111's rules for weights and chunks are in `families/emphasis.py` and
`families/clip_chunks.py`. ComfyUI's rules differ: square brackets and `BREAK` are text, a weight
scales the difference from the states of an empty prompt, long prompts are split between words, and
weights of nested brackets do not multiply if one of them is a number.

Sources: https://github.com/comfyanonymous/ComfyUI, `comfy/sd1_clip.py`;
https://github.com/AUTOMATIC1111/stable-diffusion-webui, `modules/sd_hijack_clip.py` and
`modules/sd_models_xl.py`.
"""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any, Literal, cast

import torch
from torch import Tensor

from fidelora.errors import RecipeError
from fidelora.families.clip import ClipEncoder, PromptEmbedding, RunEncoder
from fidelora.families.clip_chunks import MAX_CHUNKS
from fidelora.families.emphasis import BREAK, Emphasis, Span, spans_of

TextRule = Literal["plain", "original", "no_norm", "ignore", "comfyui"]
"""Rule for brackets and long prompts. `plain`: as in training and in diffusers, brackets are text
and prompts are truncated. `original`, `no_norm`, `ignore`: settings of A1111."""

_LONG_WORD = 8  # ComfyUI splits words of at least this many tokens between two chunks
_NESTED = re.compile(r"[()]")
_UP = 1.1
_ESCAPED = (("\\)", "\0\1"), ("\\(", "\0\2"))
"""Escaped brackets, and the characters that stand for them until the brackets are parsed."""


def comfyui_spans(prompt: str, weight: float = 1.0) -> list[Span]:
    """Return the parts of a prompt with their weights, as ComfyUI parses round brackets."""
    for escaped, stand_in in _ESCAPED:
        prompt = prompt.replace(escaped, stand_in)
    spans = _spans(prompt, weight)
    return [Span(text.replace("\0\1", ")").replace("\0\2", "("), one) for text, one in spans]


def _spans(text: str, weight: float) -> list[Span]:
    spans = []
    for part in _top_level(text):
        if len(part) < 2 or not (part.startswith("(") and part.endswith(")")):
            spans.append(Span(part, weight))
            continue
        inner = part[1:-1]
        head, colon, number = inner.rpartition(":")
        inner_weight = weight * _UP
        if colon and head:
            with suppress(ValueError):  # a colon that belongs to the text
                inner_weight, inner = float(number), head
        spans += _spans(inner, inner_weight)
    return spans


def _top_level(text: str) -> list[str]:
    """Split a text into bracketed parts, with their brackets, and the parts between them."""
    parts, start, depth = [], 0, 0
    for match in _NESTED.finditer(text):
        if match[0] == "(":
            if depth == 0:
                parts.append(text[start : match.start()])
                start = match.start()
            depth += 1
        else:
            depth -= 1
            if depth == 0:
                parts.append(text[start : match.end()])
                start = match.end()
    return [part for part in (*parts, text[start:]) if part]


def plain_text(prompt: str, rule: TextRule) -> str | None:
    """Return a prompt without escapes, for the rule `plain`; None if words have other weights."""
    if rule == "plain":
        return prompt
    spans = comfyui_spans(prompt) if rule == "comfyui" else spans_of(prompt)
    if any(span == BREAK or (span.weight != 1 and rule != "ignore") for span in spans):
        return None
    return "".join(span.text for span in spans)


def embed(
    encoder: ClipEncoder, prompt: str, rule: TextRule, clip_skip: int, *, has_norm: bool
) -> PromptEmbedding:
    """Return the embedding of a prompt.

    Args:
        clip_skip: number of the layer whose output is used, counted from the last one (1). 0 leaves
            the choice to the family.
        has_norm: True if the final norm is applied to earlier layers, as for Stable Diffusion 1.5.

    Raises:
        RecipeError: the prompt has too many parts, or a word weight that is not a number.
    """
    if clip_skip:
        encoder = _with_clip_skip(encoder, clip_skip, has_norm=has_norm or clip_skip == 1)
    if rule != "comfyui":
        emphasis: Emphasis = "none" if rule == "plain" else rule
        return encoder.encode(prompt, emphasis)
    chunks = _comfyui_chunks(encoder, prompt)
    weights = torch.tensor([[weight for _, weight in chunk] for chunk in chunks])
    states = [_states(encoder, [token for token, _ in chunk]) for chunk in chunks]
    if bool((weights != 1).any()):
        empty, _ = _states(encoder, _filled(encoder, [_special(encoder, "bos_token_id")]))
        states = [
            ((one - empty) * row.to(one)[None, :, None] + empty, pooled)
            for (one, pooled), row in zip(states, weights, strict=True)
        ]
    return PromptEmbedding(torch.cat([one for one, _ in states], 1), "", states[0][1])


def _with_clip_skip(encoder: ClipEncoder, clip_skip: int, *, has_norm: bool) -> ClipEncoder:
    """Return an encoder of the same model that uses the states of another layer."""

    def run(model: Any, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        output = model(ids, output_hidden_states=True)
        states = output.hidden_states[-clip_skip]
        if has_norm:
            states = getattr(model, "text_model", model).final_layer_norm(states)
        return states, getattr(output, "text_embeds", None)

    return encoder.with_runner(cast(RunEncoder, run))


def _states(encoder: ClipEncoder, tokens: list[int]) -> tuple[Tensor, Tensor | None]:
    return encoder.run(torch.tensor([tokens]))


def _comfyui_chunks(encoder: ClipEncoder, prompt: str) -> list[list[tuple[int, float]]]:
    """Return the chunks of 77 tokens with their weights, start, end and padding included."""
    tokenizer = encoder.tokenizer
    chunks: list[list[tuple[int, float]]] = [[]]
    room = encoder.length - 2
    for text, weight in comfyui_spans(prompt):
        for word in filter(None, text.replace("\n", " ").split(" ")):
            ids = tokenizer(word, add_special_tokens=False, verbose=False).input_ids
            rest = [(token, weight) for token in ids]
            while len(chunks[-1]) + len(rest) > room:
                left = room - len(chunks[-1]) if len(ids) >= _LONG_WORD else 0
                chunks[-1] += rest[:left]
                rest = rest[left:]
                chunks.append([])
            chunks[-1] += rest
    if len(chunks) > MAX_CHUNKS:
        raise RecipeError(
            f"A prompt has {len(chunks)} parts of {room} tokens; the maximum is {MAX_CHUNKS}.",
            field="prompt",
        )
    start, end = _special(encoder, "bos_token_id"), _special(encoder, "eos_token_id")
    padding = _special(encoder, "pad_token_id")
    return [
        [(start, 1.0), *chunk, (end, 1.0), *[(padding, 1.0)] * (room - len(chunk))]
        for chunk in chunks
    ]


def _filled(encoder: ClipEncoder, tokens: list[int]) -> list[int]:
    """Return the tokens of an empty prompt, whose states ComfyUI's weights refer to."""
    end, padding = _special(encoder, "eos_token_id"), _special(encoder, "pad_token_id")
    return [*tokens, end, *[padding] * (encoder.length - len(tokens) - 1)]


def _special(encoder: ClipEncoder, name: str) -> int:
    return cast(int, getattr(encoder.tokenizer, name))
