"""MP4 files: writing them through PyAV, and reading their texts without it."""

from __future__ import annotations

import json
import struct
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fidelora.errors import ImageFormatError, ImageRecordError
from fidelora.images import mp4
from fidelora.images.read import RECORD_KEY, read_origin
from fidelora.recipe import Recipe

FRAMES = [np.full((64, 80, 3), 40 * number, np.uint8) for number in range(5)]
TEXTS = {"fidelora": '{"a": "\u00e9 \\n"}' * 300, "comment": "Steps: 2"}


def box(kind: bytes, *parts: bytes) -> bytes:
    content = b"".join(parts)
    return struct.pack(">I4s", 8 + len(content), kind) + content


def file_of(texts: dict[str, str], *, has_version: bool = True) -> bytes:
    """Return the boxes of an MP4 file that are read: the size and the texts."""
    keys = [box(b"mdta", name.encode()) for name in texts]
    values = [
        box(struct.pack(">I", number), box(b"data", struct.pack(">II", 1, 0), text.encode()))
        for number, text in enumerate(texts.values(), start=1)
    ]
    meta = box(
        b"meta",
        bytes(4) if has_version else b"",
        box(b"hdlr", bytes(24)),
        box(b"keys", struct.pack(">II", 0, len(keys)), *keys),
        box(b"ilst", *values),
    )
    header = box(b"tkhd", bytes(76), struct.pack(">II", 80 << 16, 64 << 16))
    return box(b"ftyp", b"isom") + box(b"moov", box(b"trak", header), box(b"udta", meta))


def test_a_file_of_pyav_is_read_without_it(monkeypatch):
    pytest.importorskip("av")
    content = mp4.mp4(FRAMES, 8, TEXTS)
    assert content == mp4.mp4(FRAMES, 8, TEXTS)
    assert content.index(b"moov") < content.index(b"mdat")
    decoded = mp4.decode_mp4(content)
    assert len(decoded) == 5
    assert max(abs(int(one.mean()) - 40 * number) for number, one in enumerate(decoded)) <= 2
    monkeypatch.setattr(mp4, "_av", None)
    width, height, texts = mp4.read_mp4(content, "a.mp4")
    assert (width, height) == (80, 64)
    assert TEXTS.items() <= texts.items()


@pytest.mark.parametrize("has_version", [True, False])
def test_a_recipe_is_read(has_version):
    recipe = Recipe(model="wan21_1b", prompt="a ball", frames=9, fps=8)
    record = json.dumps({"recipe": recipe.to_dict()})
    content = file_of({RECORD_KEY: record}, has_version=has_version)
    origin = read_origin(content)
    assert (origin.format, origin.width, origin.height) == ("mp4", 80, 64)
    assert origin.recipe == recipe
    assert mp4.is_mp4(content)


def test_a_file_without_a_recipe_is_refused():
    with pytest.raises(ImageRecordError, match="has neither a Fidelora recipe nor"):
        read_origin(file_of({"title": "a"}))


@given(st.data())
def test_damaged_files_are_refused(data):
    content = bytearray(file_of(TEXTS))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(8, len(content) - 1))] = data.draw(st.integers(0, 255))
    kept = bytes(content[: data.draw(st.integers(8, len(content)))])
    try:
        width, height, texts = mp4.read_mp4(kept, "a.mp4")
    except ImageRecordError:
        return
    assert all(isinstance(text, str) for text in texts.values())
    assert max(width, height) < 2**16


def test_too_many_boxes_are_refused():
    content = file_of({})
    with pytest.raises(ImageRecordError, match="not an MP4 file that can be read"):
        mp4.read_mp4(content[:16] + box(b"free") * 2000 + content[16:], "a.mp4")


def test_without_pyav_the_error_names_the_package_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImageFormatError, match=r"pip install '\.\[video\]'"):
        mp4.mp4(FRAMES, 8, TEXTS)
