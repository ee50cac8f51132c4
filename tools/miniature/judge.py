"""Recognise scenes in pictures of the miniature by geometry and colour, without a learned model.

The background is the colour of the border. Each connected region of another colour is a thing. Its
colour is the median of its inside, matched to the nearest colour of the world; its shape is that of
the reference drawing with the largest overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from tools.miniature import world

_BORDER = 4  # width in pixels of the border that shows the background
_MIN_CONTRAST = 20.0
"""Distance in CIELAB above which two colours are clearly different to the eye."""
_MIN_REGION_PIXELS = 80
"""Pixels of the smallest region that counts as a thing."""
_OUTLINE_DEPTH = 5.5
"""Distance from the edge in pixels beyond which no outline extends."""
_GRID = 40  # cells on each side of the grid in which shapes are compared

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Seen:
    """A recognised thing, with the centre of its region."""

    shape: str
    colour: str
    x: float
    y: float


@dataclass(frozen=True)
class Score:
    """Properties of the picture that match the scene.

    With two things, `shape` and `colour` are true if both things match, in the right order.
    """

    shape: bool
    colour: bool
    background: bool


def score(pixels: NDArray[np.uint8], scene: world.Scene) -> Score:
    """Compare the picture with the scene that it should show."""
    background, things = recognise(pixels)
    wanted = scene.things
    # Keep the largest ones, as many as expected: an extra speck is ignored, a missing thing is not.
    things = sorted(
        things[: len(wanted)],
        key=lambda thing: thing.y if scene.arrangement == "above" else thing.x,
    )
    complete = len(things) == len(wanted)
    return Score(
        shape=complete and [thing.shape for thing in things] == [thing.shape for thing in wanted],
        colour=complete
        and [thing.colour for thing in things] == [thing.colour for thing in wanted],
        background=background == scene.background,
    )


def recognise(pixels: NDArray[np.uint8]) -> tuple[str, list[Seen]]:
    """Return the background colour, and the things from the largest to the smallest."""
    lab = to_lab(pixels)
    edge = np.ones(lab.shape[:2], bool)
    edge[_BORDER:-_BORDER, _BORDER:-_BORDER] = False
    ground = np.median(lab[edge], axis=0)
    regions, count = ndimage.label(
        ndimage.binary_opening(np.linalg.norm(lab - ground, axis=2) > _MIN_CONTRAST, iterations=1)
    )
    found = []
    for number in range(1, count + 1):
        mask = regions == number
        if mask.sum() >= _MIN_REGION_PIXELS:
            y, x = ndimage.center_of_mass(mask)
            found.append((int(mask.sum()), Seen(_shape(mask), _name(_inside(lab, mask)), x, y)))
    return _name(ground), [seen for _, seen in sorted(found, key=lambda one: -one[0])]


def to_lab(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Convert sRGB levels to CIELAB under D65.

    Source: https://www.w3.org/TR/css-color-4/#color-conversion-code.
    """
    linear = pixels.astype(np.float64) / 255
    linear = np.where(linear <= 0.04045, linear / 12.92, ((linear + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    xyz = linear @ to_xyz.T / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.stack(
        [116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])],
        axis=-1,
    )


def _inside(lab: NDArray[np.float64], mask: Mask) -> NDArray[np.float64]:
    """Return the median colour of a region's inner pixels, which an outline does not cover.

    If the region is thinner than an outline, use its innermost pixels.
    """
    depth = ndimage.distance_transform_edt(mask)
    middle: NDArray[np.float64] = np.median(
        lab[depth >= min(_OUTLINE_DEPTH, float(depth.max()) * 0.8)], axis=0
    )
    return middle


@cache
def _palette() -> tuple[list[str], NDArray[np.float64]]:
    return list(world.COLOURS), to_lab(np.array(list(world.COLOURS.values()), np.uint8))


def _name(lab: NDArray[np.float64]) -> str:
    names, colours = _palette()
    return names[int(np.linalg.norm(colours - lab, axis=1).argmin())]


def _shape(mask: Mask) -> str:
    seen = _normalised(mask)
    templates = _templates()
    overlap = {
        shape: max(_agreement(seen, template) for template in drawn)
        for shape, drawn in templates.items()
    }
    return max(overlap, key=lambda shape: overlap[shape])


def _agreement(a: Mask, b: Mask) -> float:
    return float((a & b).sum() / (a | b).sum())


@cache
def _templates() -> dict[str, Sequence[Mask]]:
    """Return reference drawings of each shape, plain and outlined, for each size."""
    radii = [radius for low, high in world.RADII.values() for radius in (low, high)]
    x, y = world.grid(world.SIZE / 2, world.SIZE / 2)
    return {
        shape: [
            _normalised(distance(x, y, radius) < outline)
            for radius in radii
            for outline in (0.0, 4.0)
        ]
        for shape, distance in world.SIGNED_DISTANCES.items()
    }


def _normalised(mask: Mask) -> Mask:
    """Crop the region and scale it to a small grid, keeping its proportions."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    crop = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    side = max(crop.shape)
    square: NDArray[Any] = np.zeros((side, side), bool)
    top, left = (side - crop.shape[0]) // 2, (side - crop.shape[1]) // 2
    square[top : top + crop.shape[0], left : left + crop.shape[1]] = crop
    at = ((np.arange(_GRID) + 0.5) * side / _GRID).astype(int)
    scaled: Mask = square[np.ix_(at, at)]
    return scaled
