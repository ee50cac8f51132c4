"""Pictures for people: the preview beside ours, and what differs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

_GAP = 8
_LABEL = 16
_AMPLIFY = 16
_MIN_SIDE = 256


def side_by_side(preview: NDArray[np.uint8], ours: NDArray[np.uint8], title: str) -> Image.Image:
    """The preview, ours, and their difference made 16 times stronger, in a row with labels; small images are enlarged whole-fold.

    Args:
        preview, ours: uint8 RGB [height, width, 3] of the same size.
    """
    difference = np.abs(preview.astype(np.int16) - ours.astype(np.int16)) * _AMPLIFY
    panels = {
        "preview in training": preview,
        "Fidelora": ours,
        f"difference x{_AMPLIFY}": difference.clip(0, 255).astype(np.uint8),
    }
    height, width = ours.shape[:2]
    factor = max(1, -(-_MIN_SIDE // max(height, width)))
    height, width = height * factor, width * factor
    sheet = Image.new(
        "RGB", (len(panels) * (width + _GAP) + _GAP, height + 2 * _LABEL + 2 * _GAP), "white"
    )
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, _GAP // 2), title, fill="black")
    for column, (label, pixels) in enumerate(panels.items()):
        left = _GAP + column * (width + _GAP)
        sheet.paste(
            Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST),
            (left, _LABEL + _GAP),
        )
        draw.text((left, _LABEL + _GAP + height + 2), label, fill="black")
    return sheet


def stack(rows: list[Image.Image]) -> Image.Image:
    """Images under each other."""
    sheet = Image.new(
        "RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white"
    )
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet
