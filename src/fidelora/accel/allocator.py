"""Memory settings for processes that only make images."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# From glibc's malloc.h; see mallopt(3).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_MAX_BYTES = 2**31 - 1  # largest value; smaller tensors get no mappings of their own
_NEVER_TRIM = -1  # the largest threshold would still return freed memory above 2 GB
_HEAP_GROWTH_BYTES = 64 * 2**20  # extra memory to request each time the heap grows


def keep_freed_memory() -> bool:
    """Make the C library keep freed memory for the next tensor instead of returning it.

    By default, every large tensor is a new mapping: the kernel clears its pages, and reclaims them
    when the tensor is freed. One denoising step allocates hundreds of tensors. This setting does
    not change images.

    The memory of the process never shrinks, so call this only in processes that do nothing but make
    images, before they load a model.

    Returns:
        True if the settings took effect; only the GNU C library supports them.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    settings = (
        (_M_MMAP_THRESHOLD, _MAX_BYTES),
        (_M_TRIM_THRESHOLD, _NEVER_TRIM),
        (_M_TOP_PAD, _HEAP_GROWTH_BYTES),
    )
    return all(library.mallopt(option, value) == 1 for option, value in settings)


def return_freed_memory() -> None:
    """Make the C library return freed memory to the system; takes milliseconds.

    Reading a large file leaves holes in the heap, which glibc keeps otherwise.
    """
    library = ctypes.CDLL(None)
    if sys.platform.startswith("linux") and hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


@contextmanager
def fast_imports() -> Iterator[None]:
    """Speed up imports of large libraries in this block by a fifth.

    The imports of an engine took 3.5 s instead of 4.3 s. Imports create several hundred thousand
    objects, which Python's garbage collector scans again and again. Nearly all of these objects
    live as long as the process, so they are permanently excluded from collection.
    """
    collected = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collected:
            gc.enable()
