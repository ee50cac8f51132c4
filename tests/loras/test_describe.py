"""Descriptions of adapter files, read from their headers."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from tests.support import GOLDEN_JOBS, LOKR, LORA, LORA_CONV

from fidelora.loras.describe import describe_adapter


def adapter(path, module="lora_unet_x", dtype="float32", **metadata: str):
    tensors = {
        f"{module}.lora_down.weight": np.zeros((4, 8), dtype),
        f"{module}.lora_up.weight": np.zeros((8, 4), dtype),
    }
    save_file(tensors, path, metadata or None)
    return describe_adapter(path)


def test_the_trainers_files_are_described():
    lora = describe_adapter(LORA)
    assert (lora.kind, lora.modules, lora.ranks, lora.dtypes, lora.text_encoder) == (
        "lora",
        120,
        (8,),
        ("F32",),
        False,
    )
    assert (lora.trigger, lora.step, lora.epoch, lora.base, lora.trainer) == (
        "sks",
        6,
        1,
        "sd_1.5",
        "ai-toolkit 0.12.26",
    )
    assert (lora.size_bytes, lora.problems) == (LORA.stat().st_size, ())
    assert describe_adapter(LORA_CONV).ranks == (4, 8)
    assert (describe_adapter(LOKR).kind, describe_adapter(LOKR).ranks) == ("lokr", ())
    assert describe_adapter(GOLDEN_JOBS / "prompts" / "prompts.safetensors").trigger == "p3rs0n"


def test_files_of_other_programs_are_described(tmp_path):
    path = tmp_path / "x.safetensors"
    bare = adapter(path, dtype="float16")
    assert (bare.trigger, bare.step, bare.epoch, bare.base, bare.trainer, bare.dtypes) == (
        "",
        None,
        None,
        "",
        "",
        ("F16",),
    )
    kohya = adapter(
        path, ss_steps="1200", ss_epoch="8", ss_tag_frequency=json.dumps({"img": {"a": 3, "b": 2}})
    )
    assert (kohya.step, kohya.epoch, kohya.trigger) == (
        1200,
        8,
        "",
    )  # two tags: neither is the trigger
    for module in ("lora_te_text_model_x", "text_encoder.x", "lora_te1_x"):
        assert adapter(path, module).text_encoder


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("training_info", "[]"), ("training_info", "{"),
        ("training_info", '{"step": "x", "epoch": true}'), ("ss_steps", "1e5"),
        ("ss_steps", "9" * 5000), ("ss_tag_frequency", '{"a": 1}'), ("software", "null"),
        ("training_info", "[" * 100_000),
    ],
)  # fmt: skip
def test_invalid_metadata_is_ignored(tmp_path, field, value):
    found = adapter(tmp_path / "x.safetensors", **{field: value})
    assert (found.step, found.epoch, found.trigger, found.trainer, found.problems) == (
        None,
        None,
        "",
        "",
        (),
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"<html>", "web page"),
        (b"", "too few"),
        (b"\x02\0\0\0\0\0\0\0{}", "no tensors"),
        (LORA.read_bytes()[:-4], "truncated"),
    ],
)
def test_an_invalid_file_has_a_problem(tmp_path, content, words):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    found = describe_adapter(path)
    assert (found.kind, found.modules, found.size_bytes) == ("", 0, len(content))
    (problem,) = found.problems
    assert words in problem


def test_a_missing_file_has_a_problem(tmp_path):
    (problem,) = describe_adapter(tmp_path / "none.safetensors").problems
    assert "cannot be read" in problem


@given(
    st.dictionaries(
        st.sampled_from(
            ["training_info", "software", "ss_tag_frequency", "ss_steps", "ss_trigger_word"]
        ),
        st.text(),
    )
)
def test_any_metadata_is_accepted(tmp_path_factory, metadata):
    adapter(tmp_path_factory.mktemp("a") / "x.safetensors", **metadata)
