"""The digest of a recipe: stable, and different if any field that changes the image differs."""

from __future__ import annotations

import dataclasses

import pytest
from tests.recipe_support import FULL, OTHER, OTHER_VALUES, SOUND, STYLE

from fidelora.recipe import AdapterRef, Recipe

# Digests recorded when format 1 was made, which had no `base_sha256`. Files contain them, so they
# must never change.
DEFAULT_DIGEST = "fb2214fee74cf0b782f0979f0c447f9c5ceb5278ea1978ab6f5fe6871a665653"
FULL_DIGEST = "dff7a402c35dccbd0254339b6486cfb74bccbb1ba0d93103824d55ad869dc841"


# Fields that SD 1.5 does not have.
OTHER_FAMILIES_ONLY = {
    "quantization", "text_encoder_quantization", "training_adapters", "frames", "fps"
}  # fmt: skip


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
