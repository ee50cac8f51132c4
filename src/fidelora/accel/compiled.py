"""The fast path: what it is on which device, and what it is on CUDA.

On the CPU it is `packed.py`. On CUDA the UNet's transformer blocks are compiled, all of them once because they are alike, and the
layout in memory is the one that tensor cores read. Adapters are written into the very tensors that the compiled code reads, so a
switch compiles nothing.

The path on CUDA was written with the documentation of PyTorch and diffusers, and tested on the CPU; no figure of it is known.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

import torch

from fidelora.accel import Offload
from fidelora.errors import DeviceError

if TYPE_CHECKING:  # the server asks which devices have a fast path, and needs no models for that
    from diffusers import AutoencoderKL, UNet2DConditionModel

_COMPILER = "inductor"


class Way(Enum):
    """How `fast` is done."""

    PACKED = "packed"
    COMPILED = "compiled"


def way_on(device: torch.device, offload: Offload) -> Way:
    """The fast path on this device.

    Raises:
        DeviceError: there is none, or it cannot be had with offloading.
    """
    if offload != "none":
        raise DeviceError(
            f"fast keeps the whole model on its device; use offload none, or exact with offload {offload}."
        )
    if device.type == "cpu":
        if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            raise DeviceError(
                "This build of torch has no oneDNN, which fast on the CPU is made of; use exact."
            )
        return Way.PACKED
    if device.type == "cuda":
        return Way.COMPILED
    raise DeviceError(f"There is no fast path on {device.type}; use exact.")


def compile_parts(unet: UNet2DConditionModel, vae: AutoencoderKL) -> None:
    """Lay both out for tensor cores and have the UNet's repeated blocks compiled when they are first used.

    A block is compiled again for each new size of images, until the compiler takes sizes as variables; `BaseModel.warm` lets that
    happen before a request's first step.
    """
    for model in (unet, vae):
        model.to(memory_format=torch.channels_last)
    unet.compile_repeated_blocks(fullgraph=True, backend=_COMPILER)
