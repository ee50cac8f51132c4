"""Upsampling in the UNet as A1111 computes it, for sizes that are not multiples of 64 pixels.

At such a size, the UNet's smaller feature maps are rounded up, so doubling them gives more rows or
columns than the skip connection has. diffusers and ComfyUI upsample to the size of the skip
connection before the convolution. A1111 doubles the size, convolves, and resizes the result.

Source: https://github.com/AUTOMATIC1111/stable-diffusion-webui, `modules/sd_hijack_unet.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn import functional


@contextmanager
def doubling_sizes(model: nn.Module) -> Iterator[None]:
    """Make the upsampling of a UNet double sizes, and resize its results to those requested.

    Other models, which do not request sizes, are unchanged.
    """
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, Upsample2D):
                stack.enter_context(_doubling(module))
        yield


@contextmanager
def _doubling(module: nn.Module) -> Iterator[None]:
    requested: tuple[int, int] | None = None

    def without_size(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal requested
        hidden, *sizes = args
        requested = None if not sizes or sizes[0] is None else tuple(sizes[0])
        return (hidden,)

    def resized(_module: nn.Module, _args: tuple[Any, ...], result: Tensor) -> Tensor:
        if requested is None or tuple(result.shape[-2:]) == requested:
            return result
        return functional.interpolate(result, requested, mode="nearest")

    before = module.register_forward_pre_hook(without_size)
    after = module.register_forward_hook(resized)
    try:
        yield
    finally:
        before.remove()
        after.remove()
