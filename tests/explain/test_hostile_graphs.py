"""Damaged and hostile graphs of ComfyUI, which must be read within limits of time and memory."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from tests.explain.other_programs import png

from fidelora.explain.comfyui_graph import read_graph
from fidelora.explain.read_picture import read_picture

DIGITS = "9" * 4000
SAMPLER = {
    "class_type": "KSampler",
    "inputs": {
        "steps": 20, "cfg": 7, "sampler_name": "euler", "seed": 1, "model": ["m", 0],
        "positive": ["p", 0], "negative": ["p", 0], "latent_image": ["l", 0],
    },
}  # fmt: skip
STACK = ("lora_stack", "optional_lora_stack", "lora_stack_opt")


def node(**inputs: Any) -> dict[str, Any]:
    return {"class_type": "X", "inputs": inputs}


def doubled(text: str, times: int) -> dict[str, Any]:
    """Return nodes of which each contains the text of the next one twice."""
    nodes = {f"t{i}": node(a=[f"t{i + 1}", 0], b=[f"t{i + 1}", 0]) for i in range(times)}
    return {**nodes, f"t{times}": node(a=text), "p": node(text=["t0", 0])}


TOO_COMPLEX: dict[str, dict[str, Any]] = {
    "a text of itself": {"p": node(text=["p", 0], b=["p", 0])},
    "a number of itself": {"l": node(width=["q", 0]), "q": node(a=["q", 0], b=["q", 0])},
    "a LoRA stack of itself": {"m": node(**{key: ["m", 0] for key in STACK})},
    "a text of 2**28 words": doubled("word", 28),
    "a text of 4 MiB": doubled("a" * 2**10, 12),
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", TOO_COMPLEX)
def test_graphs_that_are_too_complex_are_not_read(name):
    found = read_graph({"3": SAMPLER, **TOO_COMPLEX[name]})
    assert found is not None
    assert (found.program, found.steps, found.prompt) == ("ComfyUI", None, None)
    assert found.unsupported == (
        "The picture's graph of nodes is damaged or too complex, and is not read.",
    )


def test_texts_and_chains_within_the_limits_are_read():
    found = read_graph({"3": SAMPLER, **doubled("a", 10)})
    assert found is not None
    assert found.prompt == "a" * 2**10
    chain = {f"c{i}": node(a=[f"c{i + 1}", 0]) for i in range(150)}
    found = read_graph({"3": SAMPLER, **chain, "c150": node(a="x"), "p": node(text=["c0", 0])})
    assert found is not None
    assert found.prompt == "x"


@pytest.mark.timeout(30)
def test_the_sampler_is_found_among_many_ends_in_linear_time():
    """Each of 20,000 nodes saves pictures of the next, and only the last leads to a sampler."""
    count = 20_000
    nodes = {f"n{i}": node(images=[f"n{i + 1}", 0]) for i in range(count)}
    nodes[f"n{count}"] = SAMPLER
    # In reverse, so that each end begins one node before the others.
    found = read_graph(dict(reversed(nodes.items())))
    assert found is not None
    assert found.steps == 20


@pytest.mark.parametrize(
    "nodes",
    [
        {"m": node(**{f"lora_{DIGITS}": "a"})},
        {"m": node(lora_stack=["m", 0])},
        {"p": node(text=["c0", 0]), **{f"c{i}": node(a=[f"c{i + 1}", 0]) for i in range(900)}},
        {"m": node(lora_1="a", lora_count=int(DIGITS))},
        {"l": node(width=int(DIGITS), height="9" * 5000)},
        {"l": node(width=float("nan"), height=float("inf"))},
        {"m": {"class_type": ["X"], "inputs": {"lora_name": {"content": [1]}}}},
        {"p": node(text=[{}, 1])},
    ],
)
def test_values_that_are_not_possible_are_left_out(nodes):
    text = json.dumps({"3": SAMPLER, **nodes})
    found = read_picture(png(np.zeros((8, 8, 3), np.uint8), prompt=text))
    assert (found.program, found.steps) == ("ComfyUI", 20)
    assert (found.width, found.height) == (None, None)
