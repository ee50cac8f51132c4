"""Header of a `.safetensors` file, read and checked before any tensor. Does not import torch.

Format: https://github.com/huggingface/safetensors#format. The file contains the header's length
(8 bytes, little endian), then the header (JSON), then the tensors without gaps. Web pages and
pickles are recognised by their first bytes, and truncated downloads by comparing all lengths and
offsets with the file's size. Each has its own error message.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fidelora.errors import PickleRefusedError, WeightsFileError
from fidelora.texts import cleaned

DTYPE_BYTES: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip

MAX_HEADER_BYTES = 32 * 2**20
"""Limit of the header's length. The header of an adapter has about 100 KB, that of a whole SDXL
checkpoint about 300 KB; metadata can add a few MB."""
MAX_TENSORS = 20_000
"""Limit of the number of tensors. Adapters of SDXL have up to 12,000, checkpoints about 3,000."""
MAX_NAME_CHARACTERS = 1000
"""Limit of the length of a tensor's name, which several functions split at its dots. Names in
adapters have up to about 200 characters."""
MAX_DIMENSIONS = 8  # of a tensor; weights have up to 5 (three-dimensional convolutions)
MAX_DIGITS = 20  # an unsigned 64-bit integer has at most 20
MAX_BRACKETS, MAX_COMMAS = 10 * MAX_TENSORS, 20 * MAX_TENSORS
"""Limits of the numbers of `[`, `{` and `,` in the header, including those in metadata. They are
counted before parsing, because small values take up to 40 times their length in memory. A tensor
has three brackets and about seven commas."""

_PICKLE_SUFFIXES = {".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle"}
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_HTML_STARTS = (b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor in the header; `dtype` is spelled as in the file (`F16`, `BF16`, `F32`, ...)."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """A checked header, whose tensors fill the rest of the file without gaps or overlaps."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    file_bytes: int


def refuse_pickle(path: Path) -> None:
    """Raise `PickleRefusedError` if files with the suffix of `path` are usually pickles.

    `read_header` recognises pickles with other suffixes by their content.
    """
    if path.suffix.lower() in _PICKLE_SUFFIXES:
        raise PickleRefusedError(
            f"{path.name} is a Python pickle, which can run code when it is opened; "
            "convert it to .safetensors and use that."
        )


def read_header(file: BinaryIO, name: str) -> Header:
    """Read and check the header of an open file; leave the file position after the header.

    Args:
        file: opened for binary reading, at any position.
        name: name of the file in error messages.

    Raises:
        WeightsFileError: the file is not a valid .safetensors file; the message gives the reason.
        PickleRefusedError: it is a pickle under another name.
    """
    return read_header_bytes(file, name)[0]


def read_header_bytes(file: BinaryIO, name: str) -> tuple[Header, bytes]:
    """Read and check the header like `read_header`, and also return the bytes that were read.

    The bytes include the length of the header.

    Raises:
        WeightsFileError: see `read_header`.
    """
    file_bytes = os.fstat(file.fileno()).st_size
    file.seek(0)
    start = file.read(512)
    _refuse_other_formats(start, name, file_bytes)

    (header_length,) = struct.unpack("<Q", start[:8])
    if header_length > MAX_HEADER_BYTES:
        raise WeightsFileError(
            f"{name} claims a header of {header_length:,} bytes; at most {MAX_HEADER_BYTES:,} are "
            "accepted. It is damaged or not a .safetensors file; download or export it again."
        )
    if 8 + header_length > file_bytes:
        raise WeightsFileError(
            f"{name} ends inside its own header: it is truncated; download or copy it again."
        )
    file.seek(8)
    raw = file.read(header_length)
    header = _check(_parse(raw, name), name, file_bytes - 8 - header_length, file_bytes)
    return header, start[:8] + raw


def read_file_header(path: Path) -> Header:
    """Return the checked header of the file at `path`; see `read_header`."""
    refuse_pickle(path)
    try:
        with path.open("rb") as file:
            return read_header(file, path.name)
    except OSError as error:
        raise WeightsFileError(f"{path} cannot be read: {error.strerror or error}.") from error


def _refuse_other_formats(start: bytes, name: str, file_bytes: int) -> None:
    text = start.lstrip().lower()
    if text.startswith(_HTML_STARTS):
        raise WeightsFileError(
            f"{name} is a web page (HTML), not weights; use the direct download link of the file."
        )
    if text.startswith(b"version https://git-lfs"):
        raise WeightsFileError(
            f"{name} is a Git LFS pointer, not the weights themselves; "
            "run `git lfs pull` in the repository of the file."
        )
    # A header of 640 bytes begins like a pickle of protocol 2, but its ninth byte is a brace.
    if start.startswith(_PICKLE_STARTS) and start[8:9] != b"{":
        raise PickleRefusedError(
            f"{name} is a Python pickle or zip archive under the name of a .safetensors file; "
            "convert it and use the result."
        )
    if file_bytes < 8:
        raise WeightsFileError(
            f"{name} has {file_bytes} bytes, too few for a .safetensors file; "
            "download or export it again."
        )


def _parse(raw: bytes, name: str) -> dict[str, Any]:
    def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        plain = dict(pairs)
        if len(plain) < len(pairs):
            counts = Counter(key for key, _ in pairs)
            repeated = [f"{key:.200}" for key, count in counts.items() if count > 1]
            raise WeightsFileError(
                f"{name} has {', '.join(repeated[:3])} twice in its header: it is damaged; "
                "export it again."
            )
        return plain

    def whole_number(digits: str) -> int:
        if len(digits) > MAX_DIGITS:  # the time of the conversion grows quadratically
            raise WeightsFileError(
                f"{name} has a number of {len(digits):,} digits in its header: it is damaged; "
                "export it again."
            )
        return int(digits)

    if raw.count(b"[") + raw.count(b"{") > MAX_BRACKETS or raw.count(b",") > MAX_COMMAS:
        raise WeightsFileError(
            f"{name} has more values in its header than {MAX_TENSORS:,} tensors need: it is "
            "damaged; export it again, with less metadata."
        )
    try:
        if not raw.startswith(b"{"):
            raise ValueError("the header must begin with a brace")
        header = json.loads(
            raw.decode("utf-8"), object_pairs_hook=without_repeats, parse_int=whole_number
        )
        assert isinstance(header, dict), "JSON that begins with a brace is an object"
        if b"\\u" in raw:  # lone surrogates can only be written as escapes
            return dict(cleaned(header))
        return header
    except (ValueError, RecursionError) as error:
        raise WeightsFileError(
            f"{name} is not a .safetensors file: its header is not a JSON object."
        ) from error


def _check(header: dict[str, Any], name: str, body_bytes: int, file_bytes: int) -> Header:
    metadata = header.pop("__metadata__", None)
    if metadata is None:  # some programs write null, which the safetensors library accepts
        metadata = {}
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise WeightsFileError(
            f"{name} has metadata that is not text: it is damaged; export it again."
        )
    if len(header) > MAX_TENSORS:
        raise WeightsFileError(
            f"{name} claims {len(header):,} tensors; at most {MAX_TENSORS:,} are accepted."
        )

    if longest := next((key for key in header if len(key) > MAX_NAME_CHARACTERS), None):
        raise WeightsFileError(
            f"{name} has a tensor whose name has {len(longest):,} characters; at most "
            f"{MAX_NAME_CHARACTERS:,} are accepted. It is damaged; export it again."
        )

    tensors: dict[str, TensorInfo] = {}
    spans: list[tuple[int, int, str]] = []
    for key, entry in header.items():
        tensors[key], begin, end = _tensor(key, entry, name)
        spans.append((begin, end, key))

    position = 0
    for begin, end, key in sorted(spans):
        if begin != position:
            raise WeightsFileError(
                f"{name} has tensors that overlap or leave gaps at {key:.200}: it is damaged; "
                "export it again."
            )
        position = end
    if position > body_bytes:
        raise WeightsFileError(
            f"{name} is truncated: its tensors need {position:,} bytes and it has {body_bytes:,}; "
            "download or copy it again."
        )
    if position < body_bytes:
        raise WeightsFileError(
            f"{name} has {body_bytes - position:,} bytes after its last tensor: it is damaged; "
            "export it again."
        )
    return Header(tensors, metadata, file_bytes)


def _tensor(key: str, entry: object, name: str) -> tuple[TensorInfo, int, int]:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
            pass
        case _:
            raise WeightsFileError(
                f"{name} has a malformed entry for the tensor {key:.200}: it is damaged; "
                "export it again."
            )
    if dtype not in DTYPE_BYTES:
        raise WeightsFileError(
            f"{name} stores {key:.200} as {dtype:.40}, which is not supported; "
            "export it as F16, BF16 or F32."
        )
    if len(shape) > MAX_DIMENSIONS:
        raise WeightsFileError(
            f"{name} has {key:.200} with {len(shape)} dimensions; at most {MAX_DIMENSIONS} are "
            "accepted. It is damaged; export it again."
        )
    if not all(type(number) is int for number in (*shape, begin, end)) or min(shape, default=0) < 0:
        sides = ", ".join(str(side) if type(side) is int else type(side).__name__ for side in shape)
        raise WeightsFileError(
            f"{name} has {key:.200} with the invalid shape [{sides}]: it is damaged; "
            "export it again."
        )
    if not 0 <= begin <= end or end - begin != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise WeightsFileError(
            f"{name} has {key:.200} with data offsets that do not match its shape: "
            "it is damaged; export it again."
        )
    return TensorInfo(dtype, tuple(shape)), begin, end
