"""Prompts, sizes and sets of LoRAs of `fidelora generate`."""

from __future__ import annotations

import io
import json
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from fidelora.cli.image_plan import (
    adapter_sets,
    plan_recipes,
    read_prompts,
    read_size,
    trigger_remarks,
)
from fidelora.errors import AdapterNotFoundError, RecipeError
from fidelora.recipe import Noise


class Stdin:
    """Stands for stdin with the given bytes."""

    def __init__(self, content: bytes) -> None:
        self.buffer = io.BytesIO(content)


def save_lora(path, **metadata: str) -> str:
    path.parent.mkdir(exist_ok=True)
    tensors = {
        "lora_unet_x.lora_down.weight": np.zeros((4, 8), "float32"),
        "lora_unet_x.lora_up.weight": np.zeros((8, 4), "float32"),
    }
    save_file(tensors, path, metadata or None)
    return str(path)


def no_noise(_: object) -> Noise:
    return "modern"


def names(sets) -> list[list[tuple[str, float]]]:
    return [[(ref.name, ref.multiplier) for ref in one] for one in sets]


def test_prompts_come_from_the_argument_a_file_or_stdin(tmp_path, monkeypatch):
    content = "\ufeffa red ball\r\n\n  ein grüner Ball \n".encode()
    (tmp_path / "p.txt").write_bytes(content)
    expected = ["a red ball", "ein grüner Ball"]
    assert read_prompts("a\nb", None) == ["a\nb"]
    assert read_prompts(None, str(tmp_path / "p.txt")) == expected
    for prompt, file in (("-", None), (None, "-")):
        monkeypatch.setattr(sys, "stdin", Stdin(content))
        assert read_prompts(prompt, file) == expected


@pytest.mark.parametrize(
    ("prompt", "content", "words"),
    [
        ("a", b"b", "both set"),
        (None, b" \n\n", "contains no prompt"),
        (None, b"\xff\xfe", "not UTF-8"),
        (None, None, "cannot be read: No such file"),
    ],
)
def test_prompts_that_cannot_be_used_are_errors(tmp_path, prompt, content, words):
    file = tmp_path / "p.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(RecipeError, match=words):
        read_prompts(prompt, str(file))
    with pytest.raises(RecipeError, match=r"give PROMPT, - to read prompts from stdin"):
        read_prompts(None, None)


@pytest.mark.parametrize(
    ("size", "width", "height"),
    [("768x512", 768, 512), ("512", 512, 512), ("64X72", 64, 72), (" 640 × 480 ", 640, 480)],
)
def test_a_size_sets_width_and_height(size, width, height):
    assert read_size(size, None, None) == {"width": width, "height": height}


@pytest.mark.parametrize("size", ["", "x", "512x", "-512x512", "512x512x3", "big", "5e2"])
def test_an_invalid_size_is_refused(size):
    with pytest.raises(RecipeError, match=r"--size is .*WIDTHxHEIGHT"):
        read_size(size, None, None)


def test_a_size_and_a_width_are_refused_together():
    assert read_size(None, 64, None) == {"width": 64}
    with pytest.raises(RecipeError, match=r"together with --width or --height"):
        read_size("512", None, 512)


def test_a_folder_or_a_pattern_stands_for_its_loras_in_turn(tmp_path):
    for number in (10, 9):
        save_lora(tmp_path / "run" / f"sks_{number}.safetensors")
    (tmp_path / "run" / "optimizer.pt").write_bytes(b"")
    other = save_lora(tmp_path / "style.safetensors")
    folder, pattern = str(tmp_path / "run"), str(tmp_path / "r*" / "*9*")
    assert names(adapter_sets([f"{folder}:0.5"])) == [[("sks_9", 0.5)], [("sks_10", 0.5)]]
    assert names(adapter_sets([other, pattern])) == [[("style", 1.0), ("sks_9", 1.0)]]
    pairs = names(adapter_sets([folder, f"{folder}:2"]))
    assert [[one for one, _ in pair] for pair in pairs] == [
        ["sks_9", "sks_9"], ["sks_9", "sks_10"], ["sks_10", "sks_9"], ["sks_10", "sks_10"],
    ]  # fmt: skip
    assert adapter_sets([]) == [()]


def test_existing_names_are_not_patterns(tmp_path):
    path = save_lora(tmp_path / "a[1].safetensors")
    assert names(adapter_sets([path])) == [[("a[1]", 1.0)]]
    assert names(adapter_sets([f"{path}:0.5"])) == [[("a[1]", 0.5)]]


@pytest.mark.parametrize(
    ("lora", "words"),
    [("empty", "has no .safetensors file"), ("*.safetensors:0.5", "No .safetensors file matches")],
)
def test_a_folder_or_pattern_without_loras_is_an_error(tmp_path, lora, words):
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterNotFoundError, match=words):
        adapter_sets([str(tmp_path / lora)])


def test_too_many_images_are_refused(tmp_path):
    for number in range(11):
        save_lora(tmp_path / "run" / f"{number}.safetensors")
    with pytest.raises(RecipeError, match=r"would make 1,331 images; the maximum is 1,000"):
        adapter_sets([str(tmp_path / "run")] * 3)
    with pytest.raises(RecipeError, match=r"would make 1,001 images"):
        plan_recipes(["a"] * 77, [()], None, 13, no_noise, {"model": "sd15"})


def test_every_prompt_and_set_has_the_same_seeds():
    planned = plan_recipes(["a", "b"], [(), ()], None, 2, no_noise, {"model": "sd15", "seed": 5})
    assert [[(one.prompt, one.seed) for one in recipes] for recipes in planned] == [
        [("a", 5), ("a", 6), ("b", 5), ("b", 6)]
    ] * 2


def test_the_trigger_word_of_each_lora_is_used_and_reported(tmp_path):
    tags = json.dumps({"1_sks": {"sks": 1}})
    first = save_lora(tmp_path / "a.safetensors", ss_tag_frequency=tags)
    save_lora(tmp_path / "b.safetensors", **{"modelspec.trigger_phrase": "ohwx man"})
    sets = adapter_sets([str(tmp_path)])
    planned = plan_recipes(["a [trigger]", "b"], sets, None, 1, no_noise, {"model": "sd15"})
    assert [[one.prompt for one in recipes] for recipes in planned] == [
        ["a sks", "b"],
        ["a ohwx man", "b"],
    ]
    notes, warnings = trigger_remarks(["a [trigger]"], sets, None)
    assert notes == [
        "[trigger] is 'sks', the trigger word in the metadata of the LoRA a.",
        "[trigger] is 'ohwx man', the trigger word in the metadata of the LoRA b.",
    ]
    assert warnings == []
    assert trigger_remarks(["a ball"], sets, None) == ([], [])
    assert trigger_remarks(["a [trigger]"], adapter_sets([first]), "own") == ([], [])


def test_an_unknown_trigger_word_is_a_warning(tmp_path):
    sets = adapter_sets([save_lora(tmp_path / "a.safetensors")])
    notes, (warning,) = trigger_remarks(["a [trigger]"], sets, None)
    assert notes == []
    assert "[trigger] stays in the prompt" in warning
    assert trigger_remarks(["a [trigger]"], sets, "") == ([], [])
    _, (warning,) = trigger_remarks(["a ball"], sets, "sks")
    assert warning.startswith("--trigger has no effect")
