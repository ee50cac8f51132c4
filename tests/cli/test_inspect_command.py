"""`fidelora inspect`: descriptions of adapters as text and JSON."""

from __future__ import annotations

import json

import pytest
import torch
from tests.cli.training_support import BASE
from tests.support import LORA, SDXL_DORA, TINY_ZIMAGE, ZIMAGE_LORA, save_adapter

from fidelora.recipe import AdapterRef

pytestmark = pytest.mark.usefixtures("golden_threads")


def test_inspect_describes_adapters(fidelora, tmp_path):
    code, out, err = fidelora("inspect", str(LORA), *BASE[:2])
    assert (code, err) == (0, "")
    for line in (
        "type        lora, 120 modules (UNet)",
        "rank        8",
        "alpha       4",
        "trigger     sks",
        "fits        tiny-sd15: all 120 modules",
        "No problems were found.",
    ):
        assert line in out
    code, out, _ = fidelora("inspect", str(LORA))
    assert code == 0
    assert (
        "not sd15's default base model: 120 of 120 modules have its names, none also its shapes"
        in out
    )
    code, out, _ = fidelora("inspect", str(LORA), *BASE[:2], "--json")
    found = json.loads(out)
    assert (
        found.items()
        >= {
            "type": "lora",
            "modules": 120,
            "ranks": [8],
            "alphas": [4.0],
            "dtype": "F32",
            "step": 6,
            "epoch": 1,
            "trigger": "sks",
            "problems": [],
        }.items()
    )
    assert (found["base_model_version"], found["trainer_version"]) == (
        "sd_1.5",
        "ai-toolkit 0.12.26",
    )
    assert (found["sha256"], found["size_bytes"]) == (
        AdapterRef.from_file(LORA).sha256,
        LORA.stat().st_size,
    )

    broken = save_adapter(
        tmp_path / "x.safetensors",
        {
            "lora_unet_x.lora_down.weight": torch.ones(4, 8),
            "lora_unet_x.lora_up.weight": torch.full((8, 4), float("nan")),
            "lora_unet_x.alpha": torch.tensor(float("inf")),
        },
    )
    code, out, _ = fidelora("inspect", str(broken), "--json")
    assert code == 1
    assert json.loads(out)["alphas"] == ["inf"]
    assert {problem["code"] for problem in json.loads(out)["problems"]} == {
        "not_finite",
        "infinite_alpha",
    }
    assert (
        "problem     1 tensors have NaN or infinite values" in fidelora("inspect", str(broken))[1]
    )
    assert fidelora("inspect", "nothing.safetensors")[0] == 2


def test_inspect_names_the_part_that_the_adapter_changes(fidelora):
    code, out, _ = fidelora("inspect", str(ZIMAGE_LORA), "--base-model", str(TINY_ZIMAGE))
    assert code == 0
    assert "modules (transformer)" in out
    assert "UNet" not in out


def test_inspect_identifies_an_sdxl_dora(fidelora):
    code, out, _ = fidelora("inspect", str(SDXL_DORA), "--json")
    found = json.loads(out)
    assert (code, found["model"], found["type"], found["base_model_version"]) == (
        0,
        "sdxl",
        "dora",
        "sdxl_1.0",
    )


def test_inspect_of_another_file_has_no_rows_without_a_value(fidelora, tmp_path):
    (tmp_path / "notes.txt").write_text("hello\n")
    code, out, _ = fidelora("inspect", "notes.txt")
    rows = [line.split(maxsplit=1) for line in out.splitlines()[1:]]
    assert (code, [name for name, _ in rows]) == (1, ["size", "sha256", "problem"])
    assert rows[2][1].startswith("notes.txt is a text file, not weights.")
