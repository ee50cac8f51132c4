"""The JSON form of a recipe: complete, stable, and checked when it is read."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.recipe_support import FULL, SAMPLERS, SOUND, STYLE

from fidelora.errors import RecipeError
from fidelora.recipe import AdapterRef, Recipe

PLAIN = Recipe(prompt="a red ball", adapters=(STYLE,)).to_dict()


def plain_with(**changes):
    return {**PLAIN, **changes}


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
