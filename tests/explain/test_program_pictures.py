"""Pictures that ComfyUI and A1111 made are read; see program_pictures/README.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.support import read_json

from fidelora.explain.programs import Sampling, sampling_of
from fidelora.explain.read_picture import read_picture
from fidelora.explain.reading import UsedLora
from fidelora.families import get_family

FOLDER = Path(__file__).parent / "program_pictures"
PICTURES: list[dict[str, Any]] = read_json(FOLDER / "pictures.json")
SAMPLINGS = {
    ("ddim", "ddim_uniform"): ("euler", "ddim_uniform"),
    ("Euler", "DDIM"): ("euler", "ddim_uniform"),
    ("Euler", "Exponential"): ("euler", "exponential"),
    ("Euler a", "Automatic"): ("euler_ancestral", "normal"),
    ("DDIM", "Automatic"): ("euler", "ddim_timesteps"),
    ("Heun", "SGM Uniform"): ("heun", "sgm_uniform"),
    ("LCM", "Automatic"): ("lcm", "normal"),
    ("DPM++ 2M", "Automatic"): ("dpmpp_2m", "karras"),
    ("DPM++ 2S a", "Karras"): ("dpmpp_2s_ancestral", "karras"),
    ("DPM++ SDE", "Automatic"): ("dpmpp_sde", "karras"),
    ("DPM++ 2M SDE", "Karras"): ("dpmpp_2m_sde", "karras"),
    ("DPM++ 2M SDE Heun", "Automatic"): ("dpmpp_2m_sde_heun", "exponential"),
}
"""Sampler and schedule of the simulation by those of A1111, and of ComfyUI's DDIM."""
NOISES = {"CPU": "cpu", "NV": "gpu"}


@pytest.mark.parametrize("entry", PICTURES, ids=lambda entry: Path(entry["file"]).stem)
def test_all_settings_that_the_program_writes_are_read(entry):
    found = read_picture((FOLDER / entry["file"]).read_bytes(), entry["file"])
    made = entry["settings"]
    assert found.program == entry["program"]
    assert (found.prompt or "").strip() == made["prompt"]
    assert found.negative_prompt == made["negative"]
    assert (found.seed, found.steps) == (made["seed"], made["steps"])
    assert found.guidance_scale == made["cfg"]
    assert (found.width, found.height) == (made["width"], made["height"])
    assert (found.clip_skip or 1) == made["clip_skip"]
    names = made["sampler"], made["scheduler"]
    expected = Sampling("k-diffusion", *SAMPLINGS.get(names, names))
    assert sampling_of(found, get_family("sd15")) == expected
    strengths = [(one.strength, one.text_strength) for one in found.loras or ()]
    assert strengths == ([tuple(made["lora"])] if any(made["lora"]) else [])
    assert all(isinstance(one, UsedLora) and one.name == "sks" for one in found.loras or ())
    assert found.base_model.name == "narrow"
    assert found.unsupported == ()


@pytest.mark.parametrize("entry", PICTURES, ids=lambda entry: Path(entry["file"]).stem)
def test_source_of_the_noise_is_read(entry):
    found = read_picture((FOLDER / entry["file"]).read_bytes(), entry["file"])
    if entry["program"] == "A1111":
        made = entry["settings"]
        assert found.noise_source == NOISES[made["noise"]]
        assert found.seed_delta == made["seed_delta"]
