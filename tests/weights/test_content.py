"""Base models are identified by the content of their weight files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from tests.support import TINY_BASE, copy_base

from fidelora.families import get_family
from fidelora.recipe import LOCATIONS, file_sha256
from fidelora.weights import content
from fidelora.weights.content import ContentHashes
from fidelora.weights.files import BaseFiles

SD15 = get_family("sd15")
WEIGHTS = [
    TINY_BASE / "unet" / "diffusion_pytorch_model.safetensors",
    TINY_BASE / "vae" / "diffusion_pytorch_model.safetensors",
    TINY_BASE / "text_encoder" / "model.safetensors",
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "hashes.json"


@pytest.fixture
def hashed(monkeypatch) -> list[Path]:
    """The files that were read to hash them."""
    files: list[Path] = []
    original = file_sha256

    def counting(file: Path) -> str:
        files.append(file)
        return original(file)

    monkeypatch.setattr(content, "file_sha256", counting)
    return files


def settle(folder: Path) -> None:
    """Date all files a minute back, so that their hashes may be remembered."""
    for file in folder.rglob("*"):
        status = file.stat()
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns - 60 * 10**9))


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_folder_is_identified_by_the_weights_of_its_parts(path):
    names = [part.name for part in SD15.parts]
    files = {file.parent.name: file for file in WEIGHTS}
    lines = "".join(f"{name} {sha256(files[name])}\n" for name in names)
    found = ContentHashes(path).sha256_of(BaseFiles.find(SD15, str(TINY_BASE)))
    assert found == hashlib.sha256(lines.encode()).hexdigest()


def test_a_copy_elsewhere_has_the_same_hash(path, tmp_path):
    copy = copy_base(tmp_path)
    config = copy / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_diffusers_version": "9"}))
    hashes = ContentHashes(path)
    assert hashes.sha256_of(BaseFiles.find(SD15, str(copy))) == hashes.sha256_of(
        BaseFiles.find(SD15, str(TINY_BASE))
    )


def test_one_other_byte_gives_another_hash(path, tmp_path):
    copy = copy_base(tmp_path)
    hashes = ContentHashes(path)
    before = hashes.sha256_of(BaseFiles.find(SD15, str(copy)))
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    assert hashes.sha256_of(BaseFiles.find(SD15, str(copy))) != before


def test_a_checkpoint_has_the_sha256_of_its_file(path, tmp_path):
    checkpoint = tmp_path / "base.safetensors"
    shutil.copy(WEIGHTS[0], checkpoint)
    hashes = ContentHashes(path)
    plain = BaseFiles.find(SD15, str(checkpoint))
    configured = BaseFiles.find(SD15, str(checkpoint), config=str(TINY_BASE))
    other_vae = BaseFiles.find(SD15, str(checkpoint), decoder=str(TINY_BASE))
    assert hashes.sha256_of(plain) == sha256(checkpoint)
    found = {hashes.sha256_of(files) for files in (plain, configured, other_vae)}
    assert len(found) == 3, "another configuration or VAE gives the same hash"


def test_files_are_read_once_until_they_change(path, tmp_path, hashed):
    copy = copy_base(tmp_path)
    settle(copy)
    files = BaseFiles.find(SD15, str(copy))
    assert ContentHashes(path).cached_sha256_of(files) is None
    found = ContentHashes(path).sha256_of(files)
    assert len(hashed) == 3
    assert (
        ContentHashes(path).sha256_of(files) == ContentHashes(path).cached_sha256_of(files) == found
    )
    assert len(hashed) == 3
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns - 10**9))
    assert ContentHashes(path).cached_sha256_of(files) is None
    assert ContentHashes(path).sha256_of(files) == found
    assert len(hashed) == 4


def test_a_file_that_was_just_written_is_not_remembered(path, tmp_path, hashed):
    """It may change again without another size or time."""
    files = BaseFiles.find(SD15, str(copy_base(tmp_path)))
    for part in ("unet", "vae", "text_encoder"):
        for file in (tmp_path / "base" / part).iterdir():
            os.utime(file)
    ContentHashes(path).sha256_of(files)
    ContentHashes(path).sha256_of(files)
    assert len(hashed) == 6


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b'{"files": [], "bases": 3}', b'{"files": {"x": 1}}', b"\xff"]
)
def test_a_damaged_file_is_ignored_and_replaced(path, damage, tmp_path):
    path.parent.mkdir()
    path.write_bytes(damage)
    hashes = ContentHashes(path)
    files = BaseFiles.find(SD15, str(TINY_BASE))
    found = hashes.sha256_of(files)
    hashes.remember_location(
        found, {"base_model": str(TINY_BASE), "variant": "", "config": "", "vae": ""}
    )
    assert json.loads(path.read_bytes())["bases"].keys() == {found}
    path.write_text(json.dumps({"bases": {found: {"base_model": "x"}}}))
    assert hashes.location(found) is None


def test_without_a_writable_folder_hashes_are_computed_again(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    hashes = ContentHashes(file / "hashes.json")
    files = BaseFiles.find(SD15, str(TINY_BASE))
    assert hashes.sha256_of(files) == hashes.sha256_of(files)
    assert hashes.cached_sha256_of(files) is None


def test_hashes_of_removed_files_are_forgotten(path, tmp_path):
    copy = copy_base(tmp_path)
    settle(copy)
    hashes = ContentHashes(path)
    hashes.sha256_of(BaseFiles.find(SD15, str(copy)))
    assert len(json.loads(path.read_bytes())["files"]) == 3
    shutil.rmtree(copy)
    hashes.remember_location("ab" * 32, dict.fromkeys(LOCATIONS, ""))
    assert json.loads(path.read_bytes())["files"] == {}


def test_locations_are_absolute(path, monkeypatch):
    monkeypatch.chdir(TINY_BASE.parent)
    hashes = ContentHashes(path)
    location = {"base_model": "tiny-sd15", "variant": "", "config": "", "vae": "owner/name"}
    hashes.remember_location("ab" * 32, location)
    assert hashes.location("ab" * 32) == location | {"base_model": str(TINY_BASE)}
    assert hashes.location("cd" * 32) is None
