"""Memory settings of processes that only make images: freed memory is kept for reuse."""

from __future__ import annotations

import gc
import platform
import subprocess
import sys

import pytest

COUNT_FAULTS = """
import resource
from fidelora.accel.allocator import keep_freed_memory
if {keep}:
    assert keep_freed_memory()
import torch
for _ in range(3):
    torch.ones(64, 2**20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(16, 2**20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library of GNU")
def test_freed_memory_is_reused_without_page_faults():
    """Count page faults for ten tensors of 64 MiB (16,384 pages each).

    The first tensor may have new pages.
    """
    faults = {
        keep: int(
            subprocess.run(
                [sys.executable, "-c", COUNT_FAULTS.format(keep=keep)],
                capture_output=True,
                check=True,
                text=True,
            ).stdout
        )
        for keep in (True, False)
    }
    assert faults[True] < 1.5 * 16384
    assert faults[False] > 9 * 16384


def test_imported_objects_are_excluded_from_garbage_collection():
    from fidelora.accel.allocator import fast_imports

    frozen = gc.get_freeze_count()
    try:
        with fast_imports():
            assert not gc.isenabled()
        assert gc.isenabled()
        assert gc.get_freeze_count() > frozen
    finally:
        gc.unfreeze()
