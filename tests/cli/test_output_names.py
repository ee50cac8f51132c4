"""Names of image files: folders, single files and name templates."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from fidelora.cli.output_names import FIELDS, parse_output
from fidelora.errors import RecipeError
from fidelora.recipe import AdapterRef, Recipe

NOW = datetime(2031, 2, 3, 4, 5, 6)
LORAS = (AdapterRef("a" * 64, 0.5, "my lora/v1"), AdapterRef("b" * 64, name=""))


def paths(out: str, *recipes: Recipe, image_format: str | None = None, sets: int = 1) -> list[str]:
    prompts = list(dict.fromkeys(recipe.prompt for recipe in recipes))
    names = parse_output(out, image_format, prompts=len(prompts), adapter_sets=sets)
    images = [(recipe, prompts.index(recipe.prompt) + 1) for recipe in recipes]
    return [path.as_posix() for path in names.paths(images, NOW)]


def image(prompt: str = "a ball", seed: int = 7, **fields) -> Recipe:
    return Recipe(prompt=prompt, seed=seed, **fields)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{seed:04}.png", "0007.png"),
        ("out/{prompt}_{seed}.jpg", "out/a_Ball_at_night_7.jpg"),
        ("{lora}/{index}", "my_lora_v1+bbbbbbbb/1.png"),
        ("{multiplier}-{steps}-{guidance:.1f}.webp", "0.5+1-25-6.0.webp"),
        ("{model}_{sampler}_{width}x{height}.png", "sd15_ddpm_512x512.png"),
        ("{date} {time} {prompt_index}.png", "2031-02-03 040506 1.png"),
        ("{{{seed}}}.png", "{7}.png"),
        ("v{seed}/", "v7/fidelora_7.png"),
    ],
)
def test_fields_of_a_template_are_filled(template, expected):
    recipe = image("a 'Ball'\n at/night?", adapters=LORAS)
    assert paths(template, recipe) == [expected]


def test_every_field_has_a_value():
    for field in FIELDS:
        (path,) = paths(f"x{{{field}}}.png", image())
        assert path.startswith("x")
        assert "{" not in path


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("{sed}.png", "unknown field {sed}"),
        ("{}.png", "unknown field {}"),
        ("{seed.real}.png", "unknown field {seed.real}"),
        ("{prompt[0]}.png", "unknown field {prompt[0]}"),
        ("{seed:{index}}.png", "fields inside the format"),
        ("{seed", "is not a name template"),
        ("{prompt:d}.png", "invalid format"),
    ],
)
def test_an_invalid_template_is_refused(out, words):
    with pytest.raises(RecipeError, match=r"--output") as caught:
        paths(out, image())
    assert words in str(caught.value)


def test_names_in_a_folder_tell_prompts_and_loras_apart():
    both = [image("a"), image("b")]
    assert paths("x", *both) == ["x/fidelora_1_7.png", "x/fidelora_2_7.png"]
    assert paths("x/", image(adapters=LORAS[:1]), sets=2) == ["x/fidelora_my_lora_v1_7.png"]
    assert paths("/", image()) == ["/fidelora_7.png"]


def test_a_template_never_names_a_file_twice_or_replaces_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.png").write_bytes(b"")
    assert paths("{prompt}.png", image("a"), image("a", 8)) == ["a_2.png", "a_3.png"]
    assert Path("a.png").read_bytes() == b""
    assert paths("a.png", image("a")) == ["a.png"]
    assert paths("a.png", image("a"), image("a", 8)) == ["a_1.png", "a_2.png"]


def test_an_existing_folder_may_have_braces(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("{x}").mkdir()
    assert paths("{x}", image()) == ["{x}/fidelora_7.png"]


def test_long_prompts_are_shortened_at_a_character():
    (name,) = paths("{prompt}.png", image("ü" * 500))
    assert name == "ü" * 40 + ".png"
    assert paths("{prompt}.png", image("../../etc")) == ["etc.png"]
    assert paths("{prompt}.png", image("!?")) == ["prompt.png"]
