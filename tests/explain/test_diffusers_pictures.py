"""Pictures that diffusers made are explained; see diffusers_pictures/README.md."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.support import GOLDEN_JOBS, TINY_BASE, read_json

from fidelora import Engine
from fidelora.explain.explain import explain
from fidelora.explain.picture import Picture
from fidelora.explain.programs import clip_skip_layer
from fidelora.explain.read_picture import read_picture, with_options
from fidelora.training.run_folder import read_run

pytestmark = pytest.mark.usefixtures("golden_threads")
FOLDER = Path(__file__).parent / "diffusers_pictures"
PICTURES: list[dict[str, Any]] = read_json(FOLDER / "pictures.json")


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(device="cpu")


@pytest.mark.parametrize("entry", PICTURES, ids=lambda entry: Path(entry["file"]).stem)
def test_each_difference_is_named_and_none_invented(engine, entry):
    content = (FOLDER / entry["file"]).read_bytes()
    reading = with_options(read_picture(content, entry["file"]), entry["known"])
    found = explain(
        read_run(GOLDEN_JOBS / entry["job"]),
        Picture.read(content, entry["file"]),
        replace(reading, program="diffusers"),
        engine,
        index=entry["index"],
        base_model=str(TINY_BASE),
    )
    causes = {{"schedule": "sampler"}.get(one.cause, one.cause) for one in found.differences}
    assert causes == set(entry["differences"])
    assert found.is_explained
    assert found.is_same is not bool(causes)


@pytest.mark.parametrize(
    ("program", "guidance"), [("diffusers", "--guidance"), ("Diffusers", "--cfg-scale")]
)
def test_the_command_takes_clip_skip_as_diffusers_counts(fidelora, program, guidance):
    code, out, _ = fidelora(
        "explain", str(GOLDEN_JOBS / "lora_linear_f32"), str(FOLDER / "clip_skip.png"),
        "--base-model", str(TINY_BASE), "--device", "cpu", "--index", "1", "--program", program,
        "--prompt", "a red ball on grass", "--negative", "ugly", "--steps", "9", "--sampler",
        "ddpm", guidance, "4.5", "--seed", "7", "--clip-skip", "2", "--json",
    )  # fmt: skip
    assert code == 1
    (picture,) = json.loads(out)["pictures"]
    (found,) = picture["differences"]
    assert (found["cause"], found["theirs"]) == ("clip_skip", "layer 3 from the end")


@pytest.mark.parametrize(
    ("program", "model", "layer"),
    [
        ("diffusers", "sd15", 3),
        ("diffusers", "sdxl", 4),
        ("A1111", "sd15", 2),
        ("ComfyUI", "sdxl", 2),
    ],
)
def test_clip_skip_is_counted_from_the_programs_layer(program, model, layer):
    assert clip_skip_layer(program, model, 2) == layer
    assert clip_skip_layer(program, model, None) is None
