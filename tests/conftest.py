"""Environment of all tests, and fixtures used in several folders."""

from __future__ import annotations

import os
import tempfile

# The suite runs in two processes, and small models are not faster with several threads. Set before
# torch is loaded, and for child processes: compared images need the same number of threads.
os.environ["OMP_NUM_THREADS"] = "1"
# Hashes and locations of base models must not come from, or be written to, the user's cache folder.
_CACHE = tempfile.TemporaryDirectory(prefix="fidelora-tests-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def golden_threads() -> Iterator[None]:
    """Use as many threads as the goldens were made with: the order of sums depends on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
