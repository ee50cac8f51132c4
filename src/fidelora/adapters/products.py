"""Products of the factors of deltas, and the shapes of these products."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional


def convolved(up: Tensor, down: Tensor) -> Tensor:
    """Return `up @ down` for kernels larger than 1 x 1 as the trainer computes it.

    The result [out, in, kh, kw] is not contiguous: it has the strides of a permuted tensor.
    """
    return functional.conv2d(down.permute(1, 0, 2, 3), up).permute(1, 0, 2, 3)


def matrix_product(up: Tensor, down: Tensor) -> Tensor:
    """Return `up @ down` in the shape [out, *down.shape[1:]].

    The dimensions of `down` after the first are flattened for the product.
    """
    return (up.flatten(1) @ down.flatten(1)).view(len(up), *down.shape[1:])


@cache
def row_products_match(
    up_shape: torch.Size, down_shape: torch.Size, rows: int, threads: int
) -> bool:
    """Return True if products of `rows` rows at a time have the same bits as the trainer's product.

    Every value is a sum with as many terms as the rank, but the matrix library chooses the order of
    the terms. This function therefore compares products of random factors, once per shape on this
    processor. Products of a few rows are faster, because the result stays in the CPU cache until it
    is added to the weight. Even one product of all rows is faster than a convolution, whose result
    does not have the memory layout of the weight.

    Args:
        threads: number of threads; the order of the sums may depend on it.
    """
    generator = torch.Generator().manual_seed(threads)
    up, down = (torch.randn(shape, generator=generator) for shape in (up_shape, down_shape))
    whole = matrix_product(up, down) if down_shape[2:].numel() == 1 else convolved(up, down)
    parts = zip(torch.split(up, rows), torch.split(whole, rows), strict=True)
    return all(torch.equal(matrix_product(part, down), expected) for part, expected in parts)


def tucker(core: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the weight [out, in, kh, kw] of a Tucker decomposition.

    Source: `rebuild_tucker` of LyCORIS 3 (`lycoris/functional/general.py`).

    Args:
        core: [rank, rank, kh, kw].
        rows: [rank, out].
        columns: [rank, in].
    """
    return torch.einsum("ijkl,ip,jr->prkl", core, rows, columns)


def product(factors: tuple[Tensor, ...], device: torch.device) -> Tensor:
    """Return one factor, the matrix product of two, or `tucker` of three."""
    whole, *rest = (factor.to(device) for factor in factors)
    if len(rest) == 2:
        return tucker(whole, *rest)
    return whole @ rest[0] if rest else whole


def product_shape(factors: tuple[Tensor, ...]) -> tuple[int, ...]:
    """Return the shape of `product`."""
    if len(factors) == 3:
        core, rows, columns = factors
        return (rows.shape[1], columns.shape[1], *core.shape[2:])
    return (
        tuple(factors[0].shape) if len(factors) == 1 else (factors[0].shape[0], factors[1].shape[1])
    )


def fitting_shape(shape: tuple[int, ...], weight_shape: torch.Size) -> tuple[int, ...]:
    """Return `weight_shape` if a tensor of `shape` can be reshaped to it, else `shape`.

    Some files store a convolution [out, in, kh, kw] as a matrix [out, in * kh * kw], or a matrix as
    a convolution [out, in, 1, 1]. Shapes with as many dimensions as the weight are not changed.
    """
    fits = (
        len(shape) != len(weight_shape)
        and shape[:1] == weight_shape[:1]
        and math.prod(shape[1:]) == weight_shape[1:].numel()
    )
    return tuple(weight_shape) if fits else shape
