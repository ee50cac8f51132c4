"""The fast path on the CPU: weights in the order in which the processor's matrix units read them, attention by matrix products.

oneDNN multiplies fastest when a weight lies in memory block by block. PyTorch has it laid out so at each call; here it is done
once, when a weight is loaded or an adapter changes it. Where the processor multiplies bfloat16 itself, weights and activations are
bfloat16, which halves what has to be read and doubles what is computed at once. Neither keeps the bits of the exact path.

A packed module is a linear or convolutional module whose `weight` has a shape and a dtype but no numbers; the numbers are what it
was given to `take`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from fidelora.accel.prepack import CachedTextProjection

_SCORES_AT_ONCE = 4 * 2**20
"""Of attention, what each row thinks of each key, for as many heads or rows as fit: 8 MB, which stay in the cache."""


def packed_dtype() -> torch.dtype:
    """The dtype of the fast path on this processor: bfloat16 where it multiplies that itself, else float32."""
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


class _Packed(nn.Module):
    """A module whose weight is packed."""

    _packed: Tensor | None = None

    def release(self) -> None:
        """Forget the weight, until another one is taken."""
        self._packed = None


class PackedLinear(_Packed, nn.Linear):
    """A linear module like this one whose weight is packed."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__(
            linear.in_features, linear.out_features, bias=False, device="meta", dtype=dtype
        )
        self.register_parameter("bias", _own(linear.bias, dtype))

    def take(self, write: Callable[[torch.dtype], Tensor]) -> None:
        """Use the weight [out, in] that `write` gives, which is copied."""
        self._packed = torch.ops.mkldnn._reorder_linear_weight(
            write(torch.float32).to(self.weight.dtype), None
        )

    def forward(self, x: Tensor) -> Tensor:
        return cast(
            Tensor, torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        )


class PackedCachedTextLinear(CachedTextProjection, PackedLinear):
    """A packed linear module that projects each text once."""

    _taken = 0

    def take(self, write: Callable[[torch.dtype], Tensor]) -> None:
        super().take(write)
        self._taken += 1

    def _state_of_weight(self) -> int:
        return self._taken


class PackedGatedLinear(PackedLinear):
    """A packed linear module of twice as many outputs, half of them values, half of them gates: gives `values * gelu(gates)`.

    oneDNN does all but the product of matrices to its results while they are in registers.
    """

    _packed_gates: Tensor | None = None

    def release(self) -> None:
        self._packed = self._packed_gates = None

    def take(self, write: Callable[[torch.dtype], Tensor]) -> None:
        values, gates = write(torch.float32).to(self.weight.dtype).chunk(2)
        self._packed = torch.ops.mkldnn._reorder_linear_weight(values, None)
        self._packed_gates = torch.ops.mkldnn._reorder_linear_weight(gates, None)

    def forward(self, x: Tensor) -> Tensor:
        of_values, of_gates = self.bias.chunk(2)
        gates = torch.ops.mkldnn._linear_pointwise(
            x, self._packed_gates, of_gates, "gelu", [], "none"
        )
        return cast(
            Tensor,
            torch.ops.mkldnn._linear_pointwise.binary(x, gates, self._packed, of_values, "mul"),
        )


class PackedGate(nn.Module):
    """diffusers' `GEGLU`, whose linear module does it all."""

    def __init__(self, gate: GEGLU, dtype: torch.dtype) -> None:
        super().__init__()
        self.proj = PackedGatedLinear(gate.proj, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.proj(x))


class PackedConv2d(_Packed, nn.Conv2d):
    """A convolution like this one whose weight is packed."""

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
        super().__init__(*shape, bias=False, device="meta", dtype=dtype)  # type: ignore[arg-type]  # tuples are pairs here
        self.register_parameter("bias", _own(conv.bias, dtype))

    def take(self, write: Callable[[torch.dtype], Tensor]) -> None:
        """Use the weight [out, in, height, width] that `write` gives, which is copied."""
        plain = write(torch.float32).to_mkldnn(self.weight.dtype)
        self._packed = torch._C._nn.mkldnn_reorder_conv2d_weight(plain, *self._place)

    def forward(self, x: Tensor) -> Tensor:
        return cast(
            Tensor,
            torch.ops.mkldnn._convolution_pointwise(
                x, self._packed, self.bias, *self._place, "none", [], ""
            ),
        )

    @property
    def _place(self) -> tuple[Any, Any, Any, int]:
        return self.padding, self.stride, self.dilation, self.groups


class PackedPointwise(_Packed, nn.Conv2d):
    """A convolution like this one, of one pixel: a linear module over the channels of each pixel, which lie side by side here.

    Packed as a convolution it would be laid out for another size of the image than the one that comes, and again at each call.
    """

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype) -> None:
        super().__init__(
            conv.in_channels, conv.out_channels, 1, bias=False, device="meta", dtype=dtype
        )
        self.register_parameter("bias", _own(conv.bias, dtype))

    def take(self, write: Callable[[torch.dtype], Tensor]) -> None:
        """Use the weight [out, in, 1, 1] that `write` gives, which is copied."""
        weight = write(torch.float32).flatten(1)
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(self.weight.dtype), None)

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.permute(0, 2, 3, 1)
        mixed: Tensor = torch.ops.mkldnn._linear_pointwise(
            pixels, self._packed, self.bias, "none", [], ""
        )
        return mixed.permute(0, 3, 1, 2)


def pack(unet: UNet2DConditionModel, vae: AutoencoderKL) -> None:
    """Pack the linear and convolutional modules of both, and let the UNet's attention be products of matrices.

    The modules may hold tensors that are mapped from a file; nothing of that is kept. Those of the UNet get their weights later
    (`take`), with the first adapters in them.
    """
    dtype = packed_dtype()
    for model in (unet, vae):
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if isinstance(child, GEGLU) and child.proj.bias is not None:
                    setattr(parent, name, PackedGate(child, dtype))
                elif (
                    isinstance(parent, Attention)
                    and parent.is_cross_attention
                    and name in ("to_k", "to_v")
                ):
                    setattr(parent, name, PackedCachedTextLinear(child, dtype))
                elif (packed := _packed(child, dtype)) is not None:
                    setattr(parent, name, packed)
                    if model is vae:
                        packed.take(child.weight.to)
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point() and not tensor.is_meta:
                tensor.data = tensor.to(dtype, copy=True)
        model.eval().requires_grad_(False)
    for module in unet.modules():
        if isinstance(module, Attention) and _is_plain(module):
            module.set_processor(BatchedAttention())


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
    # The best layout for other numbers of channels depends on the size of the image, and the wrong one costs more than none.
    return (
        PackedConv2d(module, dtype)
        if module.out_channels % 64 == 0 or module.out_channels < 64
        else None
    )


def _own(bias: Tensor | None, dtype: torch.dtype) -> nn.Parameter | None:
    return None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)


def _is_plain(attn: Attention) -> bool:
    """Whether it is attention and nothing else, as in the transformers of Stable Diffusion."""
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
    """Plain attention by products of matrices, as a processor for diffusers' `Attention`."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,
        temb: None = None,
    ) -> Tensor:
        assert attention_mask is None, "a UNet that is asked for whole images masks nothing"
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
    """softmax(query @ key^T / sqrt(size)) @ value of [heads, tokens, size], so many heads, or rows of one, at once as are fast."""
    heads, rows, size = query.shape
    keys = key.shape[1]
    some_heads = max(1, _SCORES_AT_ONCE // (rows * keys))
    some_rows = rows if some_heads > 1 else max(1, min(rows, _SCORES_AT_ONCE // keys))
    nothing = torch.empty(
        (), dtype=query.dtype
    )  # is multiplied by zero, which does not even read it
    result = torch.empty_like(query)
    for head in range(0, heads, some_heads):
        part = slice(head, head + some_heads)
        for start in range(0, rows, some_rows):
            queries = query[part, start : start + some_rows]
            place = nothing.expand(*queries.shape[:2], keys)
            scores = torch.baddbmm(
                place, queries, key[part].transpose(1, 2), beta=0, alpha=size**-0.5
            )
            result[part, start : start + some_rows] = torch.bmm(
                torch.softmax(scores, -1), value[part]
            )
    return result
