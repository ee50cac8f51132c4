"""Sheets that show a trainer's sample, the replayed sample and their difference."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

_GAP = 8  # pixels
_LABEL_HEIGHT = 16  # pixels
_AMPLIFY = 16  # makes a difference of one level visible
_MIN_SIDE = 256  # pixels; smaller images are enlarged


def side_by_side(
    sample: NDArray[np.uint8],
    replayed: NDArray[np.uint8],
    title: str,
    others: Mapping[str, NDArray[np.uint8]] | None = None,
) -> Image.Image:
    """Return a row with the trainer's sample, the replayed sample and their amplified difference.

    Small images are enlarged by a whole factor.

    Args:
        sample: uint8 RGB [height, width, 3].
        replayed: as `sample`, same size.
        others: more images of the same size, by label.
    """
    difference = np.abs(sample.astype(np.int16) - replayed.astype(np.int16)) * _AMPLIFY
    panels = {
        "trainer": sample,
        "Fidelora": replayed,
        f"difference x{_AMPLIFY}": difference.clip(0, 255).astype(np.uint8),
        **(others or {}),
    }
    height, width = replayed.shape[:2]
    factor = max(1, -(-_MIN_SIDE // max(height, width)))
    height, width = height * factor, width * factor
    sheet = Image.new(
        "RGB", (len(panels) * (width + _GAP) + _GAP, height + 2 * _LABEL_HEIGHT + 2 * _GAP), "white"
    )
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, _GAP // 2), title, fill="black")
    for column, (label, pixels) in enumerate(panels.items()):
        left = _GAP + column * (width + _GAP)
        sheet.paste(
            Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST),
            (left, _LABEL_HEIGHT + _GAP),
        )
        draw.text((left, _LABEL_HEIGHT + _GAP + height + 2), label, fill="black")
    return sheet


def stack_vertically(rows: list[Image.Image]) -> Image.Image:
    """Return one image with the rows below each other."""
    sheet = Image.new(
        "RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white"
    )
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet
