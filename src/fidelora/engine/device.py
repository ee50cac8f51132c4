"""Which device and which precision this machine offers."""

from __future__ import annotations

import torch

from fidelora.errors import DeviceError
from fidelora.recipe import Dtype

TORCH_DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """The device of this name: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`; `auto` takes the best there is.

    Raises:
        DeviceError: no such device here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", 0)
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(f"There is no device {name!r}; use auto, cpu, cuda, cuda:N or mps.") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise DeviceError(f"{name} was asked for, but this machine or this build of torch has no CUDA; use --device cpu.")
        if (device.index or 0) >= torch.cuda.device_count():
            raise DeviceError(f"{name} was asked for, but there are only {torch.cuda.device_count()} CUDA devices.")
        return torch.device("cuda", device.index or 0)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("mps was asked for, but this machine or this build of torch has no Metal device; use --device cpu.")
    if device.type not in ("cpu", "mps"):
        raise DeviceError(f"The device {name!r} is not supported; use auto, cpu, cuda, cuda:N or mps.")
    return torch.device(device.type)


def auto_dtype(device: torch.device) -> Dtype:
    """The usual precision of a device: CUDA bfloat16 where the hardware has it, else float16; mps float16; CPU float32."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"
    return "float16" if device.type == "mps" else "float32"
