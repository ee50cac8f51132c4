"""The cache of adapter files by sha256: adding, finding and removing files."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
from tests.support import LOKR, LORA, LORA_CONV

from fidelora.adapters.library import AdapterLibrary
from fidelora.errors import (
    AdapterChangedError,
    AdapterFormatError,
    AdapterNotFoundError,
    WeightsFileError,
)
from fidelora.loras.cache import AdapterCache
from fidelora.recipe import file_sha256

YEAR_S = 365 * 24 * 3600


@pytest.fixture
def cache(tmp_path) -> AdapterCache:
    return AdapterCache(tmp_path / "cache", 10**9)


@pytest.fixture
def lora(tmp_path) -> Path:
    return Path(shutil.copyfile(LORA, tmp_path / "lora.safetensors"))


def test_a_cached_adapter_outlives_its_file(cache, lora):
    ref = cache.add(lora, "my/lora.safetensors")
    assert (ref.sha256, ref.name, ref.path) == (file_sha256(LORA), "lora", cache.path(ref.sha256))
    lora.unlink()
    assert AdapterLibrary(folder=cache.folder).get(ref).sha256 == ref.sha256
    assert cache.find(ref.sha256) == ref


def test_no_second_copy_is_made_where_links_are_possible(cache, lora):
    ref = cache.add(lora, "lora")
    assert cache.path(ref.sha256).samefile(lora)


def test_without_hard_links_the_file_is_copied(cache, lora, monkeypatch):
    def no_links(*_args):
        raise OSError("another disk")

    monkeypatch.setattr(os, "link", no_links)
    ref = cache.add(lora, "lora")
    assert not cache.path(ref.sha256).samefile(lora)
    assert file_sha256(cache.path(ref.sha256)) == ref.sha256


def test_a_file_overwritten_in_place_is_detected(cache, lora):
    old = cache.add(lora, "lora")
    lora.write_bytes(
        LORA_CONV.read_bytes()
    )  # the same inode: the cache's name shows the new bytes too
    assert cache.find(old.sha256) is None
    with pytest.raises(AdapterChangedError):
        AdapterLibrary(folder=cache.folder).get(old)
    new = cache.add(lora, "lora")
    assert new.sha256 == file_sha256(LORA_CONV)
    lora.write_bytes(LORA.read_bytes())
    assert cache.add(lora, "lora").sha256 == old.sha256
    assert cache.find(old.sha256) is not None


def test_two_writes_within_one_tick_of_the_clock_are_distinguished(cache, lora):
    """Size and modification time are equal; only the bytes differ."""
    content = bytearray(LORA.read_bytes())
    now = time.time_ns()
    os.utime(lora, ns=(now, now))
    first = cache.sha256_of(lora)
    content[-1] ^= 1
    lora.write_bytes(content)
    os.utime(lora, ns=(now, now))
    assert cache.sha256_of(lora) != first


def test_a_hash_is_remembered_until_the_file_changes(cache, lora, monkeypatch):
    old = time.time() - 60
    os.utime(lora, (old, old))
    first = cache.sha256_of(lora)
    calls: list[Path] = []

    def hash_and_note(path: Path) -> str:
        calls.append(path)
        return file_sha256(path)

    monkeypatch.setattr("fidelora.loras.cache.file_sha256", hash_and_note)
    assert cache.sha256_of(lora) == first
    assert calls == []
    lora.write_bytes(LOKR.read_bytes())
    os.utime(lora, (old + 1, old + 1))
    assert cache.sha256_of(lora) == file_sha256(LOKR)
    assert calls == [lora]


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (None, AdapterNotFoundError),
        (b"<html>", WeightsFileError),
        (b"\x02\0\0\0\0\0\0\0{}", AdapterFormatError),
    ],
)
def test_a_file_that_is_not_an_adapter_is_not_cached(cache, tmp_path, content, error):
    path = tmp_path / "x.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error):
        cache.add(path, "x.safetensors")
    with cache.temporary() as temporary:
        temporary.write_bytes(content or b"")
        with pytest.raises(WeightsFileError if content is None else error, match=r"y\.safetensors"):
            cache.adopt(temporary, "0" * 64, "y.safetensors")
    assert list(cache.folder.iterdir()) == []


def test_leftover_files_of_a_killed_server_are_removed(cache):
    old, new = cache.folder / ".fidelora-1.part", cache.folder / ".fidelora-2.part"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    AdapterCache(cache.folder, 10**9)
    assert list(cache.folder.iterdir()) == [new]  # another process may still write it


def test_a_url_is_remembered_but_not_stored_as_text(cache, lora):
    url = "https://example.com/x.safetensors?token=secret"
    ref = cache.add(lora, "x")
    assert cache.remembered_url(url) is None
    cache.remember_url(url, '"v1"', ref.sha256)
    assert cache.remembered_url(url) == ('"v1"', ref.sha256)
    assert b"secret" not in b"".join(path.read_bytes() for path in cache.folder.glob("*.json"))
    cache.path(ref.sha256).unlink()
    assert cache.remembered_url(url) is None  # the file was removed


def downloads(cache: AdapterCache, *sources: Path) -> list[str]:
    """Cache these files as downloads whose times of use are a year apart."""
    hashes = []
    for year, source in enumerate(sources):
        with cache.temporary() as temporary:
            shutil.copyfile(source, temporary)
            hashes.append(cache.adopt(temporary, file_sha256(source), source.name).sha256)
        then = time.time() - YEAR_S * (len(sources) - year)
        os.utime(cache.path(hashes[-1]), (then, then))
    return hashes


def test_the_least_recently_used_adapters_are_removed_first(tmp_path):
    cache = AdapterCache(tmp_path / "cache", LORA.stat().st_size + LOKR.stat().st_size)
    oldest, middle, newest = downloads(cache, LORA, LORA_CONV, LOKR)
    assert cache.find(oldest) is not None  # used now
    assert cache.trim(lambda sha256: False) == [middle]
    assert cache.find(oldest) is not None
    assert cache.find(newest) is not None
    assert cache.trim(lambda sha256: False) == []


def test_adapters_needed_by_jobs_or_stored_elsewhere_are_kept(tmp_path, lora):
    cache = AdapterCache(tmp_path / "cache", 0)
    needed, other = downloads(cache, LOKR, LORA_CONV)
    linked = cache.add(lora, "lora")
    assert cache.trim(lambda sha256: sha256 == needed) == [other]
    assert cache.find(needed) is not None
    assert cache.find(linked.sha256) is not None
