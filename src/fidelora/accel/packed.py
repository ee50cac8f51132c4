"""The fast path on the CPU: packed weights, and attention with batched matrix products.

oneDNN multiplies fastest with weights in a blocked memory layout. PyTorch converts a weight to that
layout at each call; packed modules convert it only when it is loaded or changed by an adapter. On
processors that multiply bfloat16 natively, weights and activations are bfloat16, which halves the
memory traffic and doubles the arithmetic throughput. Images are not bit-identical to those of the
exact path.

Packed modules replace linear and convolutional modules. Their `weight` has a shape and a dtype but
no data; `set_weight` supplies the data.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from fidelora.accel.prepack import CachedTextProjection
from fidelora.accel.weight_protocols import GetWeight

_SCORES_AT_ONCE = 4 * 2**20
"""Attention scores computed at a time: 8 MB in bfloat16, small enough to stay in the CPU cache."""


def packed_dtype() -> torch.dtype:
    """Return the dtype of the fast path: bfloat16 if the processor multiplies it, else float32."""
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


class _Packed(nn.Module):
    """A module whose weight is packed."""

    _packed: Tensor | None = None

    def release_weight(self) -> None:
        """Drop the weight until the next `set_weight`."""
        self._packed = None


class PackedLinear(_Packed, nn.Linear):
    """A packed copy of a linear module."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__(
            linear.in_features, linear.out_features, bias=False, device="meta", dtype=dtype
        )
        self.register_parameter("bias", _frozen_parameter(linear.bias, dtype))

    def set_weight(self, get_weight: GetWeight) -> None:
        """Pack a copy of the weight [out, in] that `get_weight` returns."""
        self._packed = torch.ops.mkldnn._reorder_linear_weight(
            get_weight(torch.float32).to(self.weight.dtype), None
        )

    def forward(self, x: Tensor) -> Tensor:
        return cast(
            Tensor, torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        )


class PackedCachedTextLinear(CachedTextProjection, PackedLinear):
    """A packed linear module that caches its result for the last prompt."""

    _version = 0

    def set_weight(self, get_weight: GetWeight) -> None:
        super().set_weight(get_weight)
        self._version += 1

    def _weight_version(self) -> int:
        return self._version


class PackedGatedLinear(PackedLinear):
    """A packed linear module with a GELU gate; returns `values * gelu(gates)`.

    The first half of the linear outputs are the values, the second half are the gates. oneDNN
    multiplies the values by the gates while the values are still in registers.
    """

    _packed_gates: Tensor | None = None

    def release_weight(self) -> None:
        self._packed = self._packed_gates = None

    def set_weight(self, get_weight: GetWeight) -> None:
        values, gates = get_weight(torch.float32).to(self.weight.dtype).chunk(2)
        self._packed = torch.ops.mkldnn._reorder_linear_weight(values, None)
        self._packed_gates = torch.ops.mkldnn._reorder_linear_weight(gates, None)

    def forward(self, x: Tensor) -> Tensor:
        value_bias, gate_bias = self.bias.chunk(2)
        gates = torch.ops.mkldnn._linear_pointwise(
            x, self._packed_gates, gate_bias, "gelu", [], "none"
        )
        return cast(
            Tensor,
            torch.ops.mkldnn._linear_pointwise.binary(x, gates, self._packed, value_bias, "mul"),
        )


class PackedGate(nn.Module):
    """Replacement for diffusers' `GEGLU` that uses a `PackedGatedLinear`."""

    def __init__(self, gate: GEGLU, dtype: torch.dtype) -> None:
        super().__init__()
        self.proj = PackedGatedLinear(gate.proj, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.proj(x))


class PackedConv2d(_Packed, nn.Conv2d):
    """A packed copy of a convolution."""

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype) -> None:
        shape = (
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
        )
        # The tuples in `shape` are pairs.
        super().__init__(*shape, bias=False, device="meta", dtype=dtype)  # type: ignore[arg-type]
        self.register_parameter("bias", _frozen_parameter(conv.bias, dtype))

    def set_weight(self, get_weight: GetWeight) -> None:
        """Pack a copy of the weight [out, in, kh, kw] that `get_weight` returns."""
        plain = get_weight(torch.float32).to_mkldnn(self.weight.dtype)
        self._packed = torch._C._nn.mkldnn_reorder_conv2d_weight(plain, *self._geometry)

    def forward(self, x: Tensor) -> Tensor:
        return cast(
            Tensor,
            torch.ops.mkldnn._convolution_pointwise(
                x, self._packed, self.bias, *self._geometry, "none", [], ""
            ),
        )

    @property
    def _geometry(self) -> tuple[Any, Any, Any, int]:
        return self.padding, self.stride, self.dilation, self.groups


class PackedPointwise(_Packed, nn.Conv2d):
    """A packed 1x1 convolution: a linear module over the channels of each pixel.

    oneDNN would pack the weight of a convolution for one image size, and convert it at each call
    with any other size.
    """

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype) -> None:
        super().__init__(
            conv.in_channels, conv.out_channels, 1, bias=False, device="meta", dtype=dtype
        )
        self.register_parameter("bias", _frozen_parameter(conv.bias, dtype))

    def set_weight(self, get_weight: GetWeight) -> None:
        """Pack a copy of the weight [out, in, 1, 1] that `get_weight` returns."""
        weight = get_weight(torch.float32).flatten(1)
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(self.weight.dtype), None)

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.permute(0, 2, 3, 1)
        mixed: Tensor = torch.ops.mkldnn._linear_pointwise(
            pixels, self._packed, self.bias, "none", [], ""
        )
        return mixed.permute(0, 3, 1, 2)


def pack(module: nn.Module, *, adapters_follow: bool) -> None:
    """Pack the linear and convolutional modules of a part of the model.

    The tensors of `module` may be mapped from a file; all of them are replaced by copies.

    Args:
        adapters_follow: True if the packed weights are set later (`set_weight`), with the first
            adapters merged in; False to pack the current weights now. False is supported only for
            parts without GEGLU and cross-attention, such as a VAE.
    """
    dtype = packed_dtype()
    for parent in list(module.modules()):
        cross_attention = isinstance(parent, Attention) and parent.is_cross_attention
        for name, child in parent.named_children():
            if isinstance(child, GEGLU) and child.proj.bias is not None:
                setattr(parent, name, PackedGate(child, dtype))
            elif cross_attention and name in ("to_k", "to_v"):
                setattr(parent, name, PackedCachedTextLinear(cast(nn.Linear, child), dtype))
            elif (packed := _packed(child, dtype)) is not None:
                setattr(parent, name, packed)
                if not adapters_follow:
                    packed.set_weight(cast(nn.Linear, child).weight.to)
        if adapters_follow and isinstance(parent, Attention) and _is_plain(parent):
            parent.set_processor(BatchedAttention())
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point() and not tensor.is_meta:
            tensor.data = tensor.to(dtype, copy=True)
    module.eval().requires_grad_(False)


def _packed(
    module: nn.Module, dtype: torch.dtype
) -> PackedLinear | PackedPointwise | PackedConv2d | None:
    if isinstance(module, nn.Linear):
        return PackedLinear(module, dtype)
    if (
        not isinstance(module, nn.Conv2d)
        or module.padding_mode != "zeros"
        or isinstance(module.padding, str)
    ):
        return None
    if module.kernel_size == (1, 1) and module.stride == (1, 1) and module.groups == 1:
        return PackedPointwise(module, dtype)
    # The other convolutions stay unpacked: with their numbers of output channels, the best layout
    # depends on the image size, and a wrong layout is slower than an unpacked weight.
    return (
        PackedConv2d(module, dtype)
        if module.out_channels % 64 == 0 or module.out_channels < 64
        else None
    )


def _frozen_parameter(bias: Tensor | None, dtype: torch.dtype) -> nn.Parameter | None:
    return None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)


def _is_plain(attn: Attention) -> bool:
    """True if `attn` has no norms, residual connection or rescaling.

    This is the case in the transformer blocks of Stable Diffusion.
    """
    extras = (
        attn.group_norm,
        attn.spatial_norm,
        attn.norm_cross,
        attn.norm_q,
        attn.norm_k,
        attn.residual_connection,
    )
    return not any(extras) and attn.rescale_output_factor == 1 and attn.scale_qk


class BatchedAttention:
    """Processor for diffusers' `Attention` that uses batched matrix products."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,
        temb: None = None,
    ) -> Tensor:
        assert attention_mask is None, "attention masks are not supported"
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        batch, rows, _ = hidden_states.shape
        query, key, value = attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text)
        # [batch * heads, tokens, size]
        query, key, value = (
            part.unflatten(-1, (attn.heads, -1)).transpose(1, 2).flatten(0, 1)
            for part in (query, key, value)
        )
        mixed = _attend(query, key, value).view(batch, attn.heads, rows, -1)
        result: Tensor = attn.to_out[0](mixed.transpose(1, 2).reshape(batch, rows, -1))
        return result


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return softmax(query @ key^T / sqrt(size)) @ value; all tensors are [heads, tokens, size].

    As many heads, or rows of one head, are computed at a time as `_SCORES_AT_ONCE` allows.
    """
    heads, rows, size = query.shape
    keys = key.shape[1]
    some_heads = max(1, _SCORES_AT_ONCE // (rows * keys))
    some_rows = rows if some_heads > 1 else max(1, min(rows, _SCORES_AT_ONCE // keys))
    unused = torch.empty((), dtype=query.dtype)  # beta=0 does not read it
    result = torch.empty_like(query)
    for head in range(0, heads, some_heads):
        part = slice(head, head + some_heads)
        for start in range(0, rows, some_rows):
            queries = query[part, start : start + some_rows]
            bias = unused.expand(*queries.shape[:2], keys)
            scores = torch.baddbmm(
                bias, queries, key[part].transpose(1, 2), beta=0, alpha=size**-0.5
            )
            result[part, start : start + some_rows] = torch.bmm(
                torch.softmax(scores, -1), value[part]
            )
    return result
