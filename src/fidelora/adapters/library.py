"""Adapters by the sha256 of their bytes: read once, kept in memory up to a budget, read again when they are needed again."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

from fidelora.adapters.formats import Adapter, read_adapter
from fidelora.errors import AdapterChangedError, AdapterNotFoundError
from fidelora.recipe import AdapterRef

DEFAULT_BUDGET_BYTES = 2 * 2**30


class AdapterLibrary:
    """Finds the adapter that a recipe means. Not safe for use from several threads at once.

    Args:
        budget_bytes: how much memory parsed adapters may keep; the one in use is kept even if it alone is larger.
    """

    def __init__(self, budget_bytes: int = DEFAULT_BUDGET_BYTES) -> None:
        self._budget_bytes = budget_bytes
        self._paths: dict[str, Path] = {}
        self._loaded: OrderedDict[str, Adapter] = OrderedDict()

    def add(self, path: str | Path, multiplier: float = 1.0) -> AdapterRef:
        """Read the file at `path` and remember it by its bytes, so that recipes that name only the hash find it.

        Raises:
            AdapterError, WeightsFileError: as `read_adapter`.
        """
        path = Path(path).resolve()
        adapter = read_adapter(path)
        self._paths[adapter.sha256] = path
        self._keep(adapter)
        return AdapterRef(adapter.sha256, multiplier, name=path.stem, path=path)

    def get(self, ref: AdapterRef) -> Adapter:
        """The adapter that `ref` means: from memory, or from its file if that still has the same bytes.

        Raises:
            AdapterNotFoundError: no file with these bytes is known.
            AdapterChangedError: the file has other bytes now.
            AdapterError, WeightsFileError: as `read_adapter`.
        """
        if ref.sha256 in self._loaded:
            self._loaded.move_to_end(ref.sha256)
            return self._loaded[ref.sha256]
        path = ref.path or self._paths.get(ref.sha256)
        if path is None:
            raise AdapterNotFoundError(
                f"No file is known for the adapter {ref.name or 'without a name'} with sha256 {ref.sha256[:12]}...; "
                "add it to the engine's library with `engine.adapters.add(path)`."
            )
        adapter = read_adapter(path)
        if adapter.sha256 != ref.sha256:
            raise AdapterChangedError(
                f"{path.name} has other bytes now (sha256 {adapter.sha256[:12]}...) than the recipe means "
                f"({ref.sha256[:12]}...); make a new recipe from the file, or put the old file back."
            )
        self._paths[adapter.sha256] = path
        self._keep(adapter)
        return adapter

    def _keep(self, adapter: Adapter) -> None:
        self._loaded[adapter.sha256] = adapter
        self._loaded.move_to_end(adapter.sha256)
        while len(self._loaded) > 1 and sum(kept.size_bytes for kept in self._loaded.values()) > self._budget_bytes:
            self._loaded.popitem(last=False)
