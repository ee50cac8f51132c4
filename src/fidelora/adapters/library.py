"""In-memory cache of adapters by sha256, limited by a budget."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from weakref import WeakValueDictionary

from fidelora.adapter_file import AdapterFile, changed_error
from fidelora.adapters.read import Adapter, open_adapter, read_adapter
from fidelora.errors import AdapterError, AdapterNotFoundError, FideloraError, WeightsFileError
from fidelora.recipe import AdapterRef
from fidelora.safetensors_header import Header, read_file_header

DEFAULT_BUDGET_BYTES = 2 * 2**30
"""Default memory for parsed adapters: about ten LoRAs of 100 MB, whose float16 tensors take twice
that size in float32."""
_FLOAT32_BYTES = 4


class AdapterLibrary:
    """Loads the adapters of recipes. Thread-safe.

    Threads wait for each other only if they need the same adapter.

    Args:
        budget_bytes: memory for parsed adapters. The most recently used adapter and pinned adapters
            are kept even if they exceed the budget. Tensors of evicted adapters that prepacked
            convolutions still refer to are not counted.
        folder: folder of files named `{sha256}.safetensors`, for recipes whose adapters have no
            path.
        fetch: function that is called if none of the known paths exists. It takes a hash and a
            path in `folder`, writes the adapter with this hash to the path, and returns False if it
            does not find one. Its errors are raised.
    """

    def __init__(
        self,
        budget_bytes: int = DEFAULT_BUDGET_BYTES,
        *,
        folder: Path | None = None,
        fetch: Callable[[str, Path], bool] | None = None,
    ) -> None:
        self._budget_bytes = budget_bytes
        self._folder = folder
        self._fetch = fetch
        self._paths: dict[str, Path] = {}
        self._loaded: dict[str, Adapter] = {}  # least recently used first
        self._pins: Counter[str] = Counter()
        self._read_locks: WeakValueDictionary[str, threading.Lock] = WeakValueDictionary()
        self._lock = threading.Lock()  # guards the fields above; never held while reading a file

    def add(self, path: str | Path, multiplier: float = 1.0) -> AdapterRef:
        """Load the file at `path` and remember its path, for recipes that have only the sha256.

        Raises:
            AdapterError, WeightsFileError: see `read_adapter`.
        """
        ref = AdapterRef.from_file(path, multiplier)
        self.get(ref)
        if ref.path is not None:
            with self._lock:
                self._paths[ref.sha256] = ref.path
        return ref

    def get(self, ref: AdapterRef) -> Adapter:
        """Return the adapter with the sha256 of `ref`, from memory or from a file.

        The content that `ref.file` keeps in memory is used first, then files with the same hash.

        Raises:
            AdapterNotFoundError: no file is known for the sha256.
            AdapterChangedError: the file's content has changed.
            AdapterError, WeightsFileError: see `read_adapter`.
        """
        with self._read_lock(ref.sha256):
            adapter = self._from_memory(ref.sha256)
            if adapter is None:
                adapter = self._read(ref)
                with self._lock:
                    self._keep(adapter)
        if ref.file is not None:
            ref.file.drop_content()
        return adapter

    def prefetch(self, ref: AdapterRef) -> None:
        """Load the adapter unless it is in memory already or exceeds the budget.

        Pinned adapters count towards the budget. Errors are not raised.
        """
        try:
            with self._read_lock(ref.sha256):
                if self._from_memory(ref.sha256) is not None or not self._fits(
                    _bytes_in_memory(self._header(ref))
                ):
                    return
                adapter = self._read(ref)
                if self._fits(adapter.size_bytes):  # others may have been pinned meanwhile
                    with self._lock:
                        self._keep(adapter)
        except FideloraError:
            return  # `get` raises the same error when the adapter is needed

    @contextmanager
    def pinned(self, refs: Iterable[AdapterRef]) -> Iterator[None]:
        """Do not evict these adapters until the block ends; they need not be loaded yet."""
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
        """Return the sha256 of every adapter in memory."""
        with self._lock:
            return frozenset(self._loaded)

    def _read_lock(self, sha256: str) -> threading.Lock:
        """Return the lock for reading this adapter; it is garbage-collected when no longer used."""
        with self._lock:
            return self._read_locks.setdefault(sha256, threading.Lock())

    def _from_memory(self, sha256: str) -> Adapter | None:
        with self._lock:
            adapter = self._loaded.pop(sha256, None)
            if adapter is not None:
                self._loaded[sha256] = adapter
            return adapter

    def _fits(self, size_bytes: int) -> bool:
        """Return True if `size_bytes` fit into the budget beside the pinned adapters."""
        with self._lock:
            kept_bytes = sum(
                kept.size_bytes for sha256, kept in self._loaded.items() if sha256 in self._pins
            )
        return kept_bytes + size_bytes <= self._budget_bytes

    def _paths_of(self, ref: AdapterRef) -> list[Path]:
        """Return the existing files among the paths known for this hash.

        If none of them exists, `fetch` is called. If it finds no file either, only the first path
        is returned.

        Raises:
            AdapterNotFoundError: no path is known.
        """
        stored = self._folder / f"{ref.sha256}.safetensors" if self._folder else None
        with self._lock:
            paths = [
                path for path in (ref.path, self._paths.get(ref.sha256), stored) if path is not None
            ]
        if not paths:
            raise AdapterNotFoundError(
                f"No file is known for the adapter {ref.name or 'without a name'} with sha256 "
                f"{ref.sha256[:12]}...; add it with `engine.adapters.add(path)`."
            )
        existing = [path for path in paths if path.is_file()]
        if not existing and stored is not None and self._fetch is not None:
            existing = [stored] if self._fetch(ref.sha256, stored) else []
        return existing or paths[:1]

    def _header(self, ref: AdapterRef) -> Header:
        kept = _kept_file(ref)
        return kept.header if kept else read_file_header(self._paths_of(ref)[0])

    def _read(self, ref: AdapterRef) -> Adapter:
        file = _kept_file(ref) or self._open(ref)
        adapter = read_adapter(file)
        with self._lock:
            self._paths[adapter.sha256] = file.path
        return adapter

    def _open(self, ref: AdapterRef) -> AdapterFile:
        """Open the first known file that has the sha256 of `ref`.

        Raises:
            AdapterError, WeightsFileError: no file has it; the error is that of the first path.
        """
        errors: list[FideloraError] = []
        for path in self._paths_of(ref):
            try:
                file = open_adapter(path)
            except (AdapterError, WeightsFileError) as error:
                errors.append(error)
                continue
            if file.sha256 == ref.sha256:
                if ref.name and path.stem == ref.sha256:  # a server stores files by their hash
                    file.name = f"{ref.name}{path.suffix}"
                return file
            errors.append(changed_error(path.name, file.sha256, ref.sha256))
        raise errors[0]

    def _keep(self, adapter: Adapter) -> None:
        self._loaded[adapter.sha256] = adapter
        self._make_room()

    def _make_room(self) -> None:
        """Evict the least recently used adapters until the rest fits into the budget.

        The most recently used adapter and pinned adapters are never evicted.
        """
        sizes = {sha256: adapter.size_bytes for sha256, adapter in self._loaded.items()}
        kept_bytes = sum(sizes.values())
        for sha256 in list(sizes)[:-1]:
            if kept_bytes > self._budget_bytes and sha256 not in self._pins:
                kept_bytes -= sizes[sha256]
                del self._loaded[sha256]


def _kept_file(ref: AdapterRef) -> AdapterFile | None:
    """Return `ref.file` if it has the sha256 of `ref` and keeps its content, else None."""
    file = ref.file
    return file if file and file.sha256 == ref.sha256 and file.keeps_content else None


def _bytes_in_memory(header: Header) -> int:
    """Return the size of the adapter in memory, where all tensors are float32."""
    return _FLOAT32_BYTES * sum(math.prod(tensor.shape) for tensor in header.tensors.values())
