"""Work that the exact path does once instead of at every step, with bit-identical results.

* PyTorch computes convolutions with oneDNN, which multiplies weights in a blocked memory layout.
  PyTorch converts the weight to that layout at each call; at 256x256 pixels, the conversions take a
  sixth of the time of all convolutions. Here a weight is converted only when it changes, with the
  same layout and arithmetic.
* The keys and values that cross-attention computes from the prompt embeddings are the same at every
  step, so they are cached.
"""

from __future__ import annotations

import platform
from typing import Any, cast

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional

from fidelora.accel.weight_protocols import GetWeight


def prepack(denoiser: nn.Module) -> None:
    """Prepack convolutions and cache text projections of a denoiser on the CPU.

    Convolutions get their weights later (`set_weight`), with the first adapters merged in.
    """
    for parent in list(denoiser.modules()):
        cross_attention = isinstance(parent, Attention) and parent.is_cross_attention
        for name, child in parent.named_children():
            if isinstance(child, nn.Conv2d) and _is_worth_prepacking(child):
                setattr(parent, name, PrepackedConv2d(child))
            elif cross_attention and name in ("to_k", "to_v"):
                assert isinstance(child, nn.Linear)
                setattr(parent, name, CachedTextLinear(child))


def _is_worth_prepacking(conv: nn.Conv2d) -> bool:
    """True if PyTorch computes `conv` with oneDNN and converts its weight at each call.

    Always False on processors other than x86, which were not measured, and in float16, where the
    results of oneDNN differ from those of PyTorch.
    """
    if conv.kernel_size == (1, 1) or conv.groups != 1:
        return False
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return False
    dtype = conv.weight.dtype
    if platform.machine() not in ("x86_64", "AMD64") or dtype not in (
        torch.float32,
        torch.bfloat16,
    ):
        return False
    return _uses_onednn(conv, torch.empty((), dtype=dtype).expand(_usual_input(conv)), conv.weight)


def _usual_input(conv: nn.Conv2d) -> list[int]:
    """Return the shape of inputs that the weight of `conv` is prepacked for.

    For inputs of other shapes that need another layout, oneDNN converts the weight at each call.
    """
    return [2, conv.in_channels, 32, 32]


def _uses_onednn(conv: nn.Conv2d, x: Tensor, weight: Tensor) -> bool:
    """True if PyTorch computes `conv` of `x` with oneDNN.

    PyTorch computes small single images with its own code. Only the shapes and dtypes of `x` and
    `weight` matter, not their values.
    """
    geometry = (conv.stride, conv.padding, conv.dilation, False, (0, 0), conv.groups)
    backend: str = torch._C._select_conv_backend(x, weight, conv.bias, *geometry, None).name
    return backend == "Mkldnn"


class PrepackedConv2d(nn.Conv2d):
    """A convolution on the CPU whose weight is kept in oneDNN's layout; for inference only.

    Its `weight` has a shape but no data; `set_weight` supplies the data. Small single images, and
    callers of `plain_weight`, need a plain copy of the weight. That copy replaces the prepacked
    weight until the next `set_weight`: keeping both would double the memory, and making the copy
    again for each image would take more time than prepacking saves.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        shape = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding)
        options: Any = {"dilation": conv.dilation, "device": "meta", "dtype": conv.weight.dtype}
        # The tuples in `shape` are pairs.
        super().__init__(*shape, bias=False, **options)  # type: ignore[arg-type]
        self.register_parameter("bias", cast(nn.Parameter | None, conv.bias))
        self.requires_grad_(False)
        self._shape_only = torch.empty((), dtype=conv.weight.dtype).expand(conv.weight.shape)
        self._get_weight: GetWeight | None = None
        self._plain: Tensor | None = None
        self._prepacked: Any = None

    def release_weight(self) -> None:
        """Drop the weight until the next `set_weight`."""
        self._get_weight = self._plain = self._prepacked = None

    def set_weight(self, get_weight: GetWeight) -> None:
        """Use the weight [out, in, height, width] that `get_weight` returns."""
        self.release_weight()
        dtype = self.weight.dtype
        # The prepacked weight keeps a reference to the tensor that it is made from. `source` shares
        # the storage of the returned weight until `set_()` detaches it, so that the reference does
        # not keep the storage in memory.
        source = torch.empty(0, dtype=dtype).set_(get_weight(dtype))  # type: ignore[call-overload]
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        self._prepacked = torch.ops.mkldnn_prepacked.conv2d_prepack(
            source, self.bias, *geometry, _usual_input(self), "none"
        )
        source.set_()
        self._get_weight = get_weight

    def plain_weight(self) -> Tensor:
        """Return the weight in use, and keep it unpacked until the next `set_weight`."""
        if self._plain is None:
            assert self._get_weight is not None, "the weight was released and not set again"
            # Copy, because the alignment of a mapped file may differ and change the order of sums.
            self._plain, self._prepacked = self._get_weight(self.weight.dtype).clone(), None
        return self._plain

    def forward(self, x: Tensor) -> Tensor:
        prepacked = self._prepacked is not None and x.is_contiguous()
        if prepacked and _uses_onednn(self, x, self._shape_only):
            return cast(Tensor, torch.ops.mkldnn_prepacked.conv2d_run(x, self._prepacked))
        return functional.conv2d(
            x, self.plain_weight(), self.bias, self.stride, self.padding, self.dilation
        )


class CachedTextProjection(nn.Module):
    """Caches the last result of a linear module whose input is the same at many consecutive calls.

    Inputs are compared by identity, so an input tensor must not be changed in place. Every image
    therefore has its own input tensors.
    """

    _cached: tuple[Tensor, int, Tensor] | None = None

    def forward(self, text: Tensor) -> Tensor:
        version = self._weight_version()
        if self._cached is None or self._cached[0] is not text or self._cached[1] != version:
            self._cached = (text, version, super().forward(text))
        return self._cached[2]

    def _weight_version(self) -> int:
        """Return a number that differs after each change of the weight."""
        raise NotImplementedError


class CachedTextLinear(CachedTextProjection, nn.Linear):
    """A linear module with `linear`'s parameters that caches its result for the last prompt."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)

    def _weight_version(self) -> int:
        return self.weight._version
