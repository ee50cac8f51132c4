"""The miniature's training world and its judge, without the model: drawings, captions, scores."""

from __future__ import annotations

import numpy as np
import pytest
from tools.miniature import judge, world
from tools.miniature.train_lora import TRIGGER, caption
from tools.miniature.train_unet import held_out_scenes


def scenes(count: int, seed: int = 0) -> list[world.Scene]:
    rng = np.random.default_rng(seed)
    return [world.random_scene(rng) for _ in range(count)]


def test_the_same_seed_gives_the_same_scenes_captions_and_pixels():
    def made():
        rng = np.random.default_rng(7)
        scene = world.random_scene(rng)
        return scene, world.caption(scene, rng), world.draw(scene, rng).tobytes()

    assert made() == made()


def test_captions_name_everything_that_is_drawn():
    rng = np.random.default_rng(1)
    for scene in scenes(300):
        words = world.caption(scene, rng).replace(",", " ").split()
        assert scene.background in words
        for thing in scene.things:
            assert thing.shape in words
            assert thing.colour in words
            assert not thing.place or thing.place in words


def test_nothing_held_out_is_trained_on_and_a_tenth_is_held_out():
    combinations = [
        (shape, colour, ground)
        for shape in world.SHAPES
        for colour in world.COLOURS
        for ground in world.COLOURS
    ]
    held_out = [one for one in combinations if world.is_held_out(*one)]
    assert 0.07 < len(held_out) / len(combinations) < 0.13
    for scene in held_out_scenes(50, 1):
        ground = scene.background
        assert any(world.is_held_out(thing.shape, thing.colour, ground) for thing in scene.things)


def test_captions_of_the_lora_name_the_new_shape_by_its_trigger_word():
    rng = np.random.default_rng(2)
    scene = world.random_scene(rng, (world.NEW_SHAPE,))
    words = caption(scene, rng)
    assert TRIGGER in words
    assert world.NEW_SHAPE not in words


def test_the_judge_accepts_correct_drawings():
    rng = np.random.default_rng(3)
    drawn = scenes(200, seed=3)
    scores = [judge.score(world.draw(scene, rng), scene) for scene in drawn]
    for name in ("shape", "colour", "background"):
        assert sum(getattr(score, name) for score in scores) >= 197, name


@pytest.mark.parametrize("shape", [*world.SHAPES, world.NEW_SHAPE])
def test_the_judge_distinguishes_all_shapes(shape):
    rng = np.random.default_rng(4)
    for size in world.RADII:
        scene = world.Scene((world.Thing(shape, "red", size),), "white")
        ground, (seen,) = judge.recognise(world.draw(scene, rng))
        assert (seen.shape, seen.colour, ground) == (shape, "red", "white")


def test_the_judge_rejects_wrong_drawings():
    """Wrong shape, colour or background, a missing thing, a wrong order, and noise."""
    rng = np.random.default_rng(5)
    red_star, blue_ring = world.Thing("star", "red"), world.Thing("ring", "blue")
    star = world.draw(world.Scene((red_star,), "white"), rng)
    assert judge.score(star, world.Scene((world.Thing("heart", "red"),), "white")) == judge.Score(
        False, True, True
    )
    assert judge.score(star, world.Scene((world.Thing("star", "green"),), "white")) == judge.Score(
        True, False, True
    )
    assert judge.score(star, world.Scene((red_star,), "cyan")) == judge.Score(True, True, False)
    assert judge.score(
        star, world.Scene((red_star, blue_ring), "white", arrangement="beside")
    ) == judge.Score(False, False, True)
    both = world.draw(world.Scene((red_star, blue_ring), "white", arrangement="beside"), rng)
    assert judge.score(
        both, world.Scene((blue_ring, red_star), "white", arrangement="beside")
    ) == judge.Score(False, False, True)
    noise = rng.integers(0, 256, star.shape).astype(np.uint8)
    assert not judge.score(noise, world.Scene((red_star,), "white")).shape
