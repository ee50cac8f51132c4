"""Score many pictures, for the benchmark and for its short version in the tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from tools.miniature import judge, train_lora, world

from fidelora import Engine, Recipe


def scores(
    engine: Engine, scenes: Sequence[world.Scene], base: Recipe, seed: int
) -> dict[str, float]:
    """Return the fractions of pictures with the right shapes, colours and background.

    Args:
        base: recipe without prompt and seed; image n has the seed n.
        seed: seed for the wording of the prompts.
    """
    rng = np.random.default_rng(seed)
    found = []
    for index, scene in enumerate(scenes):
        image = engine.generate(replace(base, prompt=train_lora.caption(scene, rng), seed=index))
        found.append(judge.score(image.pixels, scene))
    return {
        name: sum(getattr(one, name) for one in found) / len(found)
        for name in ("shape", "colour", "background")
    }


def new_shape_scenes(count: int, seed: int) -> list[world.Scene]:
    """Return held-out scenes with one shape, the one that only the adapter has learned."""
    rng = np.random.default_rng(seed)
    scenes: list[world.Scene] = []
    while len(scenes) < count:
        scene = world.random_scene(rng, (world.NEW_SHAPE,))
        if len(scene.things) == 1 and scene.is_held_out:
            scenes.append(scene)
    return scenes
