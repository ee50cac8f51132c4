"""Fixtures that tests of several folders use."""

from __future__ import annotations

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
