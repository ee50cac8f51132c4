"""The text that replaces `[trigger]`."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from fidelora.loras.describe import describe_adapter
from fidelora.loras.trigger import Trigger, has_placeholder, trigger_of
from fidelora.recipe import AdapterRef

LORA = {
    "lora_unet_x.lora_down.weight": np.zeros((4, 8), "float32"),
    "lora_unet_x.lora_up.weight": np.zeros((8, 4), "float32"),
}


@pytest.fixture
def save(tmp_path):
    def save(name: str, tensors=LORA, /, **metadata: str) -> AdapterRef:
        path = tmp_path / f"{name}.safetensors"
        save_file(tensors, path, metadata or None)
        return AdapterRef.from_file(path)

    return save


def test_the_first_lora_with_a_trigger_word_is_used(save):
    loras = [save("none"), save("one", ss_trigger_word="sks"), save("two", trigger_word="other")]
    assert trigger_of(loras, None) == Trigger("sks", "one")
    assert trigger_of(loras[:1], None) == Trigger("", is_missing=True)
    assert trigger_of([], None) == Trigger("", is_missing=True)
    assert trigger_of([], "") == Trigger("")
    assert trigger_of(loras, "given") == Trigger("given")


def test_an_empty_trigger_word_leaves_the_placeholder(save):
    trigger = trigger_of([save("one", ss_trigger_word="sks")], "")
    assert trigger.fill("a [trigger]") == "a [trigger]"


def test_an_embedding_precedes_the_metadata(save):
    embedding = save("emb", {"emb_params": np.zeros((2, 4), "float32")}, name="toy")
    loras = [save("one", ss_trigger_word="sks"), embedding]
    for given in (None, "", "toy"):
        assert trigger_of(loras, given) == Trigger("toy toy_1")


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"modelspec.trigger_phrase": "ohwx man"}, "ohwx man"),
        ({"modelspec.trigger_phrase": " "}, ""),
        ({"ss_trigger_word": "a", "modelspec.trigger_phrase": "b"}, "a"),
        ({"ss_tag_frequency": json.dumps({"1_p": {"p": 1}})}, "p"),
        ({"ss_trigger_word": "", "ss_tag_frequency": json.dumps({"1_p": {"p": 1}})}, "p"),
    ],
)
def test_metadata_of_several_programs_is_read(save, metadata, expected):
    ref = save("x", **metadata)
    assert ref.path is not None
    assert describe_adapter(ref.path).trigger == expected
    assert trigger_of([ref], None).text == expected


def test_a_file_that_is_not_open_is_read_again(save):
    ref = save("one", ss_trigger_word="sks")
    assert trigger_of([AdapterRef(ref.sha256, name="cached", path=ref.path)], None) == Trigger(
        "sks", "cached"
    )
    assert trigger_of([AdapterRef(ref.sha256)], None) == Trigger("", is_missing=True)


def test_the_note_names_the_source_once_it_is_used():
    trigger = Trigger("sks", "one")
    note = "[trigger] is 'sks', the trigger word in the metadata of the LoRA one."
    assert trigger.note(["a", "[name] b"]) == note
    assert trigger.note(["a"]) == Trigger("sks").note(["[trigger]"]) == ""
    assert Trigger("").note(["[trigger]"]) == Trigger("", is_missing=True).note(["a"]) == ""
    assert "stays in the prompt" in Trigger("", is_missing=True).note(["a", "[name]"])
    assert has_placeholder("a [name]")
    assert not has_placeholder("trigger")
