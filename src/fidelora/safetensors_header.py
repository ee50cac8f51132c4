"""Header of a `.safetensors` file, read and checked before any tensor. Does not import torch.

Format: https://github.com/huggingface/safetensors#format. The file contains the header's length
(8 bytes, little endian), then the header (JSON), then the tensors without gaps. All lengths and
offsets in the header are first compared with the file's size, so that truncated downloads, web
pages and pickles are recognised, and each has its own error message.
"""

from __future__ import annotations

import codecs
import json
import math
import os
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

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
MAX_DIMENSIONS = 8
MAX_DIGITS = 20  # an unsigned 64-bit integer has at most 20
MAX_BRACKETS, MAX_COMMAS = 10 * MAX_TENSORS, 20 * MAX_TENSORS
"""Limits of the numbers of `[`, `{` and `,` in the header, including those in metadata. They are
counted before parsing, because small values take up to 40 times their length in memory. A tensor
has three brackets and about seven commas."""

_PICKLE_SUFFIXES = {".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle"}
_ZIP_START = b"PK\x03\x04"
_PICKLE_STARTS = (_ZIP_START, b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_MARKUP_STARTS = ("<!doctype", "<html", "<?xml", "<head", "<body", "<error", "<script", "<!--")
_UNPACK = "unpack it and use the .safetensors file in it"
_USE_SAFETENSORS = "use the .safetensors version of the file"
_IS_IMAGE = ("an image", "use the LoRA that it was made with")
_OTHER_STARTS = {
    b"GGUF": ("a GGUF file, whose tensors are quantised", _USE_SAFETENSORS),
    b"\x1f\x8b": ("a gzip archive", _UNPACK),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", _UNPACK),
    b"Rar!\x1a\x07": ("a RAR archive", _UNPACK),
    b"\x28\xb5\x2f\xfd": ("a Zstandard archive", _UNPACK),
    b"BZh": ("a bzip2 archive", _UNPACK),
    b"\xfd7zXZ\x00": ("an xz archive", _UNPACK),
    b"\x89HDF\r\n\x1a\n": ("an HDF5 file of Keras", _USE_SAFETENSORS),
    b"\x89PNG\r\n\x1a\n": _IS_IMAGE,
    b"\xff\xd8\xff": _IS_IMAGE,
    b"RIFF": _IS_IMAGE,
}
"""Kind of a file and advice, by its first bytes."""

_START_BYTES = 512  # read to recognise other kinds of files; the mark of a tar archive is at 257


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
        if _begins_as_safetensors(path):
            raise PickleRefusedError(
                f"{path.name} has the extension of a Python pickle, but is a .safetensors file; "
                "rename it to .safetensors."
            )
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
    start = file.read(_START_BYTES)
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


def _begins_as_safetensors(path: Path) -> bool:
    """Return True if the file at `path` begins with a length and a brace; False if unreadable."""
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError:
        return False
    return _is_length(start) and start[8:] == b"{"


def _is_length(start: bytes) -> bool:
    """Return True if 8 bytes can be the length of a header, at most `MAX_HEADER_BYTES`."""
    return len(start) >= 8 and 0 < int.from_bytes(start[:8], "little") <= MAX_HEADER_BYTES


def _refuse_other_formats(start: bytes, name: str, file_bytes: int) -> None:
    """Raise an error that names the kind of the file if it is not a .safetensors file.

    Args:
        start: the first `_START_BYTES` of the file.
    """
    # A header of 640 bytes begins like a pickle of protocol 2, but its ninth byte is a brace.
    if _is_length(start) and start[8:9] == b"{":
        return
    _refuse_archive(start, name)
    for signature, (kind, advice) in _OTHER_STARTS.items():
        if start.startswith(signature):
            raise WeightsFileError(f"{name} is {kind}, not a .safetensors file; {advice}.")
    if start.startswith(codecs.BOM_UTF8) and _is_length(start[3:]):
        raise WeightsFileError(
            f"{name} has a byte order mark before its header, so a text editor has saved it: it is "
            "damaged; download or export it again."
        )
    if (text := _as_text(start)) is not None:
        _refuse_text(text, name)
    if len(start) == _START_BYTES and not any(start):
        raise WeightsFileError(
            f"{name} begins with {_START_BYTES} zeros: the download is incomplete, or the disk "
            "was full; download or copy it again."
        )
    if file_bytes < 8:
        raise WeightsFileError(
            f"{name} has {file_bytes} bytes, too few for a .safetensors file; "
            "download or export it again."
        )


def _refuse_archive(start: bytes, name: str) -> None:
    if start.startswith(_ZIP_START) and b"data.pkl" not in start:
        raise PickleRefusedError(f"{name} is a zip archive; {_UNPACK}.")
    if start.startswith(_PICKLE_STARTS):
        raise PickleRefusedError(
            f"{name} is a Python pickle or zip archive under the name of a .safetensors file; "
            "convert it and use the result."
        )
    if start[257:262] == b"ustar":
        raise WeightsFileError(f"{name} is a tar archive, not a .safetensors file; {_UNPACK}.")


def _as_text(start: bytes) -> str | None:
    """Return the beginning of a text file in UTF-8 or UTF-16; None for other files."""
    encoding = "utf-8-sig"
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    try:  # the last character may be cut off
        text = codecs.getincrementaldecoder(encoding)().decode(start).strip()
    except UnicodeDecodeError:
        return None
    is_text = bool(text) and all(one.isprintable() or one.isspace() for one in text)
    return text if is_text else None


def _refuse_text(text: str, name: str) -> NoReturn:
    if text.lower().startswith(_MARKUP_STARTS):
        raise WeightsFileError(
            f"{name} is a web page (HTML), not weights; use the direct download link of the file."
        )
    if text.lower().startswith("version https://git-lfs"):
        raise WeightsFileError(
            f"{name} is a Git LFS pointer, not the weights themselves; "
            "run `git lfs pull` in the repository of the file."
        )
    # The text is not quoted: the file may have been downloaded by a server, for another user.
    raise WeightsFileError(
        f"{name} is a text file, not weights. If a website sent an error message instead of the "
        "file, download the file again, logged in if the site requires it."
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
        if len(digits) > MAX_DIGITS:  # conversion takes time with the square of the length
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
