"""What the exact path does once where diffusers does it at every step, with the same bits.

* PyTorch has oneDNN compute convolutions. oneDNN multiplies a weight that lies in memory block by block, so PyTorch has the weight
  laid out so at each call, which at 256x256 takes a sixth of the time of all convolutions. Here it is laid out when it changes. It
  is the same product of the same numbers in the same layout.
* The keys and values that cross-attention takes from the text are the same at every step of an image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional


def do_once(unet: UNet2DConditionModel) -> None:
    """Have convolutions laid out once and texts projected once, in a UNet on the CPU.

    Convolutions get their weights later (`take`), with the first adapters in them.
    """
    for parent in list(unet.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Conv2d) and _gains(child):
                setattr(parent, name, LaidOutConv2d(child))
            elif isinstance(parent, Attention) and parent.is_cross_attention and name in ("to_k", "to_v"):
                assert isinstance(child, nn.Linear)
                setattr(parent, name, TextLinear(child))


def _gains(conv: nn.Conv2d) -> bool:
    """Whether it has a weight that takes time to lay out, and is plain enough for it; oneDNN's float16 is not PyTorch's."""
    plain = conv.groups == 1 and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
    return plain and conv.kernel_size != (1, 1) and conv.weight.dtype in (torch.float32, torch.bfloat16)


class LaidOutConv2d(nn.Conv2d):
    """A convolution like this one on the CPU whose weight is kept as oneDNN wants it; without gradients.

    Its `weight` is a shape without numbers. The numbers are what it was given to `take`. PyTorch computes small single images by
    itself; for these, and for whoever else computes with it, the weight is written again as it is.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        shape = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding)
        super().__init__(*shape, dilation=conv.dilation, bias=False, device="meta", dtype=conv.weight.dtype)  # type: ignore[arg-type]  # tuples are pairs here
        self.register_parameter("bias", cast(nn.Parameter | None, conv.bias))
        self.requires_grad_(False)
        self._shape_alone = torch.empty((), dtype=conv.weight.dtype).expand(conv.weight.shape)
        self._plain: Tensor | None = None
        self._laid_out: Any = None

    def release(self) -> None:
        """Forget the weight, until another one is taken."""
        self._laid_out = self._plain = None

    def take(self, write: Callable[[torch.dtype], Tensor]) -> None:
        """Use the weight [out, in, height, width] that `write` gives in a dtype, now and possibly again; it is not changed."""
        self.release()
        weight = write(self.weight.dtype)
        weight = weight.view(weight.shape)  # a handle of its own, which is emptied below
        place = (self.stride, self.padding, self.dilation, self.groups)
        self._laid_out = torch.ops.mkldnn_prepacked.conv2d_prepack(weight, self.bias, *place, self._usual_input, "none")
        weight.set_()  # type: ignore[call-overload]  # what is laid out keeps the handle of what it was made of
        self._write = write

    def plain(self) -> Tensor:
        """The weight that it uses, for somebody who computes with it; from now on until the next `take` it stays as it is."""
        if self._plain is None:
            # A copy, because what is mapped from a file may lie where it is summed in another order.
            self._plain, self._laid_out = self._write(self.weight.dtype).clone(), None
        return self._plain

    def forward(self, x: Tensor) -> Tensor:
        if self._laid_out is None or not self._goes_to_onednn(x):
            return functional.conv2d(x, self.plain(), self.bias, self.stride, self.padding, self.dilation)
        return cast(Tensor, torch.ops.mkldnn_prepacked.conv2d_run(x, self._laid_out))

    @property
    def _usual_input(self) -> list[int]:
        """The layout depends on the processor, and hardly on this; another one than the best is changed at each call."""
        return [2, self.in_channels, 32, 32]

    def _goes_to_onednn(self, x: Tensor) -> bool:
        """Whether PyTorch would have oneDNN convolve this input, laid out block by block."""
        place = (self.stride, self.padding, self.dilation, False, (0, 0), self.groups)
        backend = torch._C._select_conv_backend(x, self._shape_alone, self.bias, *place, None)
        return backend.name == "Mkldnn" and x.is_contiguous()


class OncePerText(nn.Module):
    """For a linear module that is given one text after the other, many times each: what it made of the last one.

    A text is known by its tensor, which nobody changes: each image has its own.
    """

    _known: tuple[Tensor, int, Tensor] | None = None

    def forward(self, text: Tensor) -> Tensor:
        if self._known is None or self._known[0] is not text or self._known[1] != self._state_of_weight():
            self._known = (text, self._state_of_weight(), super().forward(text))
        return self._known[2]

    def _state_of_weight(self) -> int:
        """A number that is another one after each change of the weight."""
        raise NotImplementedError


class TextLinear(OncePerText, nn.Linear):
    """A linear module like this one, with its very parameters, that projects each text once."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)

    def _state_of_weight(self) -> int:
        return self.weight._version
