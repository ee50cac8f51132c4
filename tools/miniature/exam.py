"""What the judge says of many pictures: for the benchmark, and for the short version of it among the tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from tools.miniature import judge, train_lora, world

from fidelora import Engine, Recipe


def scores(
    engine: Engine, scenes: Sequence[world.Scene], base: Recipe, seed: int
) -> dict[str, float]:
    """Shares of the scenes of which the picture has the right shapes, colours and background.

    Args:
        base: everything but prompt and seed; image n has the seed n.
        seed: for the wording of the prompts.
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


def new_things(count: int, seed: int) -> list[world.Scene]:
    """Held-out scenes with one thing: of the shape that only the adapter knows."""
    rng = np.random.default_rng(seed)
    scenes: list[world.Scene] = []
    while len(scenes) < count:
        scene = world.random_scene(rng, (world.NEW_SHAPE,))
        if len(scene.things) == 1 and scene.is_held_out:
            scenes.append(scene)
    return scenes
