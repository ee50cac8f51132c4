"""Causes of differences, and prompts that are equal although they are written in another way."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fidelora.explain.differences import changed_causes
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
