"""Known few-step LoRAs: which files are recognised, and which settings are proposed."""

from __future__ import annotations

import dataclasses
import re

import pytest

from fidelora import AdapterRef, Recipe
from fidelora.families import get_family
from fidelora.loras.few_step import FEW_STEP_LORAS, proposals, recognise_few_step_lora

UNKNOWN = "0" * 64
CFG_LORA = "f6123d5b950d5250ab6c33600e27f4dcf71b3099ebf888685e01e9e8117ce482"


def recipe(name: str, sha256: str = UNKNOWN, multiplier: float = 1.0, **fields: object) -> Recipe:
    adapter = AdapterRef(sha256, multiplier, name=name)
    return Recipe(prompt="", adapters=(adapter,), **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("lora", FEW_STEP_LORAS, ids=lambda lora: lora.name)
def test_every_recommended_setting_is_a_valid_recipe(lora):
    settings = lora.settings
    made = recipe(
        lora.name, model=lora.model, sampler=settings.sampler, steps=settings.steps,
        guidance_scale=settings.guidance_scale, timestep_spacing=settings.timestep_spacing,
        eta=settings.eta,
    )  # fmt: skip
    assert list(proposals(made)) == []
    assert settings.min_steps <= settings.steps <= settings.max_steps
    assert settings.max_steps <= get_family(lora.model).samplers[settings.sampler].max_steps
    (sentence,) = proposals(recipe(lora.name, model=lora.model))
    assert settings.options() in sentence


def test_names_and_hashes_identify_one_lora_each():
    hashes = [lora.sha256 for lora in FEW_STEP_LORAS if lora.sha256]
    assert len(set(hashes)) == len(hashes)
    assert all(re.fullmatch("[0-9a-f]{64}", one) for one in hashes)
    for lora in FEW_STEP_LORAS:
        found = recognise_few_step_lora(lora.name, UNKNOWN)
        assert found is not None
        assert (found.lora, found.by) == (lora, "name")


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("Hyper-SD15-8steps-CFG-lora", "Hyper-SD15-8steps-CFG-lora"),
        ("hyper_sd15_8steps_cfg_lora", "Hyper-SD15-8steps-CFG-lora"),
        ("Hyper-SD15-8steps-lora (1)", "Hyper-SD15-8steps-lora"),
        ("LCM_LoRA SDXL", "lcm-lora-sdxl"),
        ("pytorch_lora_weights", ""),
        ("Hyper-SD15-8steps", ""),
        ("my-Hyper-SD15-8steps-lora", ""),
        ("", ""),
    ],
)
def test_names_are_compared_without_case_and_separators(name, known):
    found = recognise_few_step_lora(name, UNKNOWN)
    assert (found.lora.name if found else "") == known


def test_the_hash_takes_precedence_over_the_name():
    found = recognise_few_step_lora("lcm-lora-sdxl", CFG_LORA)
    assert found is not None
    assert (found.lora.name, found.by) == ("Hyper-SD15-8steps-CFG-lora", "sha256")


def test_a_proposal_names_the_options():
    (sentence,) = proposals(recipe("pytorch_lora_weights", CFG_LORA))
    assert sentence == (
        "pytorch_lora_weights is a few-step LoRA (Hyper-SD15-8steps-CFG-lora); recommended: "
        "--sampler ddim --spacing trailing --steps 8 --guidance 5. Nothing was changed."
    )
    (by_name,) = proposals(recipe("Hyper-SD15-1step-lora"))
    assert "according to its file name" in by_name
    assert "--sampler tcd --steps 1 --guidance 1 --eta 1" in by_name


@pytest.mark.parametrize(
    ("changes", "is_proposed"),
    [
        ({}, False),
        ({"guidance_scale": 8.0}, False),
        ({"guidance_scale": 4.5}, True),
        ({"steps": 12}, True),
        ({"timestep_spacing": "default"}, True),
        ({"sampler": "euler"}, True),
    ],
)
def test_recommended_ranges_need_no_proposal(changes, is_proposed):
    good = recipe(
        "x", CFG_LORA, sampler="ddim", steps=8, guidance_scale=5.0, timestep_spacing="trailing"
    )
    assert bool(list(proposals(dataclasses.replace(good, **changes)))) == is_proposed


def test_sgm_uniform_is_accepted_in_place_of_trailing():
    made = recipe(
        "sdxl_lightning_4step_lora", model="sdxl", sampler="euler", steps=4, guidance_scale=1,
        timestep_spacing="sgm_uniform",
    )  # fmt: skip
    assert list(proposals(made)) == []


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 2.0])
def test_every_scale_that_disables_guidance_is_as_recommended(scale):
    made = recipe("lcm-lora-sdv1-5", sampler="lcm", steps=4, guidance_scale=scale)
    assert list(proposals(made)) == []


def test_other_families_and_unused_loras_get_no_proposal():
    assert list(proposals(recipe("lcm-lora-sdxl"))) == []
    assert list(proposals(recipe("lcm-lora-sdv1-5", multiplier=0.0))) == []
    assert list(proposals(recipe("my style"))) == []
