"""Causes of differences, and prompts that are equal although they are written in another way."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fidelora.explain.differences import Difference, changed_causes
from fidelora.explain.document import lines_of
from fidelora.explain.explain import Explanation
from fidelora.explain.nearest import NearestThere, with_sampler_advice
from fidelora.explain.prompts import plain_text
from fidelora.explain.simulation import Simulation

TRAINER = Simulation(
    prompt="sks", width=64, height=64, seed=1, steps=4, guidance_scale=3.0, sampler="ddim"
)
ANCESTRAL = replace(TRAINER, library="k-diffusion", sampler="euler_ancestral", schedule="normal")


def test_numbers_of_the_steps_belong_to_the_sampler_of_the_picture():
    theirs = replace(ANCESTRAL, step_noise="gpu", seed_delta=3)
    assert changed_causes(theirs, TRAINER, "sks") == ["sampler"]
    on_gpu = replace(theirs, device="gpu")
    assert changed_causes(on_gpu, TRAINER, "sks") == ["sampler", "noise"]


def test_numbers_of_the_steps_differ_if_training_draws_them():
    trainer = replace(TRAINER, sampler="ddpm")
    theirs = replace(trainer, step_noise="gpu")
    assert changed_causes(theirs, trainer, "sks") == ["noise"]


def test_upsampling_is_a_cause():
    assert changed_causes(replace(TRAINER, doubles_sizes=True), TRAINER, "") == ["upsampling"]


@pytest.mark.parametrize(
    ("prompt", "rule", "expected"),
    [
        (r"a \(big\) [cat]", "comfyui", "a (big) [cat]"),
        ("a (big) cat", "comfyui", None),
        (r"a \(big\) \[cat\]", "original", "a (big) [cat]"),
        (r"a \(big\) [cat]", "no_norm", None),
        ("a ((big) [cat]:1.2)", "ignore", "a big cat"),
        ("a BREAK cat", "ignore", None),
        (r"a \(big\) [cat]", "plain", r"a \(big\) [cat]"),
    ],
)
def test_escaped_brackets_are_text(prompt, rule, expected):
    assert plain_text(prompt, rule) == expected


@pytest.mark.parametrize(
    ("cause", "theirs", "is_always"),
    [
        ("schedule", "ddim, ddim_uniform", True),
        ("schedule", "ddim, normal", False),
        ("sampler", "ddim, ddim_uniform", False),
        ("steps", "ddim, ddim_uniform", False),
    ],
)
def test_only_the_nearest_schedule_is_of_the_program(cause, theirs, is_always):
    there = NearestThere("ddim, ddim_uniform", 0.2)
    found = with_sampler_advice(Difference(cause, theirs, "ddim", 0.2, ""), there, "ComfyUI")
    assert found.is_always is is_always
    assert ("nearest sampler" in found.advice) is (cause != "steps")


@pytest.mark.parametrize("theirs", ["Euler, DDIM", "DDIM"])
def test_a_schedule_as_near_as_the_nearest_is_of_the_program(theirs):
    there = NearestThere("DDIM", 0.25, as_near=("DDIM", "Euler, DDIM"))
    found = with_sampler_advice(Difference("schedule", theirs, "ddim", 0.2, ""), there, "A1111")
    assert found.is_always


ALWAYS = Difference("upsampling", "doubles", "resizes", 0.6, "", is_always=True)
STEPS = Difference("steps", "9", "8", 4.0, "")
NOTHING_CHOSEN = "No setting that you can change differs. A1111 always does this differently:"


@pytest.mark.parametrize(
    ("differences", "after", "heading"),
    [
        ((ALWAYS,), 0.0, NOTHING_CHOSEN),
        ((ALWAYS,), 4.0, "A1111 always does this differently:"),
        ((STEPS, ALWAYS), 0.0, "A1111 always does this differently:"),
        ((STEPS,), 0.0, None),
    ],
)
def test_the_output_separates_what_a_program_always_does(differences, after, heading):
    pixels = np.zeros((8, 8, 3), np.uint8)
    alignment: Any = SimpleNamespace(plan=SimpleNamespace(index=0, round=1), reason="it is alike")
    picture: Any = SimpleNamespace(name="x.png")
    reading: Any = SimpleNamespace(program="A1111", version="1.10.1", is_empty=False)
    found = Explanation(
        picture, reading, "A1111", alignment, pixels, TRAINER, pixels, 4.6, after, differences
    )
    lines = list(lines_of(found))
    settings = [line for line in lines if line.startswith("  ")]
    assert [line.split()[0] for line in settings] == [one.cause for one in differences]
    assert [line for line in lines if "always" in line] == ([heading] if heading else [])
    if heading:
        assert lines[lines.index(heading) + 1] == settings[-1]
