"""The form's values as requests, recipes as values of the form, and snippets."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fidelora.api import InferenceRequest, recipes_of
from fidelora.api.replay import ReplayRequest
from fidelora.errors import FideloraError, RecipeError, UsageError
from fidelora.families import all_families
from fidelora.recipe import MAX_SEED, AdapterRef, Recipe
from fidelora.server.page.compare_tab import read_multipliers
from fidelora.server.page.form import (
    Form,
    build_request,
    differences,
    family_defaults,
    first_recipe,
    form_for_recipe,
    preset_choices,
    preset_of,
    read_seed,
    size_presets,
)
from fidelora.server.page.snippets import (
    as_command,
    as_python,
    as_request,
    command_notes,
    request_route,
)

NUMERICS: dict[str, Any] = {"base_model": "here", "dtype": "float32", "noise": "modern"}
ADAPTERS = st.lists(
    st.builds(
        AdapterRef,
        sha256=st.text("0123456789abcdef", min_size=64, max_size=64),
        multiplier=st.floats(-5, 5),
        name=st.text("ab<>&\"' ", max_size=9),
    ),
    min_size=1,
    max_size=3,
)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@st.composite
def recipes(draw):
    model = draw(st.sampled_from(sorted(all_families())))
    uses = all_families()[model].uses
    emphases = ["none", "original"] if "emphasis" in uses else ["none"]
    stages = all_families()[model].stages
    stage = draw(st.sampled_from(stages)) if stages else None
    fields = dict(
        prompt=draw(TEXTS),
        negative_prompt=draw(TEXTS) if "negative_prompt" in uses else "",
        model=model,
        width=draw(st.integers(64, 4096)),
        height=draw(st.integers(64, 4096)),
        steps=draw(st.integers(2, 50)),  # some families need two
        guidance_scale=draw(st.floats(0, 20)),
        seed=draw(st.integers(0, MAX_SEED)),
        sampler=draw(st.sampled_from(sorted(all_families()[model].samplers))),
        adapters=tuple(replace(ref, stage=stage) for ref in draw(ADAPTERS)),
        fidelity=draw(st.sampled_from(["exact", "fast"])),
        emphasis=draw(st.sampled_from(emphases)),
        frames=draw(st.sampled_from([1, 9])) if "frames" in uses else 1,
        fps=draw(st.integers(1, 120)) if "fps" in uses else 16,
        **NUMERICS,
    )
    try:
        return Recipe(**fields)
    except RecipeError:  # emphasis does not support every prompt
        return Recipe(**fields | {"emphasis": "none"})


def make_form(loras=(("a.safetensors", 1.0),), seed=7, images=1, **fields):
    start = {"trigger_word": "sks", "prompt": "a [trigger]", "neg": "", "model": "sd15"}
    rest = {"fidelity": "exact", "output_format": "png"}
    return Form(loras, seed, images, start | family_defaults("sd15", 512) | rest | fields)


@given(recipes())
def test_a_recipe_loaded_into_the_form_makes_the_same_image(recipe):
    form = form_for_recipe(
        recipe, [f"{number}.safetensors" for number in range(len(recipe.adapters))], "png"
    )
    here = first_recipe(form, recipe.adapters, NUMERICS)
    assert differences(recipe, here) == []
    assert here.digest == recipe.digest


@given(recipes())
def test_the_request_snippet_makes_the_same_image(recipe):
    names = [f"{number}.safetensors" for number in range(len(recipe.adapters))]
    request = InferenceRequest.model_validate_json(as_request(recipe, names, "webp"))
    (here,) = recipes_of(request, recipe.adapters, NUMERICS, draw_seed=lambda: 0)
    assert here.digest == recipe.digest
    assert [lora.sha256 for lora in request.loras] == [
        adapter.sha256 for adapter in recipe.adapters
    ]


def test_snippets_contain_the_emphasis():
    recipe = Recipe(prompt="(a:1.2)", emphasis="no_norm", adapters=(AdapterRef("a" * 64),))
    assert "--emphasis=no_norm" in shlex.split(as_command(recipe, ["a.safetensors"], "png"))
    assert "emphasis='no_norm'" in as_python(recipe, ["a.safetensors"], "png", "http://a")
    request = InferenceRequest.model_validate_json(as_request(recipe, ["a.safetensors"], "png"))
    assert request.prompts[0].emphasis == "no_norm"


def test_snippets_contain_the_fields_that_the_form_lacks():
    recipe = Recipe(
        prompt="a",
        negative_prompt_2="b",
        guidance_rescale=0.7,
        sampler="tcd",
        timestep_spacing="trailing",
        eta=0.5,
        steps=8,
        model="sdxl",
        adapters=(AdapterRef("a" * 64, alpha=4.0),),
        **NUMERICS,
    )
    request = InferenceRequest.model_validate_json(as_request(recipe, ["a.safetensors"], "png"))
    (here,) = recipes_of(request, recipe.adapters, NUMERICS, draw_seed=lambda: 0)
    assert here.digest == recipe.digest
    words = shlex.split(as_command(recipe, ["a.safetensors"], "png"))
    assert {
        "--negative-2=b", "--guidance-rescale=0.7", "--spacing=trailing", "--eta=0.5",
    } <= set(words)  # fmt: skip
    python = as_python(recipe, ["a.safetensors"], "png", "http://127.0.0.1:8000")
    assert "neg_2='b'" in python
    assert "guidance_rescale=0.7" in python
    assert "timestep_spacing='trailing'" in python
    assert "eta=0.5" in python
    form = form_for_recipe(recipe, ["a.safetensors"], "png")
    found = differences(recipe, first_recipe(form, recipe.adapters, NUMERICS))
    assert [phrase.split()[0] for phrase in found] == [
        "negative_prompt_2",
        "guidance_rescale",
        "timestep_spacing",
        "eta",
        "adapters",
    ]


def test_snippets_contain_the_tiles_of_the_vae():
    recipe = Recipe(
        prompt="a",
        model="qwen_image",
        vae_tiling=True,
        adapters=(AdapterRef("a" * 64),),
        **NUMERICS,
    )
    request = InferenceRequest.model_validate_json(as_request(recipe, ["a.safetensors"], "png"))
    (here,) = recipes_of(request, recipe.adapters, NUMERICS, draw_seed=lambda: 0)
    assert here.digest == recipe.digest
    assert "--vae-tiling" in shlex.split(as_command(recipe, ["a.safetensors"], "png"))
    assert "vae_tiling=True" in as_python(recipe, ["a.safetensors"], "png", "http://127.0.0.1:8000")


def test_an_image_without_a_lora_is_requested_by_its_recipe():
    """`POST /v1/inference` requires a LoRA."""
    recipe = Recipe(prompt="a 'ball'", seed=7, **NUMERICS)
    form = form_for_recipe(recipe, [], "png")
    assert differences(recipe, first_recipe(form, (), NUMERICS)) == []
    assert request_route(recipe) == "POST /v1/replay"
    body = ReplayRequest.model_validate_json(as_request(recipe, [], "webp"))
    assert body.recipe is not None
    assert Recipe.from_dict(body.recipe).digest == recipe.digest
    assert body.output_format == "webp"
    python = as_python(recipe, [], "png", "http://127.0.0.1:8000")
    assert "client.replay(recipe" in python
    compile(python, "copied", "exec")
    words = shlex.split(as_command(recipe, [], "png"))
    assert "--lora" not in words
    assert "a 'ball'" in words


@given(recipes())
def test_snippets_are_quoted(recipe):
    names = [f"{number} $x'.safetensors" for number in range(len(recipe.adapters))]
    words = shlex.split(as_command(recipe, names, "png"))
    assert recipe.prompt in words
    assert f"--negative={recipe.negative_prompt}" in words or not recipe.negative_prompt
    multipliers = [
        float(word.rpartition(":")[2])
        for word in words
        if word.startswith(tuple("0123456789")) and "$x'" in word
    ]
    assert multipliers == [adapter.multiplier for adapter in recipe.adapters]
    compile(as_python(recipe, names, "png", "http://127.0.0.1:8000"), "copied", "exec")


def test_a_command_names_files_that_the_reader_can_have():
    adapters = (AdapterRef("a" * 64), AdapterRef("b" * 64))
    paths = ["uploads/key-0123456789abcdef/sks.safetensors", "people/x\n.safetensors"]
    recipe = Recipe(prompt="a", adapters=adapters, **{**NUMERICS, "base_model": "/srv/bases/v15"})
    words = shlex.split(as_command(recipe, paths, "png"))
    assert words[3:7] == ["--lora", "sks.safetensors:1", "--lora", "x\n.safetensors:1"]
    assert "--base-model=BASE" in words
    notes = command_notes(recipe, paths).splitlines()
    assert notes[0] == "# Replace BASE by the path or hub id of the base model v15."
    assert notes[1].startswith("# Run it in a folder with sks.safetensors, x")
    assert len(notes) == 2
    for base in ("fidelora:miniature", "stable-diffusion-v1-5/stable-diffusion-v1-5"):
        known = Recipe(prompt="a", **{**NUMERICS, "base_model": base})
        assert f"--base-model={base}" in shlex.split(as_command(known, [], "png"))
        assert command_notes(known, []) == ""


def test_a_prompt_that_looks_like_an_option_is_quoted():
    recipe = Recipe(prompt="--help", adapters=(AdapterRef("a" * 64),))
    assert shlex.split(as_command(recipe, ["a.safetensors"], "png"))[-2:] == ["--", "--help"]


def test_a_prompt_of_one_dash_is_piped_through_stdin():
    recipe = Recipe(prompt="-", adapters=(AdapterRef("a" * 64),))
    words = shlex.split(as_command(recipe, ["a.safetensors"], "png"))
    assert words[:5] == ["echo", "-", "|", "fidelora", "generate"]
    assert words[-2:] == ["--", "-"]


@pytest.mark.parametrize(("prompt", "is_kept"), [("a [trigger]", True), ("a", False)])
def test_snippets_leave_placeholders_as_they_are(prompt, is_kept):
    recipe = Recipe(prompt=prompt, adapters=(AdapterRef("a" * 64),), **NUMERICS)
    body = InferenceRequest.model_validate_json(as_request(recipe, ["a.safetensors"], "png"))
    assert body.prompts[0].trigger_word == ("" if is_kept else None)
    words = shlex.split(as_command(recipe, ["a.safetensors"], "png"))
    assert ("--trigger=" in words) == is_kept
    python = as_python(recipe, ["a.safetensors"], "png", "http://127.0.0.1:8000")
    assert ("trigger_word=''" in python) == is_kept


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"dtype": "bfloat16"}, "dtype"),
        ({"base_model": "there"}, "base_model"),
        ({"noise": "legacy"}, "noise"),
        ({"vae": "other"}, "vae"),
        ({"prediction": "v_prediction"}, "prediction"),
        ({"adapter_mode": "live"}, "adapter_mode"),
    ],
)
def test_fields_that_differ_on_this_server_are_named(changed, field):
    recipe = replace(Recipe(prompt="a", adapters=(AdapterRef("a" * 64),), **NUMERICS), **changed)
    found = differences(
        recipe,
        first_recipe(form_for_recipe(recipe, ["a.safetensors"], "png"), recipe.adapters, NUMERICS),
    )
    assert [sentence.split()[0] for sentence in found] == [field]


def test_seeds_of_several_images_increase_or_are_drawn():
    assert [item.seed for item in build_request(make_form(images=3)).prompts] == [7, 8, 9]
    assert [item.seed for item in build_request(make_form(images=2, seed=None)).prompts] == [-1, -1]


@pytest.mark.parametrize(
    "given",
    [
        {"loras": (("a.safetensors", 5.5),)},
        {"images": 0},
        {"images": 65},
        {"width": 63},
        {"sample_steps": 151},
        {"guidance_scale": 21.0},
        {"guidance_scale": float("nan")},
        {"fidelity": "<b>"},
        {"output_format": "gif"},
        {"seed": MAX_SEED, "images": 2},
        {"model": "none"},
        {"loras": (("", 1.0),)},
    ],
)
def test_invalid_values_raise_a_message(given):
    with pytest.raises(FideloraError, match=r"\w"):
        build_request(make_form(**given))


def test_seeds_are_parsed_exactly():
    assert read_seed(" 9223372036854775807 ") == MAX_SEED
    assert read_seed("") is read_seed("-1") is None
    for typed in ("9223372036854775808", "1" * 5000, "1.5", "-2", "१", "0x1", "one"):
        with pytest.raises(UsageError, match="whole number"):
            read_seed(typed)


@pytest.mark.parametrize(
    ("model", "base"),
    [(model, spec.base_model) for model, spec in sorted(all_families().items())]
    + [("sd15", "fidelora:miniature")],
)
def test_size_presets_have_about_the_default_number_of_pixels(model, base):
    spec = all_families()[model]
    side = spec.size_of(base)
    presets = size_presets(side)
    assert preset_of(side, side, side) == next(iter(presets))
    for label, (width, height) in presets.items():
        assert label.startswith(f"{width} x {height} (")
        assert 0.8 < width * height / side**2 < 1.25
        assert width % spec.request_divisor == height % spec.request_divisor == 0
    assert len(set(presets.values())) == 7
    assert preset_of(side, side, 72) == preset_of(side, None, None) == "Custom"
    assert preset_choices(side) == [*presets, "Custom"]


def test_multipliers_are_parsed():
    assert read_multipliers("0, .5 ,1,,0.5") == [0, 0.5, 1]
    for typed in ("", "a", "6", "nan", "1;2"):
        with pytest.raises(UsageError, match="Multipliers"):
            read_multipliers(typed)


def test_the_request_snippet_is_readable_json():
    recipe = Recipe(prompt="é", adapters=(AdapterRef("a" * 64),))
    assert "é" in as_request(recipe, ["a"], "png")
    assert json.loads(as_request(recipe, ["a"], "png"))["output_format"] == "png"
