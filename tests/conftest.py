"""Fixtures that tests of several folders use."""

from __future__ import annotations

import os

# The suite runs in two processes, and small models are no faster with more threads than one. Set before torch is loaded, and for
# the processes that tests start: pictures that are compared have to be made with the same number of threads.
os.environ["OMP_NUM_THREADS"] = "1"

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def golden_threads() -> Iterator[None]:
    """As many threads as the goldens were made with: sums depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
