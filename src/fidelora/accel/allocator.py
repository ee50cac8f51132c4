"""The memory of a process that does nothing but make images."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# From glibc's malloc.h; see mallopt(3).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_NEVER, _AT_ONCE = 2**31 - 1, 64 * 2**20


def keep_freed_memory() -> bool:
    """Have the C library keep what is freed, for the next tensor, in place of giving it back to the system.

    By default every large tensor is a mapping of its own: new, so that the system has to clear each of its pages, and given back
    when the tensor is gone. A step of a model makes hundreds of them. The numbers in them are the same either way.

    A process keeps the most memory that it ever used, so this is for processes that make images and nothing else, before they
    load a model.

    Returns:
        whether it took effect; only the C library of GNU has it.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    settings = ((_M_MMAP_THRESHOLD, _NEVER), (_M_TRIM_THRESHOLD, _NEVER), (_M_TOP_PAD, _AT_ONCE))
    return all(library.mallopt(option, value) == 1 for option, value in settings)


@contextmanager
def importing_for_good() -> Iterator[None]:
    """Import large libraries in this block a fifth faster (0.8 of 4.3 s on the machine of docs/performance.md).

    Importing makes objects by the hundred thousand, and Python looks again and again whether some of them are garbage. Nearly all
    stay as long as the process, so nothing looks at them now, nor later.
    """
    collected = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collected:
            gc.enable()
