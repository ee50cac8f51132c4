"""Devices of this machine and their default precision."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch

from fidelora.errors import DeviceError
from fidelora.recipe import Dtype

TORCH_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def resolve_device(name: str) -> torch.device:
    """Return a device by name: `auto` (the fastest), `cpu`, `cuda`, `cuda:N` or `mps`.

    Raises:
        DeviceError: this machine does not have the device.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", 0)
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(
            f"The device {name!r} is not supported; use auto, cpu, cuda, cuda:N or mps."
        ) from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise DeviceError(
                f"{name} was requested, but this machine or this build of torch has no CUDA; "
                "use --device cpu."
            )
        if (device.index or 0) >= torch.cuda.device_count():
            raise DeviceError(
                f"{name} was requested, but this machine has only {torch.cuda.device_count()} CUDA "
                "devices; use a lower number."
            )
        return torch.device("cuda", device.index or 0)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError(
            "mps was requested, but this machine or this build of torch has no Metal device; "
            "use --device cpu."
        )
    if device.type not in ("cpu", "mps"):
        raise DeviceError(
            f"The device {name!r} is not supported; use auto, cpu, cuda, cuda:N or mps."
        )
    return torch.device(device.type)


@cache
def processor_name() -> str:
    """Return the processor's name with vendor, family and model.

    On virtual machines, the name alone may not identify the processor. The vendor matters: even for
    the same instruction set, the matrix library uses different kernels on Intel and AMD processors.
    """
    linux = Path("/proc/cpuinfo")
    return (
        read_processor_name(linux) if linux.exists() else platform.processor() or platform.machine()
    )


def read_processor_name(information: Path) -> str:
    """Return the name of the first processor in a file like Linux's `/proc/cpuinfo`."""
    lines = information.read_text().split("\n\n", 1)[0].splitlines()
    fields = {
        name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)
    }
    known = [f"{words} {fields[name]}" for words, name in _DISTINGUISHING.items() if name in fields]
    details = ", ".join(known) or "details unknown"
    return f"{fields.get('model name', platform.machine())} ({details})"


_DISTINGUISHING = {"by": "vendor_id", "family": "cpu family", "model": "model"}
"""Labels in image records, and the fields of `/proc/cpuinfo` on x86 that they stand for."""


def instruction_set() -> str:
    """Return the instruction sets that torch's kernels use, such as `AVX512` or `AVX512, AMX`."""
    tiles = ", AMX" if torch.cpu._is_amx_tile_supported() else ""
    return torch.backends.cpu.get_cpu_capability() + tiles


def auto_dtype(device: torch.device) -> Dtype:
    """Return a device's default precision.

    CUDA: bfloat16 if the hardware supports it, else float16; mps: float16; CPU: float32.
    """
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"
    return "float16" if device.type == "mps" else "float32"
