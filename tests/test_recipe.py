"""The recipe: complete, checked, and the same on every machine."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fidelora.errors import (
    AdapterError,
    AdapterNotFoundError,
    RecipeError,
    UnknownModelError,
    UnknownSamplerError,
    WeightsFileError,
)
from fidelora.families import get_family
from fidelora.recipe import AdapterRef, Recipe, may_share_batch, replace_trigger, short_name

SD15_BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SAMPLERS = list(get_family("sd15").samplers)
STYLE = AdapterRef("0123456789abcdef" * 4, 0.75, name="style")
OTHER = AdapterRef("f" * 64, -2.0)

FULL: dict[str, Any] = {
    "prompt": "süß 🙂, [x]",
    "negative_prompt": "blurry\n",
    "model": "sd15",
    "base_model": "models/base.safetensors",
    "base_sha256": "",
    "variant": "fp16",
    "config": "elsewhere",
    "vae": "own/vae@main",
    "width": 640,
    "height": 456,
    "steps": 12,
    "guidance_scale": 7.25,
    "seed": 2**63 - 1,
    "sampler": "k_dpmsolver++",
    "prediction": "v_prediction",
    "adapters": (STYLE, OTHER),
    "adapter_mode": "live",
    "noise": "legacy",
    "dtype": "bfloat16",
    "vae_dtype": "float32",
    "text_encoder_dtype": "float16",
    "fidelity": "exact",
    "negative_prompt_2": None,
    "guidance_rescale": 0.0,
    "emphasis": "none",
    "timestep_spacing": "default",
    "eta": None,
    "vae_tiling": False,
    "history": (),
}
"""Every field, none with its default except `base_sha256` and the last eight.

Live adapters need `fidelity` "exact", and the others were added later.
"""

# Digests recorded when format 1 was made, which had no `base_sha256`. Files contain them, so they
# must never change.
DEFAULT_DIGEST = "fb2214fee74cf0b782f0979f0c447f9c5ceb5278ea1978ab6f5fe6871a665653"
FULL_DIGEST = "dff7a402c35dccbd0254339b6486cfb74bccbb1ba0d93103824d55ad869dc841"

PLAIN = Recipe(prompt="a red ball", adapters=(STYLE,)).to_dict()

SOUND = (2).to_bytes(8, "little") + b"{}"
"""The smallest sound .safetensors file: no tensors."""


def plain_with(**changes):
    return {**PLAIN, **changes}


def test_the_trigger_word_is_not_inserted_into_a_text_that_gets_too_long():
    assert replace_trigger("[trigger] and [name]", "sks") == "sks and sks"
    assert replace_trigger("[trigger]", "x" * 10_000) == "x" * 10_000
    with pytest.raises(RecipeError, match="With the trigger word in 2 places") as caught:
        replace_trigger("[trigger][name]", "x" * 5_001)
    assert caught.value.field == "prompt"
    assert replace_trigger("a" * 20_000, "sks") == "a" * 20_000  # the recipe refuses it


# --- completion ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({}, 512),
        ({"model": "sdxl"}, 1024),
        ({"model": "zimage"}, 1024),
        ({"model": "lumina2"}, 1024),
        ({"model": "qwen_image"}, 1024),
        ({"base_model": "fidelora:miniature"}, 128),
        ({"base_model": "other/base"}, 512),
    ],
)
def test_the_size_is_by_default_that_of_the_base_model(fields, size):
    recipe = Recipe(prompt="a", **fields)
    assert (recipe.width, recipe.height) == (size, size)
    assert Recipe(prompt="a", width=72, **fields).height == size


def test_a_recipe_with_only_a_prompt_is_complete():
    assert Recipe(prompt="a red ball") == Recipe(
        prompt="a red ball",
        negative_prompt="",
        model="sd15",
        base_model=SD15_BASE,
        base_sha256="",
        variant="",
        vae="",
        width=512,
        height=512,
        steps=25,
        guidance_scale=6.0,
        seed=42,
        sampler="ddpm",
        prediction="epsilon",
        adapters=(),
        adapter_mode="merged",
        noise="modern",
        dtype="float32",
        vae_dtype="float32",
        text_encoder_dtype="float32",
        fidelity="exact",
        negative_prompt_2=None,
        guidance_rescale=0.0,
    )


def test_every_default_is_a_plain_value_of_its_type():
    types = {name: type(value) for name, value in vars(Recipe(prompt="")).items()}
    new: dict[str, type] = {
        "quantization": str,
        "text_encoder_quantization": str,
        "training_adapters": tuple,
    }
    new |= {"frames": int, "fps": int}
    assert types == {name: type(value) for name, value in FULL.items()} | new


def test_the_other_dtypes_follow_the_main_one():
    recipe = Recipe(prompt="", dtype="bfloat16")
    assert (recipe.vae_dtype, recipe.text_encoder_dtype) == ("bfloat16", "bfloat16")


def test_an_explicit_dtype_is_kept():
    recipe = Recipe(prompt="", dtype="bfloat16", vae_dtype="float32", text_encoder_dtype="float16")
    assert (recipe.vae_dtype, recipe.text_encoder_dtype) == ("float32", "float16")


def test_an_alias_of_the_base_model_gives_an_equal_recipe():
    alias, own = (
        Recipe(prompt="x", base_model=name)
        for name in ("runwayml/stable-diffusion-v1-5", SD15_BASE)
    )
    assert alias.base_model == SD15_BASE
    assert alias == own
    assert alias.digest == own.digest == Recipe(prompt="x").digest


@pytest.mark.parametrize(
    ("asked", "floored"), [(64, 64), (71, 64), (72, 72), (519, 512), (4095, 4088), (4096, 4096)]
)
def test_sizes_are_floored_to_multiples_of_eight(asked, floored):
    recipe = Recipe(prompt="", width=asked, height=asked)
    assert (recipe.width, recipe.height) == (floored, floored)


def test_width_and_height_are_not_swapped():
    recipe = Recipe(prompt="", width=640, height=384)
    assert (recipe.width, recipe.height) == (640, 384)


def test_integers_become_floats_in_float_fields():
    recipe = Recipe(prompt="", guidance_scale=6, adapters=(AdapterRef("a" * 64, 1),))
    assert isinstance(recipe.guidance_scale, float)
    assert isinstance(recipe.adapters[0].multiplier, float)
    assert (
        recipe.digest
        == Recipe(prompt="", guidance_scale=6.0, adapters=(AdapterRef("a" * 64, 1.0),)).digest
    )


def test_adapters_become_a_tuple():
    adapters = [STYLE]
    recipe = Recipe(prompt="", adapters=adapters)  # type: ignore[arg-type]
    adapters.append(OTHER)
    assert recipe.adapters == (STYLE,)


def test_a_recipe_cannot_be_changed():
    recipe = Recipe(prompt="")
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.seed = 1  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        STYLE.multiplier = 1.0  # type: ignore[misc]


def test_a_copy_made_by_replace_is_checked():
    with pytest.raises(RecipeError, match="seed is -1"):
        dataclasses.replace(Recipe(prompt=""), seed=-1)


# --- ranges -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("width", 63, "width is 63; it must be from 64 to 4096"),
        ("width", 4097, "width is 4097; it must be from 64 to 4096"),
        ("height", 63, "height is 63; it must be from 64 to 4096"),
        ("height", 4097, "height is 4097; it must be from 64 to 4096"),
        ("steps", 0, "steps is 0; it must be from 1 to 150"),
        ("steps", 151, "steps is 151; it must be from 1 to 150"),
        ("seed", -1, f"seed is -1; it must be from 0 to {2**63 - 1}"),
        ("seed", 2**63, f"seed is {2**63}; it must be from 0"),
        ("guidance_scale", -1, r"guidance_scale is -1; it must be from 0\.0 to 100\.0"),
        ("guidance_scale", 100.5, r"guidance_scale is 100\.5"),
        ("guidance_scale", math.nan, "guidance_scale is nan"),
        ("guidance_scale", math.inf, "guidance_scale is inf"),
        ("width", 512.0, r"width must be a whole number, not 512\.0"),
        ("height", "512", "height must be a whole number, not '512'"),
        ("steps", True, "steps must be a whole number, not True"),
        ("seed", True, "seed must be a whole number, not True"),
        ("seed", None, "seed must be a whole number, not None"),
        ("guidance_scale", True, "guidance_scale must be a number, not True"),
        ("guidance_scale", "6", "guidance_scale must be a number, not '6'"),
        ("prompt", None, "prompt must be text, not NoneType"),
        ("prompt", b"x", "prompt must be text, not bytes"),
        ("prompt", "x" * 10_001, "prompt has 10,001 characters; the maximum is 10,000"),
        ("prompt", "broken \ud800", "prompt contains a lone surrogate"),
        ("negative_prompt", 5, "negative_prompt must be text, not int"),
        ("base_model", 5, "base_model must be text, not int"),
        ("variant", None, "variant must be text"),
        ("vae", None, "vae must be text"),
        (
            "prediction",
            "sample",
            "prediction is 'sample'; it must be one of epsilon, v_prediction",
        ),
        ("adapter_mode", "fused", "adapter_mode is 'fused'; it must be one of merged, live"),
        ("noise", "old", "noise is 'old'; it must be one of modern, legacy"),
        ("dtype", "fp16", "dtype is 'fp16'; it must be one of float32, bfloat16, float16"),
        ("vae_dtype", "", "vae_dtype is ''; it must be one of"),
        ("text_encoder_dtype", None, "text_encoder_dtype is None; it must be one of"),
        ("adapters", ("lora.safetensors",), r"AdapterRef\.from_file\(path\)"),
    ],
)
def test_the_error_for_a_value_out_of_range_names_the_field(name, value, message):
    with pytest.raises(RecipeError, match=message) as raised:
        Recipe(**{"prompt": "", name: value})
    assert raised.value.field == name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("width", 64),
        ("height", 4096),
        ("steps", 1),
        ("steps", 150),
        ("seed", 0),
        ("seed", 2**63 - 1),
        ("guidance_scale", 0),
        ("guidance_scale", 100),
        ("prompt", ""),
        ("prompt", "x" * 10_000),
    ],
)
def test_the_limits_of_the_ranges_are_accepted(name, value):
    assert getattr(Recipe(**{"prompt": "", name: value}), name) == value


@pytest.mark.parametrize("multiplier", [6, -5.1, math.nan, math.inf, -math.inf])
def test_a_multiplier_out_of_range_is_refused(multiplier):
    with pytest.raises(
        RecipeError, match=rf"multiplier is {multiplier}; it must be from -5\.0 to 5\.0"
    ) as raised:
        AdapterRef("a" * 64, multiplier)
    assert raised.value.field == "multiplier"


@pytest.mark.parametrize("multiplier", [True, "1", None])
def test_a_multiplier_that_is_not_a_number_is_refused(multiplier):
    with pytest.raises(RecipeError, match="multiplier must be a number"):
        AdapterRef("a" * 64, multiplier)


@pytest.mark.parametrize("sha256", ["", "a" * 63, "a" * 65, "A" * 64, "g" * 64, "a" * 64 + "\n"])
def test_an_invalid_sha256_is_refused(sha256):
    with pytest.raises(RecipeError, match="64 hexadecimal digits in lower case") as raised:
        AdapterRef(sha256)
    assert raised.value.field == "adapters"


def test_the_error_for_an_unknown_sampler_lists_the_samplers():
    with pytest.raises(UnknownSamplerError, match="'dpm' is not supported for sd15") as raised:
        Recipe(prompt="", sampler="dpm")
    assert raised.value.field == "sampler"
    assert str(raised.value).endswith(f"use one of {', '.join(SAMPLERS)}.")


def test_the_error_for_an_unknown_model_lists_the_models():
    with pytest.raises(
        UnknownModelError, match="The model 'sd3' is not supported; use one of sd15"
    ) as raised:
        Recipe(prompt="", model="sd3")
    assert raised.value.field == "model"


@pytest.mark.parametrize("sampler", ["lcm", "tcd"])
def test_samplers_of_distilled_models_have_at_most_50_steps(sampler):
    assert Recipe(prompt="", sampler=sampler, steps=50).steps == 50
    with pytest.raises(RecipeError, match="steps is 51; it must be from 1 to 50") as raised:
        Recipe(prompt="", sampler=sampler, steps=51)
    assert raised.value.field == "steps"


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name not in ("lcm", "tcd")])
def test_other_samplers_have_at_most_150_steps(sampler):
    assert Recipe(prompt="", sampler=sampler, steps=150).sampler == sampler


# --- JSON ---------------------------------------------------------------------------------------

WORDS = st.text(max_size=20)
DTYPES = st.sampled_from(["float32", "bfloat16", "float16"])
ADAPTERS = st.builds(
    AdapterRef,
    st.text("0123456789abcdef", min_size=64, max_size=64),
    st.floats(-2, 2) | st.integers(-2, 2),
    name=WORDS,
)
RECIPES = st.builds(
    Recipe,
    prompt=WORDS,
    negative_prompt=WORDS,
    base_model=WORDS,
    base_sha256=st.sampled_from(["", "0123456789abcdef" * 4]),
    variant=WORDS,
    vae=WORDS,
    width=st.integers(64, 4096),
    height=st.integers(64, 4096),
    steps=st.integers(1, 50),
    guidance_scale=st.floats(0, 100) | st.integers(0, 100),
    seed=st.integers(0, 2**63 - 1),
    sampler=st.sampled_from(SAMPLERS),
    prediction=st.sampled_from(["epsilon", "v_prediction"]),
    emphasis=st.sampled_from(["none", "original"]),
    adapters=st.lists(ADAPTERS, max_size=3).map(tuple),
    adapter_mode=st.sampled_from(["merged", "live"]),
    noise=st.sampled_from(["modern", "legacy"]),
    dtype=DTYPES,
    vae_dtype=DTYPES,
    text_encoder_dtype=DTYPES,
).flatmap(
    lambda recipe: st.sampled_from(
        [recipe, dataclasses.replace(recipe, adapter_mode="merged", fidelity="fast")]
    )
)


@settings(max_examples=100, deadline=None)
@given(recipe=RECIPES)
def test_any_recipe_survives_a_round_trip_through_json(recipe):
    again = Recipe.from_json(recipe.to_json())
    stored = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict(paths=True))))
    assert stored == recipe
    assert stored.digest == recipe.digest
    assert stored.base_model == recipe.base_model
    if recipe.base_sha256:
        assert again == recipe
        assert again.digest == recipe.digest
    assert again.to_json() == recipe.to_json()
    assert [ref.name for ref in again.adapters] == [ref.name for ref in recipe.adapters]
    assert "\n" not in recipe.to_json()


@settings(max_examples=100, deadline=None)
@given(recipe=RECIPES)
def test_a_recipe_made_from_its_own_fields_is_equal(recipe):
    assert dataclasses.replace(recipe) == recipe


def test_the_json_form_is_stable():
    assert json.loads(Recipe(**FULL).to_json()) == {
        "format": 2,
        **{
            name: value
            for name, value in FULL.items()
            if name
            not in (
                "negative_prompt_2",
                "guidance_rescale",
                "emphasis",
                "timestep_spacing",
                "eta",
                "vae_tiling",
                "history",
            )
        },
        "base_model": "base.safetensors",
        "adapters": [
            {"sha256": "0123456789abcdef" * 4, "multiplier": 0.75, "name": "style"},
            {"sha256": "f" * 64, "multiplier": -2.0, "name": ""},
        ],
    }


def test_json_does_not_contain_the_adapters_path(tmp_path):
    path = tmp_path / "secret_place.safetensors"
    path.write_bytes(SOUND)
    text = Recipe(prompt="", adapters=(AdapterRef.from_file(path),)).to_json()
    assert str(tmp_path) not in text
    assert Recipe.from_json(text).adapters[0].path is None


def test_invalid_json_is_refused():
    with pytest.raises(RecipeError, match="The recipe is not JSON"):
        Recipe.from_json("{prompt: x}")


@pytest.mark.parametrize("text", ["[]", "5", "null", '"text"'])
def test_json_that_is_not_an_object_is_refused(text):
    with pytest.raises(RecipeError, match="A recipe must be a JSON object"):
        Recipe.from_json(text)


@pytest.mark.parametrize("version", [0, 3, "1", None, True, 1.0, []])
def test_another_format_is_refused(version):
    with pytest.raises(RecipeError, match="reads recipes of the formats 1 to 2") as raised:
        Recipe.from_dict(plain_with(format=version))
    assert raised.value.field == "format"


def test_a_recipe_without_format_is_refused():
    with pytest.raises(RecipeError, match="reads recipes of the formats 1 to 2"):
        Recipe.from_dict({name: value for name, value in PLAIN.items() if name != "format"})


@pytest.mark.parametrize("name", [name for name in PLAIN if name not in ("format", "fidelity")])
def test_a_missing_field_is_refused(name):
    with pytest.raises(RecipeError, match=f"The recipe lacks {name}") as raised:
        Recipe.from_dict({key: value for key, value in PLAIN.items() if key != name})
    assert raised.value.field == name


def test_an_old_recipe_without_fidelity_is_exact():
    recipe = Recipe.from_dict({key: value for key, value in PLAIN.items() if key != "fidelity"})
    assert recipe == Recipe.from_dict(PLAIN)
    assert recipe.fidelity == "exact"


def test_fast_requires_merged_adapters():
    with pytest.raises(RecipeError, match="Fidelity fast always merges adapters") as raised:
        Recipe(prompt="", fidelity="fast", adapter_mode="live")
    assert raised.value.field == "adapter_mode"


def test_an_unknown_field_is_refused():
    with pytest.raises(RecipeError, match="unknown fields: clip_skip") as raised:
        Recipe.from_dict(plain_with(clip_skip=2))
    assert raised.value.field == "clip_skip"


@pytest.mark.parametrize("prompt", [5, None, ["a"], {"text": "a"}])
def test_a_prompt_that_is_not_text_is_refused(prompt):
    with pytest.raises(RecipeError, match="prompt must be text") as raised:
        Recipe.from_dict(plain_with(prompt=prompt))
    assert raised.value.field == "prompt"


def test_a_value_out_of_range_is_refused_in_json_too():
    with pytest.raises(RecipeError, match="steps is 151") as raised:
        Recipe.from_dict(plain_with(steps=151))
    assert raised.value.field == "steps"


@pytest.mark.parametrize(
    "adapters",
    [
        None,
        5,
        "text",
        ["lora.safetensors"],
        [5],
        [{"multiplier": 1.0, "name": ""}],
        [{"sha256": "a" * 64, "weight": 1}],
    ],
)
def test_adapters_of_another_form_are_refused(adapters):
    with pytest.raises(RecipeError, match="with sha256, multiplier and name") as raised:
        Recipe.from_dict(plain_with(adapters=adapters))
    assert raised.value.field == "adapters"


def test_from_dict_does_not_modify_its_argument():
    plain = json.loads(json.dumps(PLAIN))
    Recipe.from_dict(plain)
    assert plain == PLAIN


# --- the base model -----------------------------------------------------------------------------

FORMAT_1 = {
    "format": 1,
    "prompt": "a red ball",
    "negative_prompt": "",
    "model": "sd15",
    "base_model": "/home/me/base",
    "variant": "",
    "config": "",
    "vae": "",
    "width": 512,
    "height": 512,
    "steps": 25,
    "guidance_scale": 6.0,
    "seed": 42,
    "sampler": "ddpm",
    "prediction": "epsilon",
    "adapters": [],
    "adapter_mode": "merged",
    "noise": "modern",
    "dtype": "float32",
    "vae_dtype": "float32",
    "text_encoder_dtype": "float32",
    "fidelity": "exact",
}
"""A recipe in an image of an older version, which contained the path of the base model."""


def test_a_recipe_of_format_1_has_its_digest_and_no_hash():
    recipe = Recipe.from_dict(FORMAT_1)
    plain = {name: value for name, value in FORMAT_1.items() if name != "fidelity"}
    canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    assert recipe.digest == hashlib.sha256(canonical.encode()).hexdigest()
    assert (recipe.base_model, recipe.base_sha256) == ("/home/me/base", "")


@pytest.mark.parametrize(
    ("location", "name"),
    [
        ("", ""),
        ("/home/me/bases/tiny-sd15", "tiny-sd15"),
        ("/home/me/bases/tiny-sd15/", "tiny-sd15"),
        ("~/base.safetensors", "base.safetensors"),
        ("bases/base.SafeTensors", "base.SafeTensors"),
        ("./bases/mine", "mine"),
        ("a/b/c", "c"),
        ("C:\\bases\\mine", "mine"),
        ("owner/name", "owner/name"),
        ("owner/name@refs/pr/1", "owner/name@refs/pr/1"),
        ("fidelora:miniature", "fidelora:miniature"),
    ],
)
def test_a_location_is_shortened_to_its_name(location, name):
    assert short_name(location) == name


def test_the_json_form_contains_no_path_of_this_machine():
    paths: dict[str, Any] = {
        "base_model": "/home/me/base",
        "vae": "/home/me/v.safetensors",
        "config": "/home/me/c",
    }
    recipe = Recipe(prompt="", base_sha256="ab" * 32, **paths)
    assert "/home" not in recipe.to_json()
    assert "/home" not in repr(Recipe.from_json(recipe.to_json()))


@pytest.mark.parametrize("name", ["base_model", "variant", "config", "vae"])
def test_a_base_model_of_known_content_may_lie_anywhere(name):
    here = Recipe(prompt="", base_sha256="ab" * 32)
    change: dict[str, Any] = {name: "elsewhere"}
    there = dataclasses.replace(here, **change)
    assert there == here
    assert there.digest == here.digest
    assert hash(there) == hash(here)
    assert dataclasses.replace(there, base_sha256="cd" * 32) != there


@pytest.mark.parametrize("value", ["ab", "AB" * 32, 5, None, "ab" * 33])
def test_a_hash_of_a_base_model_is_a_sha256(value):
    with pytest.raises(RecipeError, match="base_sha256") as raised:
        Recipe(prompt="", base_sha256=value)
    assert raised.value.field == "base_sha256"


# --- digest -------------------------------------------------------------------------------------

# Fields whose value in `OTHER_VALUES` is not possible in `fast`, and `fidelity` itself.
EXACT_ONLY = ("adapter_mode", "history", "fidelity")
# Fields that SD 1.5 does not have.
OTHER_FAMILIES_ONLY = {
    "quantization", "text_encoder_quantization", "training_adapters", "frames", "fps"
}  # fmt: skip

OTHER_VALUES = {
    "prompt": "a blue ball",
    "negative_prompt": "blurry",
    "base_model": "another/base",
    "base_sha256": "ab" * 32,
    "variant": "fp16",
    "config": "elsewhere",
    "vae": "another/vae",
    "width": 520,
    "height": 520,
    "steps": 26,
    "guidance_scale": 6.5,
    "seed": 43,
    "sampler": "ddim",
    "prediction": "v_prediction",
    "adapters": (OTHER,),
    "adapter_mode": "live",
    "history": (OTHER,),
    "noise": "legacy",
    "dtype": "float16",
    "vae_dtype": "float16",
    "text_encoder_dtype": "float16",
    "fidelity": "fast",
    "guidance_rescale": 0.5,
    "emphasis": "original",
}


def test_the_digest_of_the_defaults_is_stable():
    assert Recipe(prompt="a red ball").digest == DEFAULT_DIGEST


def test_the_digest_of_a_recipe_with_all_fields_is_stable():
    assert Recipe(**FULL).digest == FULL_DIGEST


def test_every_independent_field_is_covered_here():
    assert set(OTHER_VALUES) == {field.name for field in dataclasses.fields(Recipe)} - {
        "model",
        "negative_prompt_2",
        "timestep_spacing",
        "eta",
        *OTHER_FAMILIES_ONLY,
        "vae_tiling",
    }


def test_the_digest_depends_on_the_model_and_its_second_negative_prompt():
    one = Recipe(prompt="a red ball", model="sdxl")
    others = [
        Recipe(prompt="a red ball", base_model=one.base_model, width=1024, height=1024),
        replaced(one, "ugly"),
    ]
    assert len({recipe.digest for recipe in (one, *others)}) == 3
    assert replaced(one, "") == one  # the same text as the first one: the same image
    assert replaced(one, "").digest == one.digest


def replaced(recipe: Recipe, negative_prompt_2: str | None) -> Recipe:
    return dataclasses.replace(recipe, negative_prompt_2=negative_prompt_2)


def test_the_digest_depends_on_the_options_of_the_sampler():
    one = Recipe(prompt="a red ball", sampler="tcd")
    others = [
        dataclasses.replace(one, **options)
        for options in (
            {"timestep_spacing": "trailing"}, {"eta": 0.0}, {"eta": 1}, {"sampler": "ddim"},
            {"sampler": "ddim", "eta": 1.0}, {"sampler": "euler", "timestep_spacing": "trailing"},
            {"sampler": "euler", "timestep_spacing": "sgm_uniform"},
        )
    ]  # fmt: skip
    assert len({recipe.digest for recipe in (one, *others)}) == 8
    for recipe in others:
        assert Recipe.from_json(recipe.to_json()) == recipe
        assert ("eta" in recipe.to_dict()) == (recipe.eta is not None)


def test_the_default_eta_of_a_sampler_is_not_stored():
    for sampler, eta in (("tcd", 0.3), ("ddim", 0), ("ddim", -0.0)):
        recipe = Recipe(prompt="", sampler=sampler, eta=eta)
        assert recipe == Recipe(prompt="", sampler=sampler)
        assert recipe.eta is None
        assert "eta" not in recipe.to_dict()


@pytest.mark.parametrize(
    ("fields", "field", "says"),
    [
        ({"sampler": "euler", "eta": 0.5}, "eta", "use one of the samplers ddim, tcd"),
        ({"sampler": "euler_a", "eta": 1.0}, "eta", "cannot be set"),
        ({"sampler": "tcd", "eta": 1.1}, "eta", "from 0.0 to 1.0"),
        ({"sampler": "tcd", "eta": float("nan")}, "eta", "from 0.0 to 1.0"),
        ({"sampler": "tcd", "eta": True}, "eta", "must be a number"),
        ({"sampler": "lcm", "timestep_spacing": "sgm_uniform"}, "timestep_spacing", "euler, "),
        ({"sampler": "dpmsingle", "timestep_spacing": "trailing"}, "timestep_spacing", "ddpm, "),
        ({"timestep_spacing": "leading"}, "timestep_spacing", "one of default, trailing"),
        ({"timestep_spacing": None}, "timestep_spacing", "one of default, trailing"),
        ({"sampler": "tcd", "steps": 51}, "steps", "from 1 to 50"),
        ({"model": "zimage", "timestep_spacing": "trailing"}, "timestep_spacing", "leave it out."),
        ({"model": "zimage", "eta": 0.0}, "eta", "leave eta out."),
        ({"model": "qwen_image", "steps": 1}, "steps", "not defined for 1 step"),
        ({"model": "qwen_image", "vae_tiling": 1}, "vae_tiling", "must be true or false, not 1"),
        ({"vae_tiling": True}, "vae_tiling", "does not use vae_tiling; leave it out"),
    ],
)
def test_options_that_the_sampler_lacks_are_refused(fields, field, says):
    with pytest.raises(RecipeError, match=says) as raised:
        Recipe(prompt="", **fields)
    assert raised.value.field == field


def test_a_second_negative_prompt_needs_a_second_text_encoder():
    with pytest.raises(RecipeError, match="does not use negative_prompt_2; leave it out") as raised:
        Recipe(prompt="", negative_prompt_2="ugly")
    assert raised.value.field == "negative_prompt_2"


def test_newer_fields_are_written_only_if_they_are_used():
    """Old recipes can be read, and recipes that do not use newer fields keep their JSON form."""
    assert not {"negative_prompt_2", "guidance_rescale"} & PLAIN.keys()
    said = dataclasses.replace(
        Recipe(prompt="", model="sdxl"), negative_prompt_2="ugly", guidance_rescale=0.7
    )
    assert (said.to_dict()["negative_prompt_2"], said.to_dict()["guidance_rescale"]) == (
        "ugly",
        0.7,
    )
    assert Recipe.from_json(said.to_json()) == said
    dora = Recipe(prompt="", adapters=(dataclasses.replace(STYLE, alpha=4),))
    assert dora.to_dict()["adapters"] == [
        {"sha256": STYLE.sha256, "multiplier": 0.75, "name": "style", "alpha": 4.0}
    ]
    assert Recipe.from_json(dora.to_json()) == dora
    assert dora.digest != Recipe(prompt="", adapters=(STYLE,)).digest


@pytest.mark.parametrize("alpha", [-1, math.nan, math.inf, "8", True])
def test_an_alpha_is_a_number(alpha):
    with pytest.raises(RecipeError, match="alpha"):
        AdapterRef("a" * 64, alpha=alpha)


def test_an_alpha_of_0_means_the_rank_as_in_the_trainer():
    assert AdapterRef("a" * 64, alpha=0).alpha is None


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, "0.5"])
def test_guidance_rescale_is_between_0_and_1(value):
    with pytest.raises(RecipeError, match="guidance_rescale"):
        Recipe(prompt="", guidance_rescale=value)


@pytest.mark.parametrize(("name", "value"), OTHER_VALUES.items())
def test_the_digest_depends_on_every_field(name, value):
    before = Recipe(prompt="a red ball", vae_dtype="float32", text_encoder_dtype="float32")
    after = dataclasses.replace(before, **{name: value})
    assert after != before
    assert after.digest != before.digest


@pytest.mark.parametrize(
    "adapters",
    [
        (),
        (STYLE,),
        (OTHER, STYLE),
        (STYLE, OTHER, OTHER),
        (dataclasses.replace(STYLE, multiplier=0.5), OTHER),
    ],
    ids=["none", "one", "other order", "one twice", "other multiplier"],
)
def test_the_digest_depends_on_the_adapters_their_order_and_strength(adapters):
    assert (
        Recipe(prompt="", adapters=adapters).digest
        != Recipe(prompt="", adapters=(STYLE, OTHER)).digest
    )


def test_the_digest_does_not_depend_on_an_adapters_name_or_path(tmp_path):
    path = tmp_path / "renamed.safetensors"
    path.write_bytes(SOUND)
    here = AdapterRef.from_file(path)
    nameless = AdapterRef(here.sha256)
    assert here.name != nameless.name
    assert Recipe(prompt="", adapters=(here,)) == Recipe(prompt="", adapters=(nameless,))
    assert (
        Recipe(prompt="", adapters=(here,)).digest == Recipe(prompt="", adapters=(nameless,)).digest
    )


# --- adapters and trigger -----------------------------------------------------------------------


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


@pytest.mark.parametrize(
    "adapter",
    [
        {"sha256": "a" * 64, "multiplier": 1.0, "name": "x", "path": "/etc/passwd"},
        {"sha256": "a" * 64, "multiplier": 1.0},
        {"sha256": "a" * 64, "multiplier": 1.0, "name": 5},
        {"sha256": "a" * 64, "multiplier": 10**400, "name": "x"},
        {"sha256": 7, "multiplier": 1.0, "name": "x"},
        "a" * 64,
    ],
    ids=["path", "no name", "name", "multiplier", "sha256", "text"],
)
def test_an_adapter_in_json_has_exactly_three_fields(adapter):
    plain = Recipe(prompt="a ball").to_dict() | {"adapters": [adapter]}
    with pytest.raises(RecipeError):
        Recipe.from_dict(plain)


def test_adapters_in_json_are_a_list():
    with pytest.raises(RecipeError, match="must be a list"):
        Recipe.from_dict(Recipe(prompt="a ball").to_dict() | {"adapters": {}})


@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"seed": ' + "1" * 5000 + "}"], ids=["deep", "long number"]
)
def test_json_that_breaks_the_parser_is_refused(text):
    with pytest.raises(RecipeError, match="not JSON"):
        Recipe.from_json(text)


@pytest.mark.parametrize(
    "values",
    [{"seed": 10**400}, {"guidance_scale": 10**400}, {"seed": 10**5000}, {"dtype": 10**5000},
     {"sampler": []}, {"model": {}}, {"adapters": None}, {"width": [1]}],
    ids=lambda values: next(iter(values)),
)  # fmt: skip
def test_values_of_any_type_are_refused_with_a_typed_error(values):
    with pytest.raises(RecipeError) as raised:
        Recipe(**{"prompt": "a ball"} | values)
    assert len(str(raised.value)) < 300


def test_minus_zero_is_zero():
    assert (
        Recipe(prompt="", guidance_scale=-0.0).digest
        == Recipe(prompt="", guidance_scale=0.0).digest
    )
    refs = [AdapterRef("a" * 64, zero) for zero in (-0.0, 0.0)]
    assert (
        Recipe(prompt="", adapters=(refs[0],)).digest
        == Recipe(prompt="", adapters=(refs[1],)).digest
    )


def test_a_list_of_adapters_is_accepted_and_a_generator_is_not():
    ref = AdapterRef("a" * 64)
    assert Recipe(prompt="", adapters=[ref]).adapters == (ref,)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="must be a tuple"):
        Recipe(prompt="", adapters=(each for each in [ref]))  # type: ignore[arg-type]


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


def test_an_alias_with_a_revision_keeps_the_revision():
    assert (
        Recipe(prompt="", base_model="runwayml/stable-diffusion-v1-5@fp16").base_model
        == "stable-diffusion-v1-5/stable-diffusion-v1-5@fp16"
    )


def test_a_path_given_as_text_becomes_a_path():
    adapter = AdapterRef("a" * 64, path="x.safetensors")  # type: ignore[arg-type]
    assert adapter.path == Path("x.safetensors")


# --- batches ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, value in OTHER_VALUES.items() if name not in EXACT_ONLY],
)
def test_fast_images_with_other_prompts_and_seeds_can_share_a_batch(name, value):
    one = Recipe(
        prompt="a red ball", vae_dtype="float32", text_encoder_dtype="float32", fidelity="fast"
    )
    other = dataclasses.replace(one, **{name: value})
    assert (
        may_share_batch(one, other)
        == may_share_batch(other, one)
        == (name in ("prompt", "negative_prompt", "seed"))
    )


def test_exact_images_do_not_share_a_batch():
    assert not may_share_batch(Recipe(prompt=""), Recipe(prompt=""))
    assert not may_share_batch(Recipe(prompt=""), Recipe(prompt="", fidelity="fast"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("quantization", "qfloat8"),
        ("text_encoder_quantization", "float8"),
        ("training_adapters", (OTHER,)),
    ],
)
def test_fields_of_quantised_families_change_the_recipe(field, value):
    plain = Recipe(prompt="", model="zimage_turbo")
    changed = dataclasses.replace(plain, **{field: value})
    assert changed != plain
    assert Recipe.from_json(changed.to_json()) == changed
    assert field not in json.loads(plain.to_json())
    assert changed.files == (value if field == "training_adapters" else ())
    with pytest.raises(RecipeError, match=f"does not use {field}"):
        Recipe(prompt="", **{field: value})


@pytest.mark.parametrize("change", [{"adapter_mode": "merged"}, {"fidelity": "fast"}])
def test_nothing_is_merged_into_quantised_weights(change):
    recipe = Recipe(
        prompt="", model="zimage", quantization="qfloat8", adapters=(OTHER,), adapter_mode="live"
    )
    with pytest.raises(RecipeError, match=r"quantised weights|always merges adapters"):
        dataclasses.replace(recipe, **change)
