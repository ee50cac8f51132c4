"""Linear layers whose weights are stored in float8, computed as AI Toolkit's libraries do on a CPU.

Both kinds scale each row of a weight so that its largest absolute value becomes 448, the largest
number of float8 (e4m3), and round the row to float8. They differ in the last bits:

* `qfloat8` of optimum-quanto 0.2.4 divides by the scale. It rounds the product, and rounds again
  after it adds the bias.
* `float8` of torchao 0.10 multiplies by the reciprocal of the scale. It rounds once, after it adds
  the bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fidelora.accel.weight_protocols import GetWeight

Float8Kind = Literal["qfloat8", "float8"]

_LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448


def quantize(
    module: nn.Module, kind: Float8Kind, whole: Sequence[str], *, has_weights: bool
) -> None:
    """Replace the linear layers of a module by quantised ones.

    Args:
        whole: patterns (`fnmatch`) of the paths of layers that are not quantised.
        has_weights: False if the weights are set later (`set_weight`).
    """
    for path, layer in list(module.named_modules()):
        if not isinstance(layer, nn.Linear) or any(fnmatchcase(path, one) for one in whole):
            continue
        quantized = QuantizedLinear(layer, kind)
        if has_weights:
            weight = layer.weight.detach()
            quantized.set_weight(lambda dtype, weight=weight: weight.to(dtype))  # type: ignore[misc]
        parent, _, name = path.rpartition(".")
        setattr(module.get_submodule(parent), name, quantized)


def quantized_bytes(module: nn.Module) -> int:
    """Return the size in bytes of the weights of all quantised layers of a module."""
    layers = [layer for layer in module.modules() if isinstance(layer, QuantizedLinear)]
    return sum(layer.stored.nbytes + layer.scale.nbytes for layer in layers)


class QuantizedLinear(nn.Linear):
    """A linear layer whose weight [out, in] is float8, with one scale per row [out, 1].

    `plain_weight` and the products compute in the dtype of the replaced layer. The float8 numbers
    are a buffer of bytes, because a parameter would make float8 the dtype of the whole module.
    """

    def __init__(self, linear: nn.Linear, kind: Float8Kind) -> None:
        nn.Module.__init__(self)  # without allocating a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_parameter("bias", linear.bias)
        shape, dtype = linear.weight.shape, linear.weight.dtype
        self.stored: Tensor
        self.scale: Tensor
        self.register_buffer("stored", torch.empty(shape, dtype=torch.uint8))
        self.register_buffer("scale", torch.empty(shape[0], 1, dtype=dtype))
        self._kind = kind

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """A tensor with the shape and dtype of the weight, but without its data."""
        return torch.empty((), dtype=self.scale.dtype).expand(self.stored.shape)

    def release_weight(self) -> None:
        """Do nothing: the float8 weight is overwritten in place."""

    def set_weight(self, get_weight: GetWeight) -> None:
        """Quantise the weight [out, in] that `get_weight` returns."""
        weight = get_weight(self.scale.dtype).to(self.scale.dtype)
        scale = weight.abs().amax(dim=1, keepdim=True) / _LARGEST
        if self._kind == "qfloat8":
            # quanto computes 0 / 0 = NaN for a row of zeros. Here, such rows stay zeros.
            scaled = torch.where(scale > 0, weight / scale, weight)
        else:
            scale = scale.clamp(min=torch.finfo(torch.float32).eps)
            scaled = weight * (1.0 / scale)
        self._float8.copy_(scaled.clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn))
        self.scale.copy_(scale)

    def plain_weight(self) -> Tensor:
        """Return the rounded weight [out, in]."""
        return self._float8.to(self.scale.dtype) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for `x` [..., in]."""
        weight = self.plain_weight()
        if self._kind == "float8":
            return functional.linear(x, weight, self.bias)
        output = torch.matmul(x, weight.T)
        return output if self.bias is None else output + self.bias

    @property
    def _float8(self) -> Tensor:
        return self.stored.view(torch.float8_e4m3fn)
