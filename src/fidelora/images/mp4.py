"""MP4 files of videos, with the recipe inside, through PyAV. Does not import numpy or torch."""

from __future__ import annotations

import importlib.util
import io
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fidelora.errors import ImageFormatError, ImageRecordError

_CRF = "17"  # constant rate factor of x264; differences from the frames are hardly visible
_BT709 = 1  # number of ITU-R BT.709 in the colour fields of the stream
_LIMITED_RANGE = 1  # 16..235, which all players expect of MP4
_MAX_BOXES = 1000
"""Largest number of boxes in one box; files of `mp4` have about ten."""
_START = b"ftyp"
"""Bytes 4 to 8 of every MP4 file."""


def is_mp4(content: bytes) -> bool:
    """Return True if `content` begins like an MP4 file."""
    return content[4:8] == _START


def can_write_mp4() -> bool:
    """Return True if PyAV (the extra `video`) is installed."""
    return importlib.util.find_spec("av") is not None


def mp4(frames: Sequence[Any], fps: int, texts: Mapping[str, str]) -> bytes:
    """Return an MP4 file with H.264, whose first bytes contain the index, for streaming.

    The encoder uses one thread, so the same frames give the same file with the same release of
    PyAV.

    Args:
        frames: arrays of numpy, uint8 RGB [height, width, 3]; the sides are even.
        fps: frames per second.
        texts: text fields of the file by name.

    Raises:
        ImageFormatError: PyAV is not installed.
    """
    av = _av()
    height, width = frames[0].shape[:2]
    # Moving the index to the start needs a file that can be opened twice.
    with tempfile.TemporaryDirectory(prefix="fidelora-") as folder:
        path = Path(folder) / "video.mp4"
        options = {"movflags": "+faststart+use_metadata_tags", "fflags": "+bitexact"}
        with av.open(str(path), "w", format="mp4", options=options) as container:
            container.metadata.update(texts)
            stream = container.add_stream("libx264", rate=fps, options={"crf": _CRF})
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            context = stream.codec_context
            context.thread_count = 1
            context.colorspace = context.color_primaries = context.color_trc = _BT709
            context.color_range = _LIMITED_RANGE
            for pixels in frames:
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                converted = frame.reformat(
                    format="yuv420p", dst_colorspace=_BT709, dst_color_range=_LIMITED_RANGE
                )
                container.mux(stream.encode(converted))
            container.mux(stream.encode())
        return path.read_bytes()


def read_mp4(content: bytes, name: str) -> tuple[int, int, dict[str, str]]:
    """Return width, height and the text fields of an MP4 file.

    Only the boxes that contain them are read, without PyAV: uploaded files are not trusted.
    Source of the layout: ISO/IEC 14496-12 (boxes, track header) and Apple's QuickTime File Format
    (metadata keys).

    Args:
        name: name of the file for messages.

    Raises:
        ImageRecordError: it cannot be read, or has no video.
    """
    try:
        movie = _child(content, 0, len(content), b"moov")
        return *_size(content, *movie), _texts(content, *movie)
    except (ValueError, struct.error) as error:
        raise ImageRecordError(f"{name} is not an MP4 file that can be read.") from error


def _boxes(content: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield kind, start and end of the contents of each box in a part of a file.

    Raises:
        ValueError: a box does not end within the part, or there are too many.
    """
    for _ in range(_MAX_BOXES):
        if start == end:
            return
        size, kind = struct.unpack_from(">I4s", content, start)
        head = 8
        if size == 1:
            (size,) = struct.unpack_from(">Q", content, start + head)
            head = 16
        stop = end if size == 0 else start + size
        if not start + head <= stop <= end:
            raise ValueError("a box does not end within the box that contains it")
        yield kind, start + head, stop
        start = stop
    raise ValueError(f"more than {_MAX_BOXES:,} boxes")


def _child(content: bytes, start: int, end: int, wanted: bytes) -> tuple[int, int]:
    """Return start and end of the contents of the first box of a kind."""
    for kind, first, last in _boxes(content, start, end):
        if kind == wanted:
            return first, last
    raise ValueError(f"no box {wanted!r}")


def _size(content: bytes, start: int, end: int) -> tuple[int, int]:
    """Return width and height of the first track of a movie, in pixels."""
    first, last = _child(content, *_child(content, start, end, b"trak"), b"tkhd")
    if last - first < 8:
        raise ValueError("the track header is too short")
    width, height = struct.unpack(">II", content[last - 8 : last])  # fixed point, 16 bits each
    return width >> 16, height >> 16


def _texts(content: bytes, start: int, end: int) -> dict[str, str]:
    """Return the metadata of a movie; empty if there are none."""
    kinds = [kind for kind, _, _ in _boxes(content, start, end)]
    if b"udta" in kinds:
        start, end = _child(content, start, end, b"udta")
        kinds = [kind for kind, _, _ in _boxes(content, start, end)]
    if b"meta" not in kinds:
        return {}
    first, last = _child(content, start, end, b"meta")
    if content[first + 4 : first + 8] != b"hdlr":
        first += 4  # a version and flags, which QuickTime does not have
    position, stop = _child(content, first, last, b"keys")
    keys = [
        content[one:two].decode(errors="replace")
        for _, one, two in _boxes(content, position + 8, stop)
    ]
    texts = {}
    for kind, one, two in _boxes(content, *_child(content, first, last, b"ilst")):
        number = int.from_bytes(kind, "big")
        if 1 <= number <= len(keys):
            value, value_end = _child(content, one, two, b"data")
            text = content[value + 8 : value_end]  # after the type and the locale
            texts[keys[number - 1]] = text.decode(errors="replace")
    return texts


def decode_mp4(content: bytes) -> list[Any]:
    """Return the frames of an MP4 file that `mp4` wrote, as arrays [height, width, 3]."""
    av = _av()
    with av.open(io.BytesIO(content), format="mp4") as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def _av() -> Any:
    try:
        import av
    except ModuleNotFoundError as error:
        raise ImageFormatError(
            "MP4 files need the package av. Install it in the folder of Fidelora's repository "
            "with: pip install '.[video]'. WebP needs no package."
        ) from error
    return av
