"""What the exact path does once where diffusers does it at every step, with the same bits.

* PyTorch has oneDNN compute convolutions. oneDNN multiplies a weight that lies in memory block by block, so PyTorch has the weight
  laid out so at each call, which at 256x256 takes a sixth of the time of all convolutions. Here it is laid out when it changes. It
  is the same product of the same numbers in the same layout.
* The keys and values that cross-attention takes from the text are the same at every step of an image.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any, cast

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional


def prepack(unet: UNet2DConditionModel) -> None:
    """Have convolutions laid out once and texts projected once, in a UNet on the CPU.

    Convolutions get their weights later (`take`), with the first adapters in them.
    """
    for parent in list(unet.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Conv2d) and _gains(child):
                setattr(parent, name, PrepackedConv2d(child))
            elif (
                isinstance(parent, Attention)
                and parent.is_cross_attention
                and name in ("to_k", "to_v")
            ):
                assert isinstance(child, nn.Linear)
                setattr(parent, name, CachedTextLinear(child))


def _gains(conv: nn.Conv2d) -> bool:
    """Whether PyTorch has oneDNN compute it, in a layout that takes time, and it is plain enough for that.

    Measured on x86; how oneDNN lays out a weight on other processors is not known. Its float16 is not PyTorch's.
    """
    if (
        conv.kernel_size == (1, 1)
        or conv.groups != 1
        or conv.padding_mode != "zeros"
        or isinstance(conv.padding, str)
    ):
        return False
    known = platform.machine() in ("x86_64", "AMD64") and conv.weight.dtype in (
        torch.float32,
        torch.bfloat16,
    )
    return known and _is_onednns(
        conv, torch.empty((), dtype=conv.weight.dtype).expand(_usual_input(conv)), conv.weight
    )


def _usual_input(conv: nn.Conv2d) -> list[int]:
    """The shape that a weight is laid out for. Where the layout is not the best for an input, oneDNN changes it at each call."""
    return [2, conv.in_channels, 32, 32]


def _is_onednns(conv: nn.Conv2d, x: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch has oneDNN convolve `x`; small single images it convolves itself. Of the tensors only the form matters."""
    place = (conv.stride, conv.padding, conv.dilation, False, (0, 0), conv.groups)
    backend: str = torch._C._select_conv_backend(x, weight, conv.bias, *place, None).name
    return backend == "Mkldnn"


class PrepackedConv2d(nn.Conv2d):
    """A convolution like this one on the CPU whose weight is kept as oneDNN wants it; without gradients.

    Its `weight` is a shape without numbers. The numbers are what it was given to `take`. Small single images PyTorch computes by
    itself; for these, and for whoever else computes with it, the weight is written again as it is, and stays so until the next
    `take`: both forms together would be memory for twice as many weights, and writing it for each image takes longer than it gains.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        shape = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding)
        options: Any = {"dilation": conv.dilation, "device": "meta", "dtype": conv.weight.dtype}
        super().__init__(*shape, bias=False, **options)  # type: ignore[arg-type]  # tuples are pairs
        self.register_parameter("bias", cast(nn.Parameter | None, conv.bias))
        self.requires_grad_(False)
        self._shape_alone = torch.empty((), dtype=conv.weight.dtype).expand(conv.weight.shape)
        self._write: Callable[[torch.dtype], Tensor] | None = None
        self._plain: Tensor | None = None
        self._laid_out: Any = None

    def release(self) -> None:
        """Forget the weight, until another one is taken."""
        self._write = self._plain = self._laid_out = None

    def take(self, write: Callable[[torch.dtype], Tensor]) -> None:
        """Use the weight [out, in, height, width] that `write` gives in a dtype, now and possibly again; it is not changed."""
        self.release()
        dtype = self.weight.dtype
        # What is laid out keeps the handle of what it was made of. So it gets one of its own, no view (that would keep the whole).
        handle = torch.empty(0, dtype=dtype).set_(write(dtype))  # type: ignore[call-overload]
        place = (self.stride, self.padding, self.dilation, self.groups)
        self._laid_out = torch.ops.mkldnn_prepacked.conv2d_prepack(
            handle, self.bias, *place, _usual_input(self), "none"
        )
        handle.set_()
        self._write = write

    def plain(self) -> Tensor:
        """The weight that it uses, for somebody who computes with it; from now on until the next `take` it stays as it is."""
        if self._plain is None:
            assert self._write is not None, "it was released, and took no other weight"
            # A copy, because what is mapped from a file may lie where it is summed in another order.
            self._plain, self._laid_out = self._write(self.weight.dtype).clone(), None
        return self._plain

    def forward(self, x: Tensor) -> Tensor:
        if (
            self._laid_out is None
            or not x.is_contiguous()
            or not _is_onednns(self, x, self._shape_alone)
        ):
            return functional.conv2d(
                x, self.plain(), self.bias, self.stride, self.padding, self.dilation
            )
        return cast(Tensor, torch.ops.mkldnn_prepacked.conv2d_run(x, self._laid_out))


class CachedTextProjection(nn.Module):
    """For a linear module that is given one text after the other, many times each: what it made of the last one.

    A text is known by its tensor, which nobody changes: each image has its own.
    """

    _known: tuple[Tensor, int, Tensor] | None = None

    def forward(self, text: Tensor) -> Tensor:
        if (
            self._known is None
            or self._known[0] is not text
            or self._known[1] != self._state_of_weight()
        ):
            self._known = (text, self._state_of_weight(), super().forward(text))
        return self._known[2]

    def _state_of_weight(self) -> int:
        """A number that is another one after each change of the weight."""
        raise NotImplementedError


class CachedTextLinear(CachedTextProjection, nn.Linear):
    """A linear module like this one, with its very parameters, that projects each text once."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)

    def _state_of_weight(self) -> int:
        return self.weight._version
