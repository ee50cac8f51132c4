"""The miniature's world: simple scenes, drawn from a seed, with captions in plain English.

A scene has one or two shapes on a plain background. Shapes are drawn from signed distances, so that
edges are smooth at any size. Everything is a function of a `numpy.random.Generator`: the same seed
gives the same scenes, captions and pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]

SIZE = 128
"""Side of a picture in pixels."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (245, 140, 20),
    "yellow": (245, 220, 50),
    "green": (50, 160, 70),
    "cyan": (70, 205, 215),
    "blue": (45, 80, 200),
    "purple": (130, 55, 165),
    "pink": (250, 150, 185),
    "white": (245, 245, 245),
    "black": (25, 25, 30),
}

SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "ring")
NEW_SHAPE = "moon"
"""Shape that only the adapter learns. Captions name it by the adapter's trigger word."""

STYLES = ("flat", "outlined", "pixelated")
RADII = {"small": (17, 20), "": (26, 31), "large": (39, 44)}
PLACES = {"": (64, 64), "left": (36, 64), "right": (92, 64), "top": (64, 36), "bottom": (64, 92)}
ARRANGEMENTS = ("beside", "above")
_PIXEL = 4
"""Block size of the pixelated style, in pixels."""
_OUTLINE = 4.0  # width of an outline in pixels
_HELD_OUT = 10
"""One in this many combinations of shape, colour and background is held out."""


@dataclass(frozen=True)
class Thing:
    """One shape in a scene."""

    shape: str
    colour: str
    size: str = ""
    place: str = ""


@dataclass(frozen=True)
class Scene:
    """Content of a picture, as its caption describes it.

    With two things, the first is left of or above the second, and neither has a `place`.
    """

    things: tuple[Thing, ...]
    background: str
    style: str = "flat"
    arrangement: str = ""

    @property
    def is_held_out(self) -> bool:
        """True if the scene is in the held-out part of the caption space."""
        return any(is_held_out(thing.shape, thing.colour, self.background) for thing in self.things)


def is_held_out(shape: str, colour: str, background: str) -> bool:
    """True for a tenth of the combinations, selected by hash."""
    return hashlib.sha256(f"{shape} {colour} {background}".encode()).digest()[0] % _HELD_OUT == 0


def random_scene(rng: np.random.Generator, shapes: Sequence[str] = SHAPES) -> Scene:
    """Return a random scene, held out or not."""
    colours = list(COLOURS)
    background = _choice(rng, colours)
    others = [colour for colour in colours if colour != background]
    style = _choice(rng, STYLES, (0.6, 0.2, 0.2))
    if rng.random() < 0.2:
        first, second = (Thing(_choice(rng, shapes), _choice(rng, others)) for _ in range(2))
        return Scene((first, second), background, style, _choice(rng, ARRANGEMENTS))
    size = _choice(rng, list(RADII), (0.25, 0.5, 0.25))
    place = "" if size == "large" else _choice(rng, list(PLACES), (0.6, 0.1, 0.1, 0.1, 0.1))
    return Scene(
        (Thing(_choice(rng, shapes), _choice(rng, others), size, place),), background, style
    )


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Return a caption of the scene, in one of many phrasings."""
    if len(scene.things) == 2:
        first, second = (_article(f"{thing.colour} {thing.shape}") for thing in scene.things)
        joint = {
            "beside": ("next to", "and", "to the left of"),
            "above": ("above", "over", "on top of"),
        }[scene.arrangement]
        subject = f"{first} {_choice(rng, joint)} {second}"
    else:
        (thing,) = scene.things
        subject = _article(
            " ".join(filter(None, (_size(thing.size, rng), thing.colour, thing.shape)))
        )
        if thing.place:
            where = (
                f"at the {thing.place}",
                f"on the {thing.place}",
                f"at the {thing.place} of the picture",
            )
            subject = f"{subject} {_choice(rng, where)}"
    behind = _choice(
        rng,
        (
            f"on a {scene.background} background",
            f"on {scene.background}",
            f"in front of a {scene.background} background",
        ),
        (0.6, 0.2, 0.2),
    )
    behind = behind.replace("a orange", "an orange")
    text = f"{subject} {behind}"
    match scene.style:
        case "outlined":
            return _choice(
                rng,
                (f"{text}, outlined", f"an outlined drawing of {text}", f"{text}, with an outline"),
            )
        case "pixelated":
            return _choice(
                rng, (f"{text}, pixelated", f"pixel art of {text}", f"{text}, as pixel art")
            )
        case _:
            return _choice(
                rng,
                (text, f"a picture of {text}", f"{text}, flat colors", f"a drawing of {text}"),
                (0.5, 0.2, 0.15, 0.15),
            )


def draw(scene: Scene, rng: np.random.Generator) -> Pixels:
    """Return the scene's picture, uint8 RGB `[128, 128, 3]`.

    Colours, positions and sizes vary slightly at random.
    """
    canvas = np.empty((SIZE, SIZE, 3), np.float32)
    canvas[:] = _tint(scene.background, rng)
    for thing, (x, y, radius) in zip(scene.things, _layout(scene, rng), strict=True):
        distance = SIGNED_DISTANCES[thing.shape](*grid(x, y), radius)
        if scene.style == "outlined":
            dark = "black" not in (thing.colour, scene.background)
            _paint(
                canvas,
                distance - _OUTLINE,
                np.array(COLOURS["black" if dark else "white"], np.float32),
            )
        _paint(canvas, distance, _tint(thing.colour, rng))
    if scene.style == "pixelated":
        blocks = canvas.reshape(SIZE // _PIXEL, _PIXEL, SIZE // _PIXEL, _PIXEL, 3).mean(axis=(1, 3))
        canvas = blocks.repeat(_PIXEL, axis=0).repeat(_PIXEL, axis=1)
    return canvas.round().clip(0, 255).astype(np.uint8)


def _layout(scene: Scene, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Return x, y and radius of each thing, in pixels."""

    def near(place: tuple[int, int]) -> tuple[float, float]:
        return place[0] + rng.uniform(-4, 4), place[1] + rng.uniform(-4, 4)

    if len(scene.things) == 2:
        places = ((36, 64), (92, 64)) if scene.arrangement == "beside" else ((64, 36), (64, 92))
        return [(*near(place), rng.uniform(18, 22)) for place in places]
    (thing,) = scene.things
    return [(*near(PLACES[thing.place]), rng.uniform(*RADII[thing.size]))]


def _tint(colour: str, rng: np.random.Generator) -> Floats:
    return np.clip(np.array(COLOURS[colour]) + rng.uniform(-8, 8, 3), 0, 255).astype(np.float32)


def _paint(canvas: Floats, distance: Floats, colour: Floats) -> None:
    cover = np.clip(0.5 - distance, 0, 1)[..., None]
    canvas *= 1 - cover
    canvas += cover * colour


def grid(x: float, y: float) -> tuple[Floats, Floats]:
    """Return coordinates of all pixel centres relative to (x, y), x to the right and y down."""
    along = np.arange(SIZE, dtype=np.float32) + np.float32(0.5)
    return np.broadcast_to(along - np.float32(x), (SIZE, SIZE)), np.broadcast_to(
        along[:, None] - np.float32(y), (SIZE, SIZE)
    )


def _polygon(points: Sequence[tuple[float, float]]) -> Callable[[Floats, Floats, float], Floats]:
    """Return the signed distance function of a polygon whose corners are in units of the radius.

    Method: https://iquilezles.org/articles/distfunctions2d/.
    """

    def distance(x: Floats, y: Floats, radius: float) -> Floats:
        corners = [(px * radius, py * radius) for px, py in points]
        squared = np.full(x.shape, np.inf, np.float32)
        sign = np.ones(x.shape, np.float32)
        for (ax, ay), (bx, by) in zip(corners, corners[-1:] + corners[:-1], strict=True):
            ex, ey, wx, wy = bx - ax, by - ay, x - ax, y - ay
            along = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0, 1)
            squared = np.minimum(squared, (wx - ex * along) ** 2 + (wy - ey * along) ** 2)
            crosses = ((y >= ay) & (y < by) & (ex * wy > ey * wx)) | (
                (y < ay) & (y >= by) & (ex * wy <= ey * wx)
            )
            sign = np.where(crosses, -sign, sign)
        return (sign * np.sqrt(squared)).astype(np.float32)

    return distance


def _ngon(count: int, inner: float = 1.0) -> list[tuple[float, float]]:
    """Return the corners of a regular polygon on the unit circle, beginning at the top.

    If `inner` is less than 1, return a star instead, whose inner corners have this radius.
    """
    number = count * 2 if inner < 1 else count
    turns = [2 * np.pi * index / number for index in range(number)]
    radii = [inner if inner < 1 and index % 2 else 1.0 for index in range(number)]
    return [
        (float(np.sin(turn) * radius), float(-np.cos(turn) * radius))
        for turn, radius in zip(turns, radii, strict=True)
    ]


def _heart() -> list[tuple[float, float]]:
    """Return the curve x = 16 sin^3 t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t as a polygon."""
    t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) - 2.5
    return [(float(a) / 16, float(b) / 16) for a, b in zip(x, y, strict=True)]


_A, _B = 0.34, 1.0
_CROSS = [
    (-_A, -_B), (_A, -_B), (_A, -_A), (_B, -_A), (_B, _A), (_A, _A),
    (_A, _B), (-_A, _B), (-_A, _A), (-_B, _A), (-_B, -_A), (-_A, -_A),
]  # fmt: skip


def _circle(x: Floats, y: Floats, radius: float) -> Floats:
    return (np.hypot(x, y) - np.float32(radius)).astype(np.float32)


def _ring(x: Floats, y: Floats, radius: float) -> Floats:
    distance: Floats = (np.abs(np.hypot(x, y) - 0.75 * radius) - 0.25 * radius).astype(np.float32)
    return distance


def _moon(x: Floats, y: Floats, radius: float) -> Floats:
    bite = np.hypot(x - 0.55 * radius, y) - 0.8 * radius
    distance: Floats = np.maximum(np.hypot(x, y) - radius, -bite).astype(np.float32)
    return distance


SIGNED_DISTANCES: dict[str, Callable[[Floats, Floats, float], Floats]] = {
    "circle": _circle,
    "square": _polygon([(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]),
    "triangle": _polygon(_ngon(3)),
    "star": _polygon(_ngon(5, 0.42)),
    "heart": _polygon(_heart()),
    "diamond": _polygon([(0, -1.1), (0.75, 0), (0, 1.1), (-0.75, 0)]),
    "cross": _polygon(_CROSS),
    "ring": _ring,
    NEW_SHAPE: _moon,
}
"""Signed distance functions of the shapes, in pixels, negative inside.

Arguments: coordinates relative to the centre, and the radius.
"""


def _choice(
    rng: np.random.Generator, options: Sequence[str], weights: Sequence[float] | None = None
) -> str:
    return str(options[int(rng.choice(len(options), p=weights))])


def _size(size: str, rng: np.random.Generator) -> str:
    return {
        "small": _choice(rng, ("small", "little", "tiny")),
        "large": _choice(rng, ("large", "big", "huge")),
    }.get(size, "")


def _article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"
