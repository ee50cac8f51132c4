"""Deltas in the formats of LyCORIS and PEFT that AI Toolkit does not write.

The trainer has no order of operations for them, so each class computes its format's own formula in
float32. Sources: LyCORIS 3 (`lycoris/modules`, `get_merged_weight`) and kohya's `networks/oft.py`;
for the effect of a multiplier on a DoRA, which differs between programs, see `DecomposedDelta`.

The live path changes the weight at each call, in float32, and rounds it to its dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from fidelora.adapters.deltas import Delta, Module, consecutive_rows
from fidelora.adapters.products import fitting_shape


@dataclass(frozen=True, eq=False)
class FormulaDelta(Delta):
    """Base class of deltas whose live path adds `change` to the weight in float32."""

    def changes_output(self, module: Module) -> bool:
        return False

    def live_weight(self, weight: Tensor, multiplier: float) -> Tensor:
        loaded = weight.to(torch.float32)
        return (loaded + self.change(loaded, multiplier)).to(weight.dtype)


@dataclass(frozen=True, eq=False)
class FullDelta(FormulaDelta):
    """Differences of a whole weight or bias (`diff`, `diff_b`, `w_norm`, `b_norm` of LyCORIS)."""

    difference: Tensor

    def divided(self, sizes: Sequence[int]) -> tuple[Delta, ...] | None:
        return tuple(
            replace(self, difference=self.difference[rows]) for rows in consecutive_rows(sizes)
        )

    def shape_for(self, weight_shape: torch.Size) -> tuple[int, ...]:
        return fitting_shape(tuple(self.difference.shape), weight_shape)

    def change(self, weight: Tensor, multiplier: float) -> Tensor:
        return (self.difference.to(weight.device) * (self.scale * multiplier)).reshape(weight.shape)

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.difference,)

    def to(self, device: torch.device) -> Self:
        return replace(self, difference=self.difference.to(device))


@dataclass(frozen=True, eq=False)
class DecomposedDelta(FormulaDelta):
    """A DoRA of LyCORIS, kohya or PEFT: the changed weight, with its norms set to `magnitude`.

    With V = W + change of `inner`, the result is `V * magnitude / |V|`. The formats differ in the
    effect of the multiplier m:

    * `lycoris` (`dora_scale`): W + m * (V * magnitude / |V| - W), where V is computed with the
      multiplier 1, as in AUTOMATIC1111 and ComfyUI. As in LyCORIS, the machine epsilon of float32
      is added to |V|.
    * `peft` (`lora_magnitude_vector`): V is computed with the multiplier m.

    Attributes:
        inner: change of the weight without the magnitude.
        magnitude: [out] if `axis` is 0, [in] if it is 1.
        axis: dimension of the weight that the magnitudes belong to; norms are taken over the rest.
    """

    uses_weight: ClassVar[bool] = True
    inner: Delta
    magnitude: Tensor
    axis: Literal[0, 1]
    rule: Literal["lycoris", "peft"]

    def shape_for(self, weight_shape: torch.Size) -> tuple[int, ...]:
        shape = self.inner.shape_for(weight_shape)
        fits = len(shape) > 1 and shape[self.axis] == len(self.magnitude)
        return shape if fits else (0, *shape[1:])

    def fitted(self, weight_shape: torch.Size) -> Delta:
        return replace(self, inner=self.inner.fitted(weight_shape))

    def change(self, weight: Tensor, multiplier: float) -> Tensor:
        is_peft = self.rule == "peft"
        changed = weight + self.inner.change(weight, multiplier if is_peft else 1.0)
        rest = [dim for dim in range(weight.dim()) if dim != self.axis]
        norm = torch.linalg.vector_norm(changed, dim=rest, keepdim=True)
        if not is_peft:
            norm = norm + torch.finfo(torch.float32).eps
        magnitude = self.magnitude.to(weight.device).view(norm.shape)
        difference: Tensor = changed * (magnitude / norm) - weight
        return difference if is_peft else difference * multiplier

    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.inner.tensors(), self.magnitude)

    def to(self, device: torch.device) -> Self:
        return replace(self, inner=self.inner.to(device), magnitude=self.magnitude.to(device))


@dataclass(frozen=True, eq=False)
class GloraDelta(FormulaDelta):
    """GLoRA: `W @ a1 @ a2 + b1 @ b2`, where the products with W act on its input dimension.

    Attributes:
        a1, a2: [in, rank] and [rank, in].
        b1, b2: [out, rank] and [rank, in * kh * kw].
    """

    uses_weight: ClassVar[bool] = True
    a1: Tensor
    a2: Tensor
    b1: Tensor
    b2: Tensor

    def shape_for(self, weight_shape: torch.Size) -> tuple[int, ...]:
        shape = fitting_shape((self.b1.shape[0], self.b2.shape[1]), weight_shape)
        return shape if len(shape) > 1 and shape[1] == self.a2.shape[1] else (0, *shape[1:])

    def change(self, weight: Tensor, multiplier: float) -> Tensor:
        a1, a2, b1, b2 = (factor.to(weight.device) for factor in self.tensors())
        first = torch.einsum("oi...,ij->oj...", weight, a1)
        changed = torch.einsum("oj...,jk->ok...", first, a2)
        return (changed + (b1 @ b2).view(weight.shape)) * (self.scale * multiplier)

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.a1, self.a2, self.b1, self.b2)

    def to(self, device: torch.device) -> Self:
        return replace(
            self,
            a1=self.a1.to(device),
            a2=self.a2.to(device),
            b1=self.b1.to(device),
            b2=self.b2.to(device),
        )


@dataclass(frozen=True, eq=False)
class Ia3Delta(FormulaDelta):
    """(IA)^3 of LyCORIS; the change is each row or column of the weight times its factor.

    Attributes:
        factors: [out] if `axis` is 0, [in] if it is 1.
        axis: dimension of the weight that is multiplied.
    """

    uses_weight: ClassVar[bool] = True
    factors: Tensor
    axis: Literal[0, 1]

    def shape_for(self, weight_shape: torch.Size) -> tuple[int, ...]:
        shape = list(weight_shape)
        if len(shape) > 1:
            shape[self.axis] = len(self.factors)
        return tuple(shape)

    def change(self, weight: Tensor, multiplier: float) -> Tensor:
        shape = [1] * weight.dim()
        shape[self.axis] = -1
        return weight * (self.factors.to(weight.device).view(shape) * multiplier)

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.factors,)

    def to(self, device: torch.device) -> Self:
        return replace(self, factors=self.factors.to(device))


@dataclass(frozen=True, eq=False)
class OftDelta(FormulaDelta):
    """OFT and BOFT of LyCORIS and kohya: rotations of the weight's rows, in blocks.

    A block of parameters X gives the rotation R = (I + Q)(I - Q)^-1 with Q = X - X^T. The norm of
    all Q together is limited to `constraint * out`. With the multiplier m, each rotation is
    m * R + (1 - m) * I.

    Attributes:
        blocks: OFT [blocks, size, size]; BOFT [factors, blocks, size, size], applied in order.
        rescale: [out], factors of the rows after the rotation, which do not depend on the
            multiplier; None if the file has none.
        constraint: alpha of the file; None if the norm is not limited.
    """

    uses_weight: ClassVar[bool] = True
    blocks: Tensor
    rescale: Tensor | None
    constraint: float | None

    def shape_for(self, weight_shape: torch.Size) -> tuple[int, ...]:
        rows = self.blocks.shape[-3] * self.blocks.shape[-1]
        fits = self.rescale is None or len(self.rescale) == rows
        return (rows if fits else 0, *weight_shape[1:])

    def change(self, weight: Tensor, multiplier: float) -> Tensor:
        rotations = self._rotations(weight.device, multiplier)
        if rotations.dim() == 3:
            rotated = self._rotated(rotations, weight)
        else:
            rotated = self._butterfly(rotations, weight)
        if self.rescale is not None:
            rotated = rotated * self.rescale.to(weight.device).view(-1, *[1] * (weight.dim() - 1))
        return rotated - weight

    def _rotations(self, device: torch.device, multiplier: float) -> Tensor:
        """Return the rotation of each block, weighted by the multiplier; shaped like `blocks`."""
        blocks = self.blocks.to(device)
        skew = blocks - blocks.transpose(-1, -2)
        if self.constraint is not None:
            limit = self.constraint * blocks.shape[-3] * blocks.shape[-1]
            norm = torch.linalg.vector_norm(skew) + 1e-8
            if norm > limit:
                skew = skew * (limit / norm)
        identity = torch.eye(blocks.shape[-1], device=device)
        rotation = (identity + skew) @ torch.linalg.inv(identity - skew)
        weighted: Tensor = identity + (rotation - identity) * multiplier
        return weighted

    @staticmethod
    def _rotated(rotations: Tensor, weight: Tensor) -> Tensor:
        # As in LyCORIS and kohya, the transposed rotation is applied.
        rows = weight.view(*rotations.shape[:2], *weight.shape[1:])
        return torch.einsum("knm,kn...->km...", rotations, rows).flatten(0, 1)

    @staticmethod
    def _butterfly(rotations: Tensor, weight: Tensor) -> Tensor:
        size, rest = rotations.shape[-1], weight.shape[1:]
        for number, factor in enumerate(rotations):
            stride = 2**number * (size // 2)
            # Rows that are `stride` apart belong to the same block.
            rows = weight.reshape(-1, 2, stride, *rest).transpose(1, 2).reshape(-1, size, *rest)
            rows = torch.einsum("bij,bj...->bi...", factor, rows)
            weight = rows.reshape(-1, stride, 2, *rest).transpose(1, 2).flatten(0, 2)
        return weight

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.blocks,) if self.rescale is None else (self.blocks, self.rescale)

    def to(self, device: torch.device) -> Self:
        rescale = None if self.rescale is None else self.rescale.to(device)
        return replace(self, blocks=self.blocks.to(device), rescale=rescale)


def is_butterfly(shape: tuple[int, ...]) -> bool:
    """Return True if [factors, blocks, size, size] are valid factors of a BOFT."""
    factors, blocks, size, _ = shape
    return size % 2 == 0 and (blocks * size) % (2**factors * (size // 2)) == 0
