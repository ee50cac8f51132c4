"""Hashes by which other programs identify LoRA files."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fidelora.adapter_file import EMPTY_SHA256
from fidelora.errors import WeightsFileError
from fidelora.safetensors_header import read_file_header


def has_hash(path: Path, sha256: str, prefix: str) -> bool:
    """Return True if a hash in the parameters of an image fits this LoRA file.

    AUTOMATIC1111's web UI writes the sha256 of the tensors without the header, which the trainer
    also stores in the metadata (`sshs_model_hash`). Other programs write the sha256 of the file.
    Older versions of the trainer and some other programs write the sha256 of an empty file by
    mistake, which fits every LoRA.

    Args:
        path: the .safetensors file.
        sha256: hash of the whole file.
        prefix: first digits of the hash in the image, in upper or lower case.
    """
    prefix = prefix.lower()
    if sha256.startswith(prefix) or EMPTY_SHA256.startswith(prefix):
        return True
    try:
        stored = read_file_header(path).metadata.get("sshs_model_hash", "")
    except WeightsFileError:
        return False
    return stored.lower().startswith(prefix) or _hash_of_tensors(path).startswith(prefix)


def _hash_of_tensors(path: Path) -> str:
    """Return the sha256 of the bytes after the header."""
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        return hashlib.file_digest(file, "sha256").hexdigest()
