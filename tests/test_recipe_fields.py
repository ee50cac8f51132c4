"""Ranges of the fields of a recipe, and messages about values out of range."""

from __future__ import annotations

import math

import pytest
from tests.recipe_support import SAMPLERS

from fidelora.errors import RecipeError, UnknownModelError, UnknownSamplerError
from fidelora.recipe import AdapterRef, Recipe


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
