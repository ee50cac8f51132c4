"""`fidelora generate` with SDXL."""

from __future__ import annotations

import pytest
from tests.cli.training_support import SDXL_BASE
from tests.support import LORA, SDXL_DORA

from fidelora.images.read import read_record

pytestmark = pytest.mark.usefixtures("golden_threads")


def test_generate_supports_sdxl(fidelora, tmp_path):
    small = ("--width", "64", "--height", "64", "--steps", "2")
    code, _, err = fidelora(
        "generate",
        "a ball",
        "--model",
        "sdxl",
        *SDXL_BASE,
        *small,
        "--lora",
        str(SDXL_DORA),
        "--negative-2",
        "ugly",
        "--guidance-rescale",
        "0.5",
        "--out",
        "x.png",
    )
    assert code == 0, err
    recipe = read_record(tmp_path / "x.png")["recipe"]
    assert (recipe["model"], recipe["negative_prompt_2"], recipe["guidance_rescale"]) == (
        "sdxl",
        "ugly",
        0.5,
    )
    code, _, err = fidelora("generate", "a ball", *SDXL_BASE, *small)
    assert (
        code,
        "is a base model of Stable Diffusion XL, not of Stable Diffusion 1.5; "
        "use it with model sdxl." in err,
    ) == (1, True)
    code, _, err = fidelora(
        "generate", "a ball", "--model", "sdxl", *SDXL_BASE, *small, "--lora", str(LORA)
    )
    assert (code, "Use the adapter with model sd15." in err) == (1, True)
