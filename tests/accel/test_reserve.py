"""Memory that a thread reserves during imports."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

COUNT_FAULTS = """
import resource, threading
from fidelora.accel.allocator import keep_freed_memory
from fidelora.accel.reserve import reserved_memory
assert keep_freed_memory()
import torch
torch.ones(16, 2**20)
with reserved_memory({size}):
    for thread in threading.enumerate():
        if thread.name == "fidelora-memory":
            thread.join()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
tensors = [torch.ones(16, 2**20) for _ in range(16)]
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 16 * 16384  # of 16 tensors of 64 MiB


def faults(size: int) -> int:
    """Return the page faults of allocating 1 GiB after `size` bytes were reserved."""
    command = [sys.executable, "-c", COUNT_FAULTS.format(size=size)]
    return int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library of GNU")
def test_tensors_use_reserved_memory_without_page_faults():
    assert faults(18 * 64 * 2**20) < 0.2 * PAGES
    assert faults(0) > 0.8 * PAGES


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library of GNU")
def test_reservation_ends_with_its_block():
    script = """
import threading
from fidelora.accel.reserve import MAX_BYTES, reserved_memory
with reserved_memory(MAX_BYTES):
    pass
print(threading.active_count())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert done.stdout == b"1\n"
