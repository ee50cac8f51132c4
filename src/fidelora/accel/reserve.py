"""Memory that a thread gets from the operating system while the main thread imports libraries.

The operating system clears new memory when it is first written, and on a virtual machine the host
has to provide it first. For the weights of a base model, this takes seconds. Does not import torch.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_CHUNK_BYTES = 64 * 2**20  # small enough that the thread stops in time
MAX_BYTES = 6 * 2**30
"""Largest size to reserve: about as much as a thread clears while the libraries are imported."""

_PAGE_BYTES = 4096
_MADV_POPULATE_WRITE = 23  # from Linux's mman-common.h, since 5.14; see madvise(2)


@contextmanager
def reserved_memory(size: int) -> Iterator[None]:
    """Get up to `size` bytes from the operating system while the block runs, and keep them.

    At the end of the block, the memory is free for the allocations of this thread. Call
    `keep_freed_memory` first; otherwise the C library returns it to the system. Use it only in the
    main thread, whose heap can grow to any size. Nothing is reserved on other systems than Linux
    with the GNU C library.
    """
    chunks = _chunks(min(size, MAX_BYTES))
    if not chunks:
        yield
        return
    stop = threading.Event()
    thread = threading.Thread(
        target=_populate, args=(chunks, stop), name="fidelora-memory", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _chunks(size: int) -> list[int]:
    """Allocate chunks in the heap without writing to them; return their addresses."""
    if not sys.platform.startswith("linux"):
        return []
    library = _library()
    if not hasattr(library, "gnu_get_libc_version"):
        return []
    addresses = [library.malloc(_CHUNK_BYTES) for _ in range(size // _CHUNK_BYTES)]
    return [address for address in addresses if address]


def _populate(addresses: list[int], stop: threading.Event) -> None:
    """Write to all pages of each chunk until `stop` is set, and free the chunks.

    Each chunk is freed as soon as it is populated, so the memory of the process never exceeds what
    it would use later. Calls of the C library release the interpreter's lock.
    """
    library = _library()
    for address in addresses:
        if not stop.is_set():
            start = -(-address // _PAGE_BYTES) * _PAGE_BYTES
            length = (address + _CHUNK_BYTES - start) // _PAGE_BYTES * _PAGE_BYTES
            if library.madvise(start, length, _MADV_POPULATE_WRITE) != 0:
                library.memset(start, 0, length)
        library.free(address)


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(None)
    library.malloc.argtypes, library.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    library.free.argtypes, library.free.restype = [ctypes.c_void_p], None
    library.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    library.memset.restype = ctypes.c_void_p
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return library
