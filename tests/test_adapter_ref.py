"""References to adapters, and the trigger word in prompts."""

from __future__ import annotations

import hashlib
import os

import pytest
from tests.recipe_support import SOUND

from fidelora.errors import AdapterError, AdapterNotFoundError, RecipeError, WeightsFileError
from fidelora.recipe import AdapterRef, Recipe, replace_trigger


def test_the_trigger_word_is_not_inserted_into_a_text_that_gets_too_long():
    assert replace_trigger("[trigger] and [name]", "sks") == "sks and sks"
    assert replace_trigger("[trigger]", "x" * 10_000) == "x" * 10_000
    with pytest.raises(RecipeError, match="With the trigger word in 2 places") as caught:
        replace_trigger("[trigger][name]", "x" * 5_001)
    assert caught.value.field == "prompt"
    assert replace_trigger("a" * 20_000, "sks") == "a" * 20_000  # the recipe refuses it


def test_a_reference_from_a_file_has_its_hash_name_and_path(tmp_path):
    path = tmp_path / "sub" / ".." / "my style.v2.safetensors"
    (tmp_path / "sub").mkdir()
    path.write_bytes(SOUND)
    ref = AdapterRef.from_file(str(path), -0.5)
    assert ref.sha256 == hashlib.sha256(SOUND).hexdigest()
    assert ref.multiplier == -0.5
    assert ref.name == "my style.v2"
    assert ref.path == tmp_path / "my style.v2.safetensors"


def test_a_reference_from_a_file_has_multiplier_one_if_none_is_given(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(SOUND)
    assert AdapterRef.from_file(tmp_path / "a.safetensors").multiplier == 1.0


def test_a_reference_to_a_missing_file_is_refused(tmp_path):
    with pytest.raises(
        AdapterNotFoundError,
        match=r"The adapter file .*nowhere\.safetensors does not exist; check the path",
    ):
        AdapterRef.from_file(tmp_path / "nowhere.safetensors")


def test_a_reference_to_a_folder_is_refused(tmp_path):
    with pytest.raises(AdapterError, match="is a folder, not an adapter file"):
        AdapterRef.from_file(tmp_path)


def test_a_reference_from_a_file_checks_the_multiplier(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(SOUND)
    with pytest.raises(RecipeError, match="multiplier is 6"):
        AdapterRef.from_file(tmp_path / "a.safetensors", 6)


@pytest.mark.parametrize(
    ("prompt", "trigger", "expected"),
    [
        ("a [trigger] ball", "sks", "a sks ball"),
        ("a [name] ball", "sks", "a sks ball"),
        ("[name] and [trigger] and [trigger]", "sks", "sks and sks and sks"),
        ("a ball", "sks", "a ball"),
        ("a [trigger] and [name]", "", "a [trigger] and [name]"),
        ("a [Trigger] ball", "sks", "a [Trigger] ball"),
    ],
)
def test_the_trigger_word_replaces_its_placeholder(prompt, trigger, expected):
    assert replace_trigger(prompt, trigger) == expected


def test_undecodable_characters_of_a_file_name_are_replaced(tmp_path):
    path = tmp_path / "caf\udce9.safetensors"
    path.write_bytes(SOUND)
    ref = AdapterRef.from_file(path)
    assert ref.name == "caf?"
    assert Recipe(prompt="", adapters=(ref,)).to_json().encode()


def test_a_path_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(AdapterNotFoundError, match=r"The adapter file .* does not exist"):
        AdapterRef.from_file(tmp_path / "file" / "x.safetensors")


@pytest.mark.parametrize(
    "content", [b"<html>", b"", (60 * 2**20).to_bytes(8, "little") + b"{" * 600]
)
def test_the_header_is_checked_before_the_rest_is_read(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(WeightsFileError):
        AdapterRef.from_file(tmp_path / "a.safetensors")


def test_pipes_and_devices_are_not_read(tmp_path):
    """Reading a pipe or an endless device would never return."""
    os.mkfifo(tmp_path / "pipe.safetensors")
    for place in (tmp_path / "pipe.safetensors", "/dev/zero", "a\0b"):
        with pytest.raises(AdapterNotFoundError):
            AdapterRef.from_file(place)
