"""Search for settings, with distances that are given instead of measured."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from fidelora.explain.search import Axis, Search
from fidelora.explain.simulation import Simulation

START = Simulation(
    prompt="sks",
    negative_prompt="dark",
    width=64,
    height=64,
    seed=1,
    steps=4,
    guidance_scale=3.0,
    sampler="ddim",
)
NEGATIVE = Axis("negative_prompt", [{"negative_prompt": ""}])
CLIP_SKIP = Axis("clip_skip", [{"clip_skip": 2}, {"clip_skip": 3}])
LORA = Axis("lora", [{"strength": 0.0}])
PROMPT = Axis("prompt", [{"prompt": f"prompt {number}"} for number in range(30)])


class Fakes:
    """A simulator that returns its settings as the image, and a picture that measures these."""

    def __init__(self, distance: Callable[[Simulation], float]) -> None:
        self.seen: set[Simulation] = set()
        self._distance = distance

    def search(self, limit: int = 1000) -> Search:
        simulator: Any = SimpleNamespace(image=self._image, evaluations=0)
        self._simulator = simulator
        picture: Any = SimpleNamespace(distance=self._distance)
        return Search(simulator, picture, limit)

    def _image(self, simulation: Simulation) -> Simulation:
        self.seen.add(simulation)
        self._simulator.evaluations = len(self.seen)
        return simulation


def cancelling(simulation: Simulation) -> float:
    """Distances measured for a diffusers script without negative prompt that skips a layer."""
    pair = (simulation.negative_prompt == "", simulation.clip_skip)
    return {(True, 2): 0.0, (False, 0): 18.3, (False, 2): 18.05, (True, 0): 19.9}.get(pair, 40.0)


def test_two_settings_that_cancel_are_found_together():
    search = Fakes(cancelling).search()
    axes = [NEGATIVE, CLIP_SKIP, LORA]
    assert search.descend(START, axes) == START  # neither of them comes nearer alone
    found = search.best_pair(START, axes)
    assert (found.negative_prompt, found.clip_skip, found.strength) == ("", 2, START.strength)


def test_a_pair_that_comes_only_slightly_nearer_is_not_taken():
    fakes = Fakes(lambda one: 18.3 if one == START else 17.5)
    assert fakes.search().best_pair(START, [NEGATIVE, CLIP_SKIP]) == START


def test_pairs_end_when_one_of_them_is_the_picture():
    fakes = Fakes(cancelling)
    fakes.search().best_pair(START, [NEGATIVE, CLIP_SKIP, LORA, PROMPT])
    assert len(fakes.seen) == 2


@pytest.mark.parametrize(("limit", "images"), [(1000, 17), (5, 5)])
def test_the_number_of_pairs_is_limited(limit, images):
    fakes = Fakes(lambda _: 18.3)
    fakes.search(limit).best_pair(START, [NEGATIVE, PROMPT, CLIP_SKIP])
    assert len(fakes.seen) == images
