"""What one adapter does to one weight, in the trainer's own order of operations.

The order matters: floating-point sums and products are not associative, and the images are compared to the bit. Two paths
exist in the trainer, and each kind of delta has both:

* merged: `change` is added to the weight itself, in float32, before the image is made (`merge.py`);
* live: the LoRA runs beside the module (`beside`), or the changed weight is made anew at each call (`live_weight`).

All tensors of a delta are float32 on the CPU, whatever the file stores: the trainer's own are float32 while it samples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cache
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

Module = nn.Linear | nn.Conv2d


@dataclass(frozen=True, eq=False)
class Delta(ABC):
    """The change that an adapter makes to one weight.

    Attributes:
        scale: alpha / rank; what the delta is multiplied with beside the user's multiplier.
    """

    scale: float

    @abstractmethod
    def shape_for(self, weight_shape: torch.Size) -> tuple[int, ...]:
        """The shape of the weight that this delta can change; equal to `weight_shape` if it fits that one."""

    @abstractmethod
    def change(self, weight_shape: torch.Size, multiplier: float, device: torch.device) -> Tensor:
        """What merging adds to a weight of this shape: a new float32 tensor on `device`, `scale` and `multiplier` applied."""

    def can_change_rows(self, rows: int, device: torch.device) -> bool:
        """Whether `change_rows` of so many rows at a time has the bits of `change`."""
        return False

    def change_rows(self, rows: slice, multiplier: float, device: torch.device) -> Tensor:
        """These rows of `change`."""
        raise AssertionError("ask `can_change_rows` first")

    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors that the delta keeps."""

    @abstractmethod
    def to(self, device: torch.device) -> Self:
        """The same delta with its tensors on `device`."""


@dataclass(frozen=True, eq=False)
class LoraDelta(Delta):
    """`up @ down`. Linear: down [rank, in], up [out, rank]; conv: down [rank, in, kh, kw], up [out, rank, 1, 1]."""

    down: Tensor
    up: Tensor

    def shape_for(self, weight_shape: torch.Size) -> tuple[int, ...]:
        return (self.up.shape[0], *self.down.shape[1:])

    def change(self, weight_shape: torch.Size, multiplier: float, device: torch.device) -> Tensor:
        up, down = self.up.to(device), self.down.to(device)
        # As the trainer does it: whole matrices (a part of a product may be summed in another order), or a convolution.
        is_matrix = down.shape[2:].numel() == 1
        same = is_matrix or self.can_change_rows(len(up), device)
        return self._times(_matrix_product(up, down) if same else _convolved(up, down), multiplier)

    def can_change_rows(self, rows: int, device: torch.device) -> bool:
        return device.type == "cpu" and _rows_give_the_same(
            self.up.shape, self.down.shape, rows, torch.get_num_threads()
        )

    def change_rows(self, rows: slice, multiplier: float, device: torch.device) -> Tensor:
        return self._times(
            _matrix_product(self.up[rows].to(device), self.down.to(device)), multiplier
        )

    def _times(self, product: Tensor, multiplier: float) -> Tensor:
        """The trainer's order: multiplier first, then scale. Where one of them is 1 it changes nothing, and is left out."""
        for factor in (multiplier, self.scale):
            if factor != 1:
                product.mul_(factor)
        return product

    def beside(self, module: Module, x: Tensor, multiplier: float) -> Tensor:
        """What runs beside `module`: `up(down(x)) * scale * multiplier`, in float32.

        `x` is the module's own input, on the delta's device.
        """
        up, down = self.up, self.down
        x = x.to(down.dtype)
        if isinstance(module, nn.Conv2d):
            hidden = functional.conv2d(x, down, stride=module.stride, padding=module.padding)
            result = functional.conv2d(hidden, up)
        else:
            result = functional.linear(functional.linear(x, down), up)
        return result * self.scale * multiplier

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.down, self.up)

    def to(self, device: torch.device) -> Self:
        return replace(self, down=self.down.to(device), up=self.up.to(device))


@dataclass(frozen=True, eq=False)
class DoraDelta(LoraDelta):
    """`up @ down` and a length for each row of the changed weight: `magnitude` [out]. Linear modules only.

    The trainer runs it beside the module always, even where all samples share one multiplier: `up(down(x)) * scale * m`, as of any
    LoRA, and `stretched`. The scale has no part in the latter (`toolkit/models/DoRA.py` of AI Toolkit 0.12).
    """

    magnitude: Tensor

    def stretched(self, weight: Tensor, x: Tensor, multiplier: float) -> Tensor:
        """`(magnitude / |V| - 1) * V x` with V = W + m * up @ down and |V| the length of each row; in float32, without the bias."""
        changed = weight.to(self.up.dtype) + (self.up @ self.down) * multiplier
        stretch = (self.magnitude / torch.linalg.norm(changed, dim=1) - 1).view(1, -1)
        result: Tensor = stretch * functional.linear(x.to(changed.dtype), changed)
        return result

    def change_of(self, weight: Tensor, multiplier: float) -> Tensor:
        """The change of the float32 `weight` that does the same as running beside it; for `fast`, as the trainer never merges."""
        product = (self.up.to(weight.device) @ self.down.to(weight.device)) * multiplier
        changed = weight + product
        stretch = (
            self.magnitude.to(weight.device) / torch.linalg.norm(changed, dim=1) - 1
        ).unsqueeze(1)
        change: Tensor = product * self.scale + changed * stretch
        return change

    def can_change_rows(self, rows: int, device: torch.device) -> bool:
        return False

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.down, self.up, self.magnitude)

    def to(self, device: torch.device) -> Self:
        return replace(
            self,
            down=self.down.to(device),
            up=self.up.to(device),
            magnitude=self.magnitude.to(device),
        )


class WeightDelta(Delta):
    """A delta that exists only as a whole weight, so that its live path makes that weight anew at each call."""

    @abstractmethod
    def full(self, weight_shape: torch.Size, device: torch.device) -> Tensor:
        """The whole delta times `scale`, float32, in the weight's shape."""

    def change(self, weight_shape: torch.Size, multiplier: float, device: torch.device) -> Tensor:
        # The trainer's order: scale first (in `full`), then the multiplier.
        return self.full(weight_shape, device).mul_(multiplier)

    def live_weight(self, weight: Tensor, multiplier: float) -> Tensor:
        """`weight` with the delta added in the dtype of the weight, where the merged path does it in float32."""
        return weight + self.full(weight.shape, weight.device).to(weight.dtype) * multiplier


@dataclass(frozen=True, eq=False)
class LokrDelta(WeightDelta):
    """A Kronecker product, `kron(w1, w2)`, each factor stored whole or as a product of two.

    `w1` [a, b] or (w1_a [a, rank], w1_b [rank, b]); `w2` [c, d] or [c, d, kh, kw] or (w2_a [c, rank], w2_b [rank, d * kh * kw]).
    """

    w1: tuple[Tensor, ...]
    w2: tuple[Tensor, ...]

    def shape_for(self, weight_shape: torch.Size) -> tuple[int, ...]:
        w1, w2 = _product_shape(self.w1), _product_shape(self.w2)
        if len(w2) == 4:
            return (w1[0] * w2[0], w1[1] * w2[1], *w2[2:])
        return _unflatten((w1[0] * w2[0], w1[1] * w2[1]), weight_shape)

    def full(self, weight_shape: torch.Size, device: torch.device) -> Tensor:
        w1, w2 = _product(self.w1, device), _product(self.w2, device)
        if w2.dim() == 4:
            w1 = w1.unsqueeze(2).unsqueeze(2)
        return (torch.kron(w1, w2.contiguous()) * self.scale).reshape(weight_shape)

    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.w1, *self.w2)

    def to(self, device: torch.device) -> Self:
        return replace(
            self, w1=tuple(w.to(device) for w in self.w1), w2=tuple(w.to(device) for w in self.w2)
        )


@dataclass(frozen=True, eq=False)
class LohaDelta(WeightDelta):
    """A Hadamard product, `(w1_a @ w1_b) * (w2_a @ w2_b)`; the trainer writes none, so its order here is LyCORIS' own."""

    w1: tuple[Tensor, ...]
    w2: tuple[Tensor, ...]

    def shape_for(self, weight_shape: torch.Size) -> tuple[int, ...]:
        w1, w2 = _product_shape(self.w1), _product_shape(self.w2)
        return _unflatten(w1, weight_shape) if w1 == w2 else w1

    def full(self, weight_shape: torch.Size, device: torch.device) -> Tensor:
        return (_product(self.w1, device) * _product(self.w2, device) * self.scale).reshape(
            weight_shape
        )

    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.w1, *self.w2)

    def to(self, device: torch.device) -> Self:
        return replace(
            self, w1=tuple(w.to(device) for w in self.w1), w2=tuple(w.to(device) for w in self.w2)
        )


def _convolved(up: Tensor, down: Tensor) -> Tensor:
    """The trainer's product of convolutions larger than a pixel: [out, in, kh, kw], with strides of its own."""
    return functional.conv2d(down.permute(1, 0, 2, 3), up).permute(1, 0, 2, 3)


def _matrix_product(up: Tensor, down: Tensor) -> Tensor:
    """`up @ down` over all but the first dimension of `down`, in the shape of a weight."""
    return (up.flatten(1) @ down.flatten(1)).view(len(up), *down.shape[1:])


@cache
def _rows_give_the_same(
    up_shape: torch.Size, down_shape: torch.Size, rows: int, threads: int
) -> bool:
    """Whether products of matrices, `rows` rows at a time, have the bits of the trainer's product, on this processor and for these
    shapes.

    It is the same sum, of as many terms as the rank. A part of the result stays in the cache until it is added to the weight, and
    even as a whole it lies in memory like the weight, as a convolution's does not. But the order of the sum is the library's to
    choose, so it is tried, once, before it is trusted.

    Args:
        threads: how many there are; the order may depend on it, so the answer is for this number.
    """
    generator = torch.Generator().manual_seed(threads)
    up, down = (torch.randn(shape, generator=generator) for shape in (up_shape, down_shape))
    whole = _matrix_product(up, down) if down_shape[2:].numel() == 1 else _convolved(up, down)
    parts = zip(torch.split(up, rows), torch.split(whole, rows), strict=True)
    return all(torch.equal(_matrix_product(part, down), expected) for part, expected in parts)


def _product(factors: tuple[Tensor, ...], device: torch.device) -> Tensor:
    whole, *rest = (factor.to(device) for factor in factors)
    return whole @ rest[0] if rest else whole


def _product_shape(factors: tuple[Tensor, ...]) -> tuple[int, ...]:
    return (
        tuple(factors[0].shape) if len(factors) == 1 else (factors[0].shape[0], factors[1].shape[1])
    )


def _unflatten(matrix_shape: tuple[int, ...], weight_shape: torch.Size) -> tuple[int, ...]:
    """The weight's shape if a matrix [out, in * kh * kw] holds as many numbers for each output, else the matrix's own."""
    fits = matrix_shape[0] == weight_shape[0] and matrix_shape[1] == weight_shape[1:].numel()
    return tuple(weight_shape) if fits else matrix_shape
