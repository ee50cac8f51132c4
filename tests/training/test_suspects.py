"""Wrong settings that the doctor tries."""

from __future__ import annotations

from fidelora import Recipe
from fidelora.families import get_family
from fidelora.training.suspects import samplers


def test_only_samplers_of_the_trainer_are_tried():
    tried = {suspect.recipe.sampler for suspect in samplers(Recipe(prompt="", steps=4))}
    assert "lcm" in tried
    assert tried == get_family("sd15").samplers.keys() - {"tcd"}
