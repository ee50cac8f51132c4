"""Change of a weight that is rounded before it is added to the weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from fidelora.adapters.deltas import Delta, Module


@dataclass(frozen=True, eq=False)
class RoundedDelta(Delta):
    """Another delta whose change is rounded to a dtype, as PEFT does when it merges a LoRA.

    Attributes:
        inner: the other delta.
        dtype: dtype of the change, that of the base model.
    """

    inner: Delta
    dtype: torch.dtype

    @classmethod
    def of(cls, inner: Delta, dtype: torch.dtype) -> RoundedDelta:
        """Return `inner` with its change rounded to `dtype`."""
        return cls(inner.scale, inner, dtype)

    def shape_for(self, weight_shape: torch.Size) -> tuple[int, ...]:
        return self.inner.shape_for(weight_shape)

    def change(self, weight: Tensor, multiplier: float) -> Tensor:
        return self._rounded(self.inner.change(weight, multiplier))

    def can_change_rows(self, rows: int, device: torch.device) -> bool:
        return self.inner.can_change_rows(rows, device)

    def change_rows(self, rows: slice, multiplier: float, device: torch.device) -> Tensor:
        return self._rounded(self.inner.change_rows(rows, multiplier, device))

    def changes_output(self, module: Module) -> bool:
        return self.inner.changes_output(module)

    def live_output(
        self,
        module: Module,
        x: Tensor,
        out: Tensor,
        multiplier: float,
        weight: Callable[[], Tensor],
    ) -> Tensor:
        return self.inner.live_output(module, x, out, multiplier, weight)

    def live_weight(self, weight: Tensor, multiplier: float) -> Tensor:
        return self.inner.live_weight(weight, multiplier)

    def tensors(self) -> tuple[Tensor, ...]:
        return self.inner.tensors()

    def to(self, device: torch.device) -> Self:
        return replace(self, inner=self.inner.to(device))

    def _rounded(self, change: Tensor) -> Tensor:
        return change.to(self.dtype).to(torch.float32)
