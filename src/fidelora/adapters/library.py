"""Adapters by the sha256 of their bytes: read once, kept in memory up to a budget, read again when they are needed again."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from weakref import WeakValueDictionary

from fidelora.adapters.read import Adapter, read_adapter
from fidelora.errors import AdapterChangedError, AdapterNotFoundError, FideloraError
from fidelora.recipe import AdapterRef, file_sha256
from fidelora.safetensors_header import read_file_header

DEFAULT_BUDGET_BYTES = 2 * 2**30
_FLOAT32_BYTES = 4


class AdapterLibrary:
    """Finds the adapter that a recipe means. May be used from several threads, which wait for each other only for one adapter.

    Args:
        budget_bytes: how much memory parsed adapters may keep; those in use (the one used last, and those that are pinned) are kept
            even if they alone are larger. What is merged into convolutions on the CPU stays besides, until the next is merged.
        folder: where files are called `{sha256}.safetensors`, for recipes whose adapters have no path.
    """

    def __init__(
        self, budget_bytes: int = DEFAULT_BUDGET_BYTES, *, folder: Path | None = None
    ) -> None:
        self._budget_bytes = budget_bytes
        self._folder = folder
        self._paths: dict[str, Path] = {}
        self._loaded: dict[str, Adapter] = {}  # the one used last comes last
        self._pins: Counter[str] = Counter()
        self._turns: WeakValueDictionary[str, threading.Lock] = WeakValueDictionary()
        self._lock = threading.Lock()  # of all of these; nobody has it while a file is read

    def add(self, path: str | Path, multiplier: float = 1.0) -> AdapterRef:
        """Read the file at `path` and remember it by its bytes, so that recipes that name only the hash find it.

        Raises:
            AdapterError, WeightsFileError: as `read_adapter`.
        """
        ref = AdapterRef.from_file(path, multiplier)
        self.get(ref)
        if ref.path is not None:
            with self._lock:
                self._paths[ref.sha256] = ref.path
        return ref

    def get(self, ref: AdapterRef) -> Adapter:
        """The adapter that `ref` means: from memory, or from a file that still has the same bytes.

        Raises:
            AdapterNotFoundError: no file with these bytes is known.
            AdapterChangedError: the file has other bytes now.
            AdapterError, WeightsFileError: as `read_adapter`.
        """
        with self._turn(ref.sha256):
            adapter = self._from_memory(ref.sha256)
            if adapter is None:
                adapter = self._read(ref)
                with self._lock:
                    self._keep(adapter)
            return adapter

    def prefetch(self, ref: AdapterRef) -> None:
        """Read the adapter now, unless it is in memory or would not fit there beside those that are pinned."""
        try:
            with self._turn(ref.sha256):
                if self._from_memory(ref.sha256) is not None or not self._fits(
                    _bytes_in_memory(self._places(ref)[0])
                ):
                    return
                adapter = self._read(ref)
                if self._fits(adapter.size_bytes):  # more may be pinned by now
                    with self._lock:
                        self._keep(adapter)
        except FideloraError:
            return  # nobody needs the adapter yet; `get` says what is wrong with it to whoever does, if it is still so then

    @contextmanager
    def pinned(self, refs: Iterable[AdapterRef]) -> Iterator[None]:
        """Let none of these adapters go until the block ends, whether they are in memory already or come there meanwhile."""
        pins = Counter(ref.sha256 for ref in refs)
        with self._lock:
            self._pins += pins
        try:
            yield
        finally:
            with self._lock:
                self._pins -= pins
                self._make_room()

    def loaded(self) -> frozenset[str]:
        """Sha256 of every adapter that is in memory."""
        with self._lock:
            return frozenset(self._loaded)

    def _turn(self, sha256: str) -> threading.Lock:
        """The lock of whoever reads this adapter; it is gone when nobody wants it any more."""
        with self._lock:
            return self._turns.setdefault(sha256, threading.Lock())

    def _from_memory(self, sha256: str) -> Adapter | None:
        with self._lock:
            adapter = self._loaded.pop(sha256, None)
            if adapter is not None:
                self._loaded[sha256] = adapter
            return adapter

    def _fits(self, size_bytes: int) -> bool:
        """Whether so much fits beside the adapters that are pinned."""
        with self._lock:
            kept_bytes = sum(
                kept.size_bytes for sha256, kept in self._loaded.items() if sha256 in self._pins
            )
        return kept_bytes + size_bytes <= self._budget_bytes

    def _places(self, ref: AdapterRef) -> list[Path]:
        """Files where these bytes were seen, or the first place where they were if there is no file any more.

        Raises:
            AdapterNotFoundError: they were never seen.
        """
        stored = self._folder / f"{ref.sha256}.safetensors" if self._folder else None
        with self._lock:
            places = [
                path for path in (ref.path, self._paths.get(ref.sha256), stored) if path is not None
            ]
        if not places:
            raise AdapterNotFoundError(
                f"No file is known for the adapter {ref.name or 'without a name'} with sha256 {ref.sha256[:12]}...; "
                "add it to the engine's library with `engine.adapters.add(path)`."
            )
        return [path for path in places if path.is_file()] or places[:1]

    def _read(self, ref: AdapterRef) -> Adapter:
        """From any of the places where these bytes were seen."""
        places = self._places(ref)
        # A file of other bytes, or none at all, is left to the lines below, which say what is wrong with it.
        path = next(
            (path for path in places if path.is_file() and file_sha256(path) == ref.sha256),
            places[0],
        )
        adapter = read_adapter(path)
        if adapter.sha256 != ref.sha256:
            raise AdapterChangedError(
                f"{path.name} has other bytes now (sha256 {adapter.sha256[:12]}...) than the recipe means "
                f"({ref.sha256[:12]}...); make a new recipe from the file, or put the old file back."
            )
        with self._lock:
            self._paths[adapter.sha256] = path
        return adapter

    def _keep(self, adapter: Adapter) -> None:
        self._loaded[adapter.sha256] = adapter
        self._make_room()

    def _make_room(self) -> None:
        """Let adapters go until the rest fits into the budget, those used longest ago first; never those in use."""
        sizes = {sha256: adapter.size_bytes for sha256, adapter in self._loaded.items()}
        kept_bytes = sum(sizes.values())
        for sha256 in list(sizes)[:-1]:
            if kept_bytes > self._budget_bytes and sha256 not in self._pins:
                kept_bytes -= sizes[sha256]
                del self._loaded[sha256]


def _bytes_in_memory(path: Path) -> int:
    """How large the adapter at `path` will be in memory, where all numbers are float32; from the file's header alone."""
    return _FLOAT32_BYTES * sum(
        math.prod(tensor.shape) for tensor in read_file_header(path).tensors.values()
    )
