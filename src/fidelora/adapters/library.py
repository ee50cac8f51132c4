"""Adapters by the sha256 of their bytes: read once, kept in memory up to a budget, read again when they are needed again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path

from fidelora.adapters.formats import Adapter, read_adapter
from fidelora.errors import AdapterChangedError, AdapterNotFoundError
from fidelora.recipe import AdapterRef, file_sha256

DEFAULT_BUDGET_BYTES = 2 * 2**30


class AdapterLibrary:
    """Finds the adapter that a recipe means. May be used from several threads.

    Args:
        budget_bytes: how much memory parsed adapters may keep; the one in use is kept even if it alone is larger.
        folder: where files are called `{sha256}.safetensors`, for recipes whose adapters have no path.
    """

    def __init__(self, budget_bytes: int = DEFAULT_BUDGET_BYTES, *, folder: Path | None = None) -> None:
        self._budget_bytes = budget_bytes
        self._folder = folder
        self._paths: dict[str, Path] = {}
        self._loaded: OrderedDict[str, Adapter] = OrderedDict()
        self._lock = threading.Lock()

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
        with self._lock:
            if ref.sha256 not in self._loaded:
                self._keep(self._read(ref))
            self._loaded.move_to_end(ref.sha256)
            return self._loaded[ref.sha256]

    def loaded(self) -> frozenset[str]:
        """Sha256 of every adapter that is in memory."""
        with self._lock:
            return frozenset(self._loaded)

    def _read(self, ref: AdapterRef) -> Adapter:
        """From any of the places where these bytes were seen."""
        stored = self._folder / f"{ref.sha256}.safetensors" if self._folder else None
        places = [path for path in (ref.path, self._paths.get(ref.sha256), stored) if path is not None]
        if not places:
            raise AdapterNotFoundError(
                f"No file is known for the adapter {ref.name or 'without a name'} with sha256 {ref.sha256[:12]}...; "
                "add it to the engine's library with `engine.adapters.add(path)`."
            )
        there = [path for path in places if path.is_file()]
        # A file of other bytes, or none at all, is left to the lines below, which say what is wrong with it.
        path = next((path for path in there if file_sha256(path) == ref.sha256), (there or places)[0])
        adapter = read_adapter(path)
        if adapter.sha256 != ref.sha256:
            raise AdapterChangedError(
                f"{path.name} has other bytes now (sha256 {adapter.sha256[:12]}...) than the recipe means "
                f"({ref.sha256[:12]}...); make a new recipe from the file, or put the old file back."
            )
        self._paths[adapter.sha256] = path
        return adapter

    def _keep(self, adapter: Adapter) -> None:
        self._loaded[adapter.sha256] = adapter
        while len(self._loaded) > 1 and sum(kept.size_bytes for kept in self._loaded.values()) > self._budget_bytes:
            self._loaded.popitem(last=False)
