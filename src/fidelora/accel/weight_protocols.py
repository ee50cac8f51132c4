"""Protocols for merging adapters into modules that store their weight in a special form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

GetWeight = Callable[[torch.dtype], Tensor]
"""Function that returns a weight in the requested dtype, with adapters merged in. The tensor is a
reused buffer or mapped from a file; the caller must not change it."""


@runtime_checkable
class AcceptsWeight(Protocol):
    """A module whose `weight` has a shape and a dtype but no data."""

    def release_weight(self) -> None:
        """Drop the weight, to free memory for the weights that are set next."""

    def set_weight(self, get_weight: GetWeight) -> None:
        """Use the weight that `get_weight` returns; `get_weight` may be called again later."""


@runtime_checkable
class ProvidesWeight(Protocol):
    """A module whose `weight` has no data, but which can return the weight as a plain tensor."""

    def plain_weight(self) -> Tensor:
        """Return the weight in use, which must not be changed."""
