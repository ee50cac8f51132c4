"""MP4 files of videos, with the recipe inside, through PyAV. Does not import numpy or torch."""

from __future__ import annotations

import importlib.util
import io
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fidelora.errors import ImageFormatError, ImageRecordError

_CRF = "17"  # constant rate factor of x264; differences from the frames are hardly visible
_BT709 = 1  # number of ITU-R BT.709 in the colour fields of the stream
_LIMITED_RANGE = 1  # 16..235, which all players expect of MP4
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

    Args:
        name: name of the file for messages.

    Raises:
        ImageRecordError: it cannot be read, has no video, or PyAV is not installed.
    """
    try:
        av = _av()
    except ImageFormatError as error:
        raise ImageRecordError(f"{name} is an MP4 file. {error}") from error
    try:
        with av.open(io.BytesIO(content), format="mp4") as container:
            stream = container.streams.video[0]
            return stream.width, stream.height, dict(container.metadata)
    except Exception as error:  # damaged files raise errors of many types
        raise ImageRecordError(f"{name} is not an MP4 file that can be read.") from error


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
            "MP4 files need the package av: pip install 'fidelora[video]'. WebP needs no package."
        ) from error
    return av
