"""The recipe: complete, with a base model known by its content, and comparable with others."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from tests.recipe_support import FULL, OTHER, OTHER_VALUES, STYLE

from fidelora.errors import RecipeError
from fidelora.recipe import AdapterRef, Recipe, may_share_batch, short_name

SD15_BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"


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


# --- values that are converted ------------------------------------------------------------------


def test_a_list_of_adapters_is_accepted_and_a_generator_is_not():
    ref = AdapterRef("a" * 64)
    assert Recipe(prompt="", adapters=[ref]).adapters == (ref,)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="must be a tuple"):
        Recipe(prompt="", adapters=(each for each in [ref]))  # type: ignore[arg-type]


def test_an_alias_with_a_revision_keeps_the_revision():
    assert (
        Recipe(prompt="", base_model="runwayml/stable-diffusion-v1-5@fp16").base_model
        == "stable-diffusion-v1-5/stable-diffusion-v1-5@fp16"
    )


def test_a_path_given_as_text_becomes_a_path():
    adapter = AdapterRef("a" * 64, path="x.safetensors")  # type: ignore[arg-type]
    assert adapter.path == Path("x.safetensors")


# --- batches ------------------------------------------------------------------------------------

# Fields whose value in `OTHER_VALUES` is not possible in `fast`, and `fidelity` itself.
EXACT_ONLY = ("adapter_mode", "history", "fidelity")


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
