"""In-memory cache of adapters: eviction, pins, prefetching and threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support import save_adapter

from fidelora import AdapterRef
from fidelora.adapter_file import AdapterFile
from fidelora.adapters import library as module
from fidelora.adapters.library import AdapterLibrary
from fidelora.adapters.read import Adapter, open_adapter
from fidelora.errors import AdapterChangedError, AdapterNotFoundError, WeightsFileError

NUMBERS = 2 * 64 * 64
SIZE = 4 * NUMBERS
"""Size of each adapter of this module in memory."""
DEADLINE_S = 60.0
"""Reached only by failures."""


class Reads:
    """Replacement of `open_adapter` that counts calls and runs `before` first."""

    def __init__(self) -> None:
        self.of: list[str] = []
        self.before: Callable[[str], Any] = lambda name: None

    def __call__(self, path: Path) -> AdapterFile:
        self.of.append(path.stem)
        self.before(path.stem)
        return open_adapter(path)


@pytest.fixture
def reads(monkeypatch):
    made = Reads()
    monkeypatch.setattr(module, "open_adapter", made)
    return made


@pytest.fixture
def refs(tmp_path):
    return [reference(adapter_file(tmp_path, name, index)) for index, name in enumerate("abcd")]


def reference(path: Path) -> AdapterRef:
    """A reference without the content of its file, as another process receives it."""
    return replace(AdapterRef.from_file(path), file=None)


def adapter_file(folder: Path, name: str, number: int, dtype: torch.dtype = torch.float32) -> Path:
    shape = (NUMBERS // 2 // 64, 64)
    tensors = {
        f"lora_unet_x.lora_{part}.weight": torch.full(shape, float(number), dtype=dtype)
        for part in ("down", "up")
    }
    return save_adapter(folder / f"{name}.safetensors", tensors)


def names(library: AdapterLibrary, refs: list[AdapterRef]) -> str:
    """Return the names of the adapters that are in memory."""
    return "".join(ref.name for ref in refs if ref.sha256 in library.loaded())


class BackgroundCall:
    """A call that runs on a separate thread."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._result: list[Any] = []
        self._thread = threading.Thread(target=lambda: self._result.append(call()), daemon=True)
        self._thread.start()

    def result(self) -> Any:
        self._thread.join(DEADLINE_S)
        assert self._result, "the call did not return in time"
        return self._result[0]


def test_adapters_report_their_size(refs):
    library = AdapterLibrary()
    assert [library.get(ref).size_bytes for ref in refs] == [SIZE] * 4


def test_the_least_recently_used_adapter_is_evicted_first(refs):
    library = AdapterLibrary(2 * SIZE)
    for index in (0, 1, 0, 2):
        library.get(refs[index])
    assert names(library, refs) == "ac"


def test_a_pinned_adapter_is_not_evicted(refs):
    library = AdapterLibrary(2 * SIZE)
    library.get(refs[0])
    with library.pinned(refs[:1]):
        for ref in refs[1:]:
            library.get(ref)
            assert names(library, refs) == "a" + ref.name
    library.get(refs[1])
    assert names(library, refs) == "bd"


def test_an_adapter_can_be_pinned_before_it_is_loaded(refs):
    library = AdapterLibrary(SIZE)
    with library.pinned(refs[:2]):
        for ref in refs[:3]:
            library.get(ref)
        assert names(library, refs) == "abc"  # a and b are pinned, c was used last
        library.get(refs[3])
        assert names(library, refs) == "abd"
    assert names(library, refs) == "d"


def test_pins_are_counted(refs):
    library = AdapterLibrary(SIZE)
    with library.pinned(refs[:1]):
        with library.pinned([*refs[:1], *refs[:1]]):
            library.get(refs[0])
        library.get(refs[1])
        assert names(library, refs) == "ab"
    library.get(refs[2])
    assert names(library, refs) == "c"


def test_pins_end_with_the_block_even_if_it_fails(refs):
    library = AdapterLibrary(SIZE)
    library.get(refs[0])
    with pytest.raises(ZeroDivisionError), library.pinned(refs[:1]):
        raise ZeroDivisionError
    library.get(refs[1])
    assert names(library, refs) == "b"


def test_a_prefetched_adapter_is_not_read_again(refs, reads):
    library = AdapterLibrary()
    library.prefetch(refs[0])
    library.prefetch(refs[0])
    assert library.get(refs[0]).sha256 == refs[0].sha256
    assert reads.of == ["a"]


def test_a_failed_prefetch_raises_only_when_the_adapter_is_needed(tmp_path, refs):
    library = AdapterLibrary()
    Path(tmp_path / "a.safetensors").write_text("<html>")
    adapter_file(tmp_path, "b", 77)
    unknown = AdapterRef("0" * 64)
    for ref, error in (
        (refs[0], WeightsFileError),
        (refs[1], AdapterChangedError),
        (unknown, AdapterNotFoundError),
    ):
        library.prefetch(ref)
        with pytest.raises(error):
            library.get(ref)
    assert library.loaded() == frozenset()
    adapter_file(tmp_path, "a", 0)
    assert library.get(refs[0]).sha256 == refs[0].sha256  # errors are not cached


def test_prefetch_raises_errors_that_are_not_about_the_file(refs, reads):
    def no_memory(name: str) -> None:
        raise MemoryError

    reads.before = no_memory
    with pytest.raises(MemoryError):
        AdapterLibrary().prefetch(refs[0])


def test_prefetching_drops_the_least_recently_used_but_nothing_pinned(refs):
    library = AdapterLibrary(3 * SIZE)
    for ref in refs[:3]:
        library.get(ref)
    with library.pinned(refs[:1]):
        library.prefetch(refs[3])
        assert names(library, refs) == "acd"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("room", [0, -1])
def test_prefetch_skips_what_does_not_fit_beside_pinned_adapters(
    tmp_path, refs, reads, dtype, room
):
    """Adapters saved in half precision take twice the file's size in memory."""
    library = AdapterLibrary(2 * SIZE + room)
    wanted = reference(adapter_file(tmp_path, "wanted", 1, dtype))
    library.get(refs[0])
    with library.pinned(refs[:1]):
        library.prefetch(wanted)
    assert reads.of == (["a", "wanted"] if room == 0 else ["a"])
    assert len(library.loaded()) == len(reads.of)


def test_an_adapter_that_no_longer_fits_after_reading_is_not_kept(refs, reads):
    library = AdapterLibrary(2 * SIZE)
    for ref in refs[:2]:
        library.get(ref)
    pins = library.pinned(refs[:2])
    reads.before = lambda name: pins.__enter__()
    library.prefetch(refs[2])
    assert reads.of == ["a", "b", "c"]
    assert names(library, refs) == "ab"


def test_prefetching_counts_as_use(refs):
    """Prefetching an adapter that is in memory counts as use, because it is needed next."""
    library = AdapterLibrary(2 * SIZE)
    for ref in refs[:2]:
        library.get(ref)
    library.prefetch(refs[0])
    library.get(refs[2])
    assert names(library, refs) == "ac"


def test_reading_an_adapter_does_not_block_other_adapters(refs, reads):
    library = AdapterLibrary()
    library.get(refs[0])
    reading, go = threading.Event(), threading.Event()

    def slow(name: str) -> None:
        if name == "b":
            reading.set()
            assert go.wait(DEADLINE_S)

    reads.before = slow
    slow_one = BackgroundCall(partial(library.prefetch, refs[1]))
    assert reading.wait(DEADLINE_S)
    for ref in (refs[0], refs[2]):  # from memory, and from its file
        assert BackgroundCall(partial(library.get, ref)).result().sha256 == ref.sha256
    assert names(library, refs) == "ac"
    go.set()
    slow_one.result()
    assert names(library, refs) == "abc"


@pytest.mark.parametrize("first", ["get", "prefetch"])
def test_concurrent_calls_for_one_adapter_read_it_once(refs, reads, monkeypatch, first):
    library = AdapterLibrary()
    turns, all_want_it = threading.Semaphore(0), threading.Event()
    turn = library._read_lock

    def counted(sha256: str) -> threading.Lock:
        try:
            return turn(sha256)
        finally:
            turns.release()

    def slow(name: str) -> None:
        assert all_want_it.wait(DEADLINE_S)

    monkeypatch.setattr(library, "_read_lock", counted)
    reads.before = slow
    readers = [BackgroundCall(partial(getattr(library, first), refs[0]))]
    readers += [BackgroundCall(partial(library.get, refs[0])) for _ in range(7)]
    for _ in readers:
        assert turns.acquire(timeout=DEADLINE_S)
    all_want_it.set()
    adapters = {id(reader.result()) for reader in readers[1:]}
    assert len(adapters) == 1
    assert reads.of == ["a"]


def test_a_thread_retries_after_the_reader_it_waited_for_failed(tmp_path, refs, reads):
    """Its reference may have another path of the same bytes."""
    library = AdapterLibrary()
    reading, waiting = threading.Event(), threading.Event()
    elsewhere = replace(refs[0], path=tmp_path / "elsewhere.safetensors")
    elsewhere.path.write_bytes(refs[0].path.read_bytes())
    refs[0].path.write_text("<html>")

    def fails_while_another_waits(name: str) -> None:
        if name == "a":
            reading.set()
            assert waiting.wait(DEADLINE_S)

    def second() -> Adapter:
        assert reading.wait(DEADLINE_S)
        waiting.set()
        return library.get(elsewhere)

    def first() -> str:
        with pytest.raises(WeightsFileError):
            library.get(refs[0])
        return "failed"

    reads.before = fails_while_another_waits
    one, other = BackgroundCall(first), BackgroundCall(second)
    assert one.result() == "failed"
    assert other.result().sha256 == refs[0].sha256


def test_unused_read_locks_are_removed(refs):
    library = AdapterLibrary()
    for ref in refs:
        library.get(ref)
    assert len(library._read_locks) == 0


def test_errors_name_an_adapter_and_not_the_hash_it_is_stored_under(tmp_path):
    ref = AdapterRef.from_file(adapter_file(tmp_path, "sks.v1", 0))
    stored = tmp_path / f"{ref.sha256}.safetensors"
    (tmp_path / "sks.v1.safetensors").rename(stored)
    ref = AdapterRef(ref.sha256, name=ref.name, path=stored)
    assert AdapterLibrary().get(ref).name == "sks.v1"
    assert AdapterLibrary().get(replace(ref, name="")).name == ref.sha256
