"""Modules that keep their weight in a form of their own, for the code that merges adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

WriteWeight = Callable[[torch.dtype], Tensor]
"""Returns a weight in the requested dtype; it may be mapped from a file and must not be changed."""


@runtime_checkable
class AcceptsWeight(Protocol):
    """A module whose `weight` has a shape and a dtype but no numbers."""

    def release_weight(self) -> None:
        """Drop the weight, to free memory for those written next."""

    def set_weight(self, write: WriteWeight) -> None:
        """Use the weight that `write` returns, now and possibly again later."""


@runtime_checkable
class ProvidesWeight(Protocol):
    """A module whose `weight` has no numbers, and that can return them."""

    def plain_weight(self) -> Tensor:
        """Return the weight in use, which must not be changed."""
