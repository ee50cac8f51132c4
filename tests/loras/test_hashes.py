"""Hashes of LoRA files in the parameters of other programs' images."""

from __future__ import annotations

import hashlib

import pytest
import safetensors.torch
import torch
from tests.support import LORA

from fidelora.loras.hashes import has_hash
from fidelora.recipe import file_sha256


def tensor_bytes(content: bytes) -> bytes:
    return content[8 + int.from_bytes(content[:8], "little") :]


def test_hashes_of_the_file_and_of_its_tensors_identify_it():
    sha256 = file_sha256(LORA)
    of_tensors = hashlib.sha256(tensor_bytes(LORA.read_bytes())).hexdigest()
    assert of_tensors != sha256
    for right in (sha256, sha256[:10], sha256[:12].upper(), of_tensors, of_tensors[:12]):
        assert has_hash(LORA, sha256, right)
    of_nothing = hashlib.sha256(b"").hexdigest()  # some programs write it for every LoRA
    assert has_hash(LORA, sha256, of_nothing[:12])
    assert not has_hash(LORA, sha256, "0" * 12)


@pytest.mark.parametrize(("prefix", "is_identified"), [("abcdef", True), ("abcdee", False)])
def test_the_hash_in_the_metadata_identifies_a_file(tmp_path, prefix, is_identified):
    path = tmp_path / "a.safetensors"
    metadata = {"sshs_model_hash": "ABCDEF" + "0" * 58}
    safetensors.torch.save_file({"x": torch.zeros(1)}, path, metadata)
    assert has_hash(path, file_sha256(path), prefix) is is_identified


def test_a_file_without_header_is_identified_by_its_own_hash_only(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"no header")
    assert has_hash(path, file_sha256(path), file_sha256(path)[:10])
    assert not has_hash(path, file_sha256(path), "0" * 10)
