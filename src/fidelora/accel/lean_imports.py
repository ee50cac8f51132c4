"""Imports of diffusers and transformers without modules of torch that images on a CPU do not need.

* `torch.distributed` is missing in some builds of torch, and both libraries support such builds.
  During these imports, it is treated as missing.
* `torch._dynamo`, torch's compiler, is imported because classes and functions are marked for it.
  During these imports, a stand-in ignores the marks. Any other use loads the compiler, so a future
  release of a library can make the imports slower, but not break them.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_COMPILER = "torch._dynamo"
_INDEPENDENT = f"{_COMPILER}._trace_wrapped_higher_order_op"
"""Module of the compiler that transformers needs, and that does not load the others."""
_MARKS = ("allow_in_graph", "assume_constant_result", "disable")
"""Functions of the compiler that mark a class or a function, and return it."""


@contextmanager
def lean_imports() -> Iterator[None]:
    """Import without `torch.distributed` and torch's compiler in this block.

    Use it only in processes that compute images on a CPU, where nothing is compiled. Libraries that
    are imported in this block do not use `torch.distributed` for the life of the process, and are
    not marked for the compiler. After the block, other code can use both as usual. Modules that are
    already loaded are not affected. Loads torch.
    """
    import torch

    is_available = torch.distributed.is_available
    torch.distributed.is_available = _no
    try:
        with _without_compiler(torch.__path__):
            yield
    finally:
        torch.distributed.is_available = is_available


def _no() -> bool:
    return False


@contextmanager
def _without_compiler(path: Sequence[str]) -> Iterator[None]:
    """Put a stand-in in place of the compiler in this block; do nothing if it is loaded already.

    Args:
        path: search path of torch's modules.
    """
    spec = PathFinder.find_spec(_COMPILER, path)
    if _COMPILER in sys.modules or spec is None:
        yield
        return
    stand_in = _StandIn(spec)
    sys.modules[_COMPILER] = stand_in
    with suppress(ImportError):
        importlib.import_module(_INDEPENDENT)
    finder = _Finder(stand_in)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        if sys.modules[_COMPILER] is stand_in:
            del sys.modules[_COMPILER]


class _StandIn(ModuleType):
    """Module in place of the compiler until an attribute is used that it does not have."""

    def __init__(self, spec: ModuleSpec) -> None:
        super().__init__(spec.name)
        self.__spec__ = spec
        self.__path__ = list(spec.submodule_search_locations or ())

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in _MARKS and sys.modules.get(_COMPILER) is self:
            return _unmarked
        return getattr(self.load(), name)

    def load(self) -> ModuleType:
        """Return the compiler; import it in place of this module if it is not loaded."""
        if sys.modules.get(_COMPILER) is self:
            del sys.modules[_COMPILER]
        return importlib.import_module(_COMPILER)


def _unmarked(function: Any = None, *_args: Any, **_options: Any) -> Any:
    """Return the function, or a decorator that returns it."""
    return _unmarked if function is None else function


class _Finder(MetaPathFinder):
    """Loads the compiler before any of its modules is imported, as Python would do."""

    def __init__(self, stand_in: _StandIn) -> None:
        self._stand_in = stand_in

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        is_module = name.startswith(f"{_COMPILER}.")
        if not is_module or sys.modules.get(_COMPILER) is not self._stand_in:
            return None
        self._stand_in.load()
        loaded = sys.modules.get(name)
        return None if loaded is None else ModuleSpec(name, _Loaded(loaded))


class _Loaded(Loader):
    """Returns a module that is already loaded."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module
        self._spec = module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # the import system has replaced it
