"""`fidelora convert`: files, exit codes and messages."""

from __future__ import annotations

import json

import pytest
from tests.support import LOKR, LORA

from fidelora.recipe import file_sha256
from fidelora.safetensors_header import read_file_header


def test_convert_writes_a_file_that_inspect_reads(fidelora, tmp_path):
    code, out, err = fidelora("convert", str(LORA), "peft.safetensors", "--to", "peft")
    assert (code, out) == (0, "peft.safetensors\n")
    assert err.startswith("warning: The alphas are in the metadata")
    keys = read_file_header(tmp_path / "peft.safetensors").tensors
    assert all(key.startswith("unet.") and ".lora_" in key for key in keys)
    assert fidelora("inspect", "peft.safetensors")[0] == 0


def test_diffusers_is_another_name_of_peft(fidelora, tmp_path):
    for to in ("peft", "diffusers"):
        assert fidelora("convert", str(LORA), f"{to}.safetensors", "--to", to)[0] == 0
    first, second = ((tmp_path / f"{to}.safetensors").read_bytes() for to in ("peft", "diffusers"))
    assert first == second


def test_convert_prints_json(fidelora, tmp_path):
    arguments = ["convert", str(LOKR), "a.safetensors", "--to", "kohya", "--json"]
    code, out, err = fidelora(*arguments)
    assert (code, err) == (0, "")
    assert json.loads(out) == {
        "input": "lokr_full.safetensors",
        "input_sha256": file_sha256(LOKR),
        "output": "a.safetensors",
        "output_sha256": file_sha256(tmp_path / "a.safetensors"),
        "to": "kohya",
        "model": "sd15",
        "type": "lokr",
        "modules": 177,
        "notes": [],
    }


def test_an_existing_file_is_replaced_only_with_force(fidelora, tmp_path):
    target = tmp_path / "a.safetensors"
    target.write_bytes(b"mine")
    arguments = ["convert", str(LORA), "a.safetensors", "--to", "kohya"]
    code, out, err = fidelora(*arguments)
    assert (code, out) == (2, "")
    assert "a.safetensors exists; choose another name, or add --force" in err
    assert target.read_bytes() == b"mine"
    assert fidelora(*arguments, "--force")[0] == 0
    assert len(read_file_header(target).tensors) == 360
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (
            [str(LOKR), "a.safetensors", "--to", "peft"],
            1,
            "cannot express modules of the kind lokr",
        ),
        ([str(LORA), "a.pt", "--to", "peft"], 2, "a.pt does not end in .safetensors"),
        (
            ["none.safetensors", "a.safetensors", "--to", "peft"],
            2,
            "none.safetensors does not exist",
        ),
        ([str(LORA), "a.safetensors", "--to", "ldm"], 2, "'ldm' is not one of"),
        ([str(LORA), "a.safetensors"], 2, "Missing option"),
        ([str(LORA), "no/a.safetensors", "--to", "peft"], 1, "could not be written"),
        (
            [str(LORA), "a.safetensors", "--to", "peft", "--model", "zimage"],
            1,
            "modules of lora_linear_f32 are not in Z-Image",
        ),
        (
            [str(LORA), "a.safetensors", "--to", "peft", "--model", "x"],
            2,
            "The model 'x' is not supported",
        ),
    ],
)
def test_wrong_use_writes_nothing(fidelora, tmp_path, arguments, code, says):
    result, out, err = fidelora("convert", *arguments)
    assert (result, out) == (code, "")
    assert says in err
    assert list(tmp_path.iterdir()) == []
