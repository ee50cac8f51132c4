"""Changes that adapters make to individual weights, in the trainer's order of operations.

The order matters: floating-point sums and products are not associative, and images must match bit
for bit. The trainer has two paths, and each kind of delta supports both:

* merged (`merge.py`): `change` is added to the weight in float32 before the image is made;
* live (`live.py`): at each call, the delta changes the module's output (`live_output`) if
  `changes_output` is True, else its weight (`live_weight`).

All tensors of a delta are read as float32 to the CPU, whatever the dtype of the file, because the
trainer samples with float32 adapters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from fidelora.adapters.products import (
    convolved,
    fitting_shape,
    matrix_product,
    product,
    product_shape,
    row_products_match,
)

Module = nn.Linear | nn.Conv2d


@dataclass(frozen=True, eq=False)
class Delta(ABC):
    """Change of one weight.

    Attributes:
        scale: alpha / rank, applied in addition to the user's multiplier.
        is_dora: True for a DoRA of AI Toolkit. The trainer never merges one, and its file has no
            alpha.
        uses_weight: True if `change` needs the weight with the adapters before this one merged in.
            If False, it gets the weight without the adapters of the same group (`merge.Group`).
    """

    scale: float
    is_dora: ClassVar[bool] = False
    uses_weight: ClassVar[bool] = False

    @abstractmethod
    def shape_for(self, weight_shape: torch.Size) -> tuple[int, ...]:
        """Return `weight_shape` if the delta fits it, else the shape that the delta requires.

        A dimension is 0 if the tensors of the delta contradict each other, so that no weight fits.
        """

    def fitted(self, weight_shape: torch.Size) -> Delta:
        """Return the delta with factors that have as many dimensions as the weight.

        Call it only if `shape_for` returns `weight_shape`.
        """
        return self

    @abstractmethod
    def change(self, weight: Tensor, multiplier: float) -> Tensor:
        """Return the tensor that merging adds to `weight`, with `scale` and `multiplier` applied.

        Args:
            weight: float32 [out, in] or [out, in, kh, kw]; without the adapters of the same group,
                or including those before this one if `uses_weight` is True.

        Returns:
            a new float32 tensor in the shape and on the device of `weight`.
        """

    def divided(self, sizes: Sequence[int]) -> tuple[Delta, ...] | None:
        """Divide the delta of a fused module among the modules that share its output rows.

        Args:
            sizes: number of rows of each module, in order; together, all rows of the fused weight.

        Returns:
            one delta per module, in order; None if this kind of delta cannot be divided.
        """
        return None

    def can_change_rows(self, rows: int, device: torch.device) -> bool:
        """Return True if `change_rows` gives bit-identical results to `change`.

        Args:
            rows: number of rows per call of `change_rows`.
        """
        return False

    def change_rows(self, rows: slice, multiplier: float, device: torch.device) -> Tensor:
        """Return these rows of `change`. Call it only if `can_change_rows` returns True."""
        raise AssertionError("check `can_change_rows` first")

    @abstractmethod
    def changes_output(self, module: Module) -> bool:
        """Return True if the live path changes the output of this module, False if its weight."""

    def live_output(
        self,
        module: Module,
        x: Tensor,
        out: Tensor,
        multiplier: float,
        weight: Callable[[], Tensor],
    ) -> Tensor:
        """Return `out` plus the effect of this delta. Call it only if `changes_output` is True.

        Args:
            x: input of `module`, on the device of the delta.
            out: output of `module`, including the effects of earlier deltas.
            weight: returns the current weight of `module`.
        """
        raise AssertionError("check `changes_output` first")

    def live_weight(self, weight: Tensor, multiplier: float) -> Tensor:
        """Return `weight` plus this delta. Call it only if `changes_output` is False."""
        raise AssertionError("check `changes_output` first")

    def with_alpha(self, alpha: float) -> Self:
        """Return a copy with this alpha if this is a DoRA, else the same delta.

        Files of other kinds contain their alpha.
        """
        return self

    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """Return all tensors that the delta holds."""

    @abstractmethod
    def to(self, device: torch.device) -> Self:
        """Return the same delta with its tensors on `device`."""

    def cast(self, dtype: torch.dtype) -> Self:
        """Return the same delta with its tensors in `dtype`."""
        return replace(self, **{name: _cast(one, dtype) for name, one in vars(self).items()})


@dataclass(frozen=True, eq=False)
class LoraDelta(Delta):
    """`up @ down`.

    Linear: down [rank, in], up [out, rank]; conv: down [rank, in, kh, kw], up [out, rank, 1, 1].
    Some files store the factors of a convolution as matrices, or those of a linear module as a 1x1
    convolution. `fitted` then returns the delta with the dimensions of the module.
    """

    down: Tensor
    up: Tensor

    def changes_output(self, module: Module) -> bool:
        return True

    def divided(self, sizes: Sequence[int]) -> tuple[Delta, ...] | None:
        return tuple(replace(self, up=self.up[rows]) for rows in consecutive_rows(sizes))

    def shape_for(self, weight_shape: torch.Size) -> tuple[int, ...]:
        return fitting_shape((self.up.shape[0], *self.down.shape[1:]), weight_shape)

    def fitted(self, weight_shape: torch.Size) -> Delta:
        if self.down.dim() == len(weight_shape):
            return self
        up, down = self.up.flatten(1), self.down.reshape(-1, *weight_shape[1:])
        return replace(self, up=up[:, :, None, None] if down.dim() == 4 else up, down=down)

    def change(self, weight: Tensor, multiplier: float) -> Tensor:
        up, down = self.up.to(weight.device), self.down.to(weight.device)
        # As in the trainer, matrices are multiplied in one call: multiplying a few rows at a time
        # may sum in another order. Larger kernels are convolved, unless a matrix product was found
        # to give the same bits.
        is_matrix = down.shape[2:].numel() == 1
        if is_matrix or self.can_change_rows(len(up), weight.device):
            return self._scaled(matrix_product(up, down), multiplier)
        return self._scaled(convolved(up, down), multiplier)

    def can_change_rows(self, rows: int, device: torch.device) -> bool:
        return device.type == "cpu" and row_products_match(
            self.up.shape, self.down.shape, rows, torch.get_num_threads()
        )

    def change_rows(self, rows: slice, multiplier: float, device: torch.device) -> Tensor:
        product = matrix_product(self.up[rows].to(device), self.down.to(device))
        return self._scaled(product, multiplier)

    def _scaled(self, product: Tensor, multiplier: float) -> Tensor:
        """Multiply `product` in place by `multiplier`, then by `scale`, as the trainer does."""
        for factor in (multiplier, self.scale):
            if factor != 1:
                product.mul_(factor)
        return product

    def live_output(
        self,
        module: Module,
        x: Tensor,
        out: Tensor,
        multiplier: float,
        weight: Callable[[], Tensor],
    ) -> Tensor:
        # The trainer's order: scale and multiply in the dtype of the factors (float32, except in
        # training adapters), cast to the dtype of `out`, then add.
        return out + self.low_rank_output(module, x, multiplier).to(out.dtype)

    def low_rank_output(self, module: Module, x: Tensor, multiplier: float) -> Tensor:
        """Return `up(down(x)) * scale * multiplier`, in the output's shape and the factors' dtype.

        The factors are float32, except in training adapters.
        """
        up, down = self.up, self.down
        x = x.to(down.dtype)
        if isinstance(module, nn.Conv2d):
            hidden = functional.conv2d(x, down, stride=module.stride, padding=module.padding)
            result = functional.conv2d(hidden, up)
        else:
            # The trainer's `down` requires a gradient, even during sampling. Therefore torch copies
            # an input with other strides (that of SDXL's `proj_in`) and computes one product. For
            # a weight without gradient, it would compute one product for each image, which differs
            # in the last bits (`should_fold` in torch's aten/src/ATen/native/LinearAlgebra.cpp).
            result = functional.linear(functional.linear(x.contiguous(), down), up)
        return result * self.scale * multiplier

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.down, self.up)

    def to(self, device: torch.device) -> Self:
        return replace(self, down=self.down.to(device), up=self.up.to(device))


@dataclass(frozen=True, eq=False)
class DoraDelta(LoraDelta):
    """`up @ down`, and `magnitude` [out], the norm of each row of the changed weight.

    Only linear modules are supported. The trainer never merges a DoRA, even if all samples share
    one multiplier. It adds `up(down(x)) * scale * multiplier` to the module's output, as for any
    LoRA, and `rescaled_output`, which does not use the scale (`toolkit/models/DoRA.py` of AI
    Toolkit 0.12).
    """

    magnitude: Tensor
    is_dora: ClassVar[bool] = True

    def divided(self, sizes: Sequence[int]) -> tuple[Delta, ...] | None:
        return None

    def shape_for(self, weight_shape: torch.Size) -> tuple[int, ...]:
        return (self.up.shape[0], *self.down.shape[1:])

    def change(self, weight: Tensor, multiplier: float) -> Tensor:
        # Equal to `live_output` except for rounding. Only `fast` merges a DoRA.
        product = (self.up.to(weight.device) @ self.down.to(weight.device)) * multiplier
        changed = weight + product
        stretch = (
            self.magnitude.to(weight.device) / torch.linalg.norm(changed, dim=1) - 1
        ).unsqueeze(1)
        change: Tensor = product * self.scale + changed * stretch
        return change

    def can_change_rows(self, rows: int, device: torch.device) -> bool:
        return False

    def live_output(
        self,
        module: Module,
        x: Tensor,
        out: Tensor,
        multiplier: float,
        weight: Callable[[], Tensor],
    ) -> Tensor:
        low_rank = self.low_rank_output(module, x, multiplier).to(out.dtype)
        rescaled = self.rescaled_output(weight(), x, multiplier).to(out.dtype)
        return out + (low_rank + rescaled)

    def with_alpha(self, alpha: float) -> Self:
        return replace(self, scale=scale_of(alpha, self.down.shape[0]))

    def rescaled_output(self, weight: Tensor, x: Tensor, multiplier: float) -> Tensor:
        """Return `(magnitude / |V| - 1) * V x` in float32, without the bias.

        V is `weight + multiplier * up @ down`, and |V| is the norm of each row of V.

        Args:
            weight: current weight of the module, [out, in].
        """
        changed = weight.to(self.up.dtype) + (self.up @ self.down) * multiplier
        stretch = (self.magnitude / torch.linalg.norm(changed, dim=1) - 1).view(1, -1)
        result: Tensor = stretch * functional.linear(x.to(changed.dtype), changed)
        return result

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.down, self.up, self.magnitude)

    def to(self, device: torch.device) -> Self:
        return replace(
            self,
            down=self.down.to(device),
            up=self.up.to(device),
            magnitude=self.magnitude.to(device),
        )


@dataclass(frozen=True, eq=False)
class WeightDelta(Delta):
    """Base class of deltas whose live path adds `full` to the weight, in the dtype of the weight.

    This is the trainer's order of operations. The merged path computes the sum in float32.
    """

    def changes_output(self, module: Module) -> bool:
        return False

    def divided(self, sizes: Sequence[int]) -> tuple[Delta, ...] | None:
        total = sum(sizes)
        return tuple(RowsDelta(1.0, self, rows, total) for rows in consecutive_rows(sizes))

    @abstractmethod
    def full(self, weight_shape: torch.Size, device: torch.device) -> Tensor:
        """Return the delta times `scale`, float32, in the weight's shape."""

    def change(self, weight: Tensor, multiplier: float) -> Tensor:
        # The trainer's order: scale first (in `full`), then the multiplier.
        return self.full(weight.shape, weight.device).mul_(multiplier)

    def live_weight(self, weight: Tensor, multiplier: float) -> Tensor:
        return weight + self.full(weight.shape, weight.device).to(weight.dtype) * multiplier


@dataclass(frozen=True, eq=False)
class LokrDelta(WeightDelta):
    """A Kronecker product, `kron(w1, w2)`, each factor stored whole or as a product of two.

    `w1` [a, b] or (w1_a [a, rank], w1_b [rank, b]);
    `w2` [c, d] or [c, d, kh, kw] or (w2_a [c, rank], w2_b [rank, d * kh * kw]).

    Attributes:
        is_factorised: True to apply the factors one after the other on linear layers in the live
            path, as AI Toolkit does since 0.10.25 (`toolkit/models/lokr.py`); False to compute a
            changed weight, as it did before. The results differ by rounding errors.
    """

    w1: tuple[Tensor, ...]
    w2: tuple[Tensor, ...]
    is_factorised: bool = False

    def changes_output(self, module: Module) -> bool:
        return self.is_factorised and isinstance(module, nn.Linear)

    def live_output(
        self,
        module: Module,
        x: Tensor,
        out: Tensor,
        multiplier: float,
        weight: Callable[[], Tensor],
    ) -> Tensor:
        # The trainer's order: factors and multiplier are cast to the dtype of the output. If w1 has
        # two factors, their product is computed in float32 before the cast. If w2 has two factors,
        # they are applied one after the other.
        dtype = out.dtype
        w1 = product(self.w1, x.device).to(dtype)
        w2, *low_rank = (factor.to(x.device, dtype) for factor in self.w2)
        blocks = x.to(dtype).reshape(*x.shape[:-1], w1.shape[1], -1)  # [..., b, d]
        for factor in (*low_rank, w2):
            blocks = torch.einsum("...bd,cd->...bc", blocks, factor)
        delta = torch.einsum("...bc,ab->...ac", blocks, w1 * self.scale).flatten(-2)
        return out + delta * torch.tensor(multiplier, dtype=dtype)

    def shape_for(self, weight_shape: torch.Size) -> tuple[int, ...]:
        w1, w2 = product_shape(self.w1), product_shape(self.w2)
        return fitting_shape((w1[0] * w2[0], w1[1] * w2[1], *w2[2:]), weight_shape)

    def fitted(self, weight_shape: torch.Size) -> Delta:
        if len(weight_shape) == 2 and self.w2[0].dim() == 4:  # a matrix stored as a convolution
            return replace(self, w2=(product(self.w2, self.w2[0].device).flatten(1),))
        return self

    def full(self, weight_shape: torch.Size, device: torch.device) -> Tensor:
        w1, w2 = product(self.w1, device), product(self.w2, device)
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
class RowsDelta(WeightDelta):
    """Some rows of the delta of a fused module, whose rows belong to several modules.

    Attributes:
        inner: the delta of all rows; its scale applies.
        rows: rows of this delta.
        total: number of rows of `inner`.
    """

    inner: WeightDelta
    rows: slice
    total: int

    def changes_output(self, module: Module) -> bool:
        return False

    def shape_for(self, weight_shape: torch.Size) -> tuple[int, ...]:
        whole = self._whole(weight_shape)
        if self.inner.shape_for(whole) != tuple(whole):
            return self.inner.shape_for(whole)
        return (self.rows.stop - self.rows.start, *weight_shape[1:])

    def full(self, weight_shape: torch.Size, device: torch.device) -> Tensor:
        # Cloned, because `change` multiplies the result in place.
        return self.inner.full(self._whole(weight_shape), device)[self.rows].clone()

    def _whole(self, weight_shape: torch.Size) -> torch.Size:
        return torch.Size((self.total, *weight_shape[1:]))

    def tensors(self) -> tuple[Tensor, ...]:
        return self.inner.tensors()

    def to(self, device: torch.device) -> Self:
        return replace(self, inner=self.inner.to(device))


@dataclass(frozen=True, eq=False)
class LohaDelta(WeightDelta):
    """A Hadamard product, `(w1_a @ w1_b) * (w2_a @ w2_b)`, or that of two `tucker` products.

    The trainer does not write LoHa files, so the order of operations is that of LyCORIS.
    """

    w1: tuple[Tensor, ...]
    w2: tuple[Tensor, ...]

    def shape_for(self, weight_shape: torch.Size) -> tuple[int, ...]:
        w1, w2 = product_shape(self.w1), product_shape(self.w2)
        return fitting_shape(w1, weight_shape) if w1 == w2 else w1

    def full(self, weight_shape: torch.Size, device: torch.device) -> Tensor:
        return (product(self.w1, device) * product(self.w2, device) * self.scale).reshape(
            weight_shape
        )

    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.w1, *self.w2)

    def to(self, device: torch.device) -> Self:
        return replace(
            self, w1=tuple(w.to(device) for w in self.w1), w2=tuple(w.to(device) for w in self.w2)
        )


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Return the value of an attribute of a delta with all tensors inside it in `dtype`."""
    if isinstance(value, Tensor):
        return value.to(dtype)
    if isinstance(value, Delta):
        return value.cast(dtype)
    if isinstance(value, tuple):
        return tuple(_cast(one, dtype) for one in value)
    return value


def consecutive_rows(sizes: Sequence[int]) -> Iterator[slice]:
    """Yield consecutive slices of these sizes, beginning at 0."""
    for size, end in zip(sizes, accumulate(sizes), strict=True):
        yield slice(end - size, end)


def scale_of(alpha: float | None, rank: int) -> float:
    """Return alpha / rank; as in the trainer, an alpha that is missing or 0 means alpha = rank."""
    return alpha / rank if alpha else 1.0
