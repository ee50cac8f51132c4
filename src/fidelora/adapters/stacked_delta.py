"""Change of a weight whose rows other code splits over several modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from fidelora.adapters.deltas import Delta, Module


@dataclass(frozen=True, eq=False)
class StackedDelta(Delta):
    """A change of a linear weight that consists of separate changes of parts of its rows.

    Example: `to_q`, `to_k` and `to_v` of an adapter, for a base model with one matrix `qkv`.

    Attributes:
        shares: change of each share, from the first row; None for a share that stays the same.
        sizes: relative size of each share: `len(weight) * size / sum(sizes)` rows.
    """

    shares: tuple[Delta | None, ...]
    sizes: tuple[int, ...]
    uses_weight: ClassVar[bool] = True  # for shares that need it; the others read only its shape

    def shape_for(self, weight_shape: torch.Size) -> tuple[int, ...]:
        fits = all(
            one is None or one.shape_for(share) == tuple(share)
            for one, share in zip(self.shares, shapes_of(weight_shape, self.sizes), strict=True)
        )
        return tuple(weight_shape) if fits else (0, *weight_shape[1:])

    def fitted(self, weight_shape: torch.Size) -> Delta:
        shapes = shapes_of(weight_shape, self.sizes)
        pairs = zip(self.shares, shapes, strict=True)
        fitted = tuple(None if one is None else one.fitted(shape) for one, shape in pairs)
        return replace(self, shares=fitted)

    def change(self, weight: Tensor, multiplier: float) -> Tensor:
        return torch.cat(
            [
                torch.zeros_like(rows) if one is None else one.change(rows, multiplier)
                for one, rows in zip(self.shares, self._split(weight), strict=True)
            ]
        )

    def changes_output(self, module: Module) -> bool:
        return all(one is None or one.changes_output(module) for one in self.shares)

    def live_output(
        self,
        module: Module,
        x: Tensor,
        out: Tensor,
        multiplier: float,
        weight: Callable[[], Tensor],
    ) -> Tensor:
        def changed(index: int, columns: Tensor) -> Tensor:
            one = self.shares[index]
            if one is None:
                return columns
            return one.live_output(
                module, x, columns, multiplier, lambda: self._split(weight())[index]
            )

        outputs = torch.split(out, _rows(out.shape[-1], self.sizes), dim=-1)
        return torch.cat([changed(*pair) for pair in enumerate(outputs)], dim=-1)

    def live_weight(self, weight: Tensor, multiplier: float) -> Tensor:
        return weight + self.change(weight.float(), multiplier).to(weight.dtype)

    def with_alpha(self, alpha: float) -> Self:
        return self._with(lambda one: one.with_alpha(alpha))

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(tensor for one in self.shares if one is not None for tensor in one.tensors())

    def to(self, device: torch.device) -> Self:
        return self._with(lambda one: one.to(device))

    def _with(self, change: Callable[[Delta], Delta]) -> Self:
        return replace(
            self, shares=tuple(None if one is None else change(one) for one in self.shares)
        )

    def _split(self, weight: Tensor) -> tuple[Tensor, ...]:
        return torch.split(weight, _rows(len(weight), self.sizes))


def shapes_of(weight_shape: torch.Size, sizes: Sequence[int]) -> list[torch.Size]:
    """Return the shape of each share of a weight's rows; `sizes` as in `StackedDelta`."""
    return [torch.Size((rows, *weight_shape[1:])) for rows in _rows(weight_shape[0], sizes)]


def _rows(count: int, sizes: Sequence[int]) -> list[int]:
    unit = count // sum(sizes)
    return [unit * size for size in sizes]
