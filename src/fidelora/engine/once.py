"""What is done once for an image where diffusers does it at every step, with the same bits.

The keys and values that cross-attention takes from the text are the same at every step: they depend on the text and on weights.
"""

from __future__ import annotations

from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn


def project_texts_once(unet: UNet2DConditionModel) -> None:
    """Have the cross-attention of a UNet on the CPU project each text once; its parameters stay what they are."""
    for module in unet.modules():
        if isinstance(module, Attention) and module.is_cross_attention:
            module.to_k, module.to_v = TextLinear(module.to_k), TextLinear(module.to_v)


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
