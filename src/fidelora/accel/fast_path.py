"""Selection of the fast path for a model family and a device."""

from __future__ import annotations

from enum import Enum

import torch

from fidelora.accel import Offload
from fidelora.errors import DeviceError
from fidelora.families.spec import Family


class FastPath(Enum):
    """Implementations of `fidelity="fast"`."""

    PACKED = "packed"
    COMPILED = "compiled"


def fast_path(family: Family, device: torch.device, offload: Offload) -> FastPath:
    """Return the fast path of this family on this device.

    Raises:
        DeviceError: the device or the family has no fast path, or offloading is on.
    """
    if offload != "none":
        raise DeviceError(
            "Fidelity fast keeps the whole model on the device and does not support offloading; "
            f"use offload none, or fidelity exact with offload {offload}."
        )
    path = _path_for(device)
    if path.value not in family.accelerations:
        raise DeviceError(
            f"Fidelity fast on {device.type} is not implemented for {family.title}; "
            "use fidelity exact."
        )
    return path


def _path_for(device: torch.device) -> FastPath:
    if device.type == "cpu":
        if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            raise DeviceError(
                "This build of torch has no oneDNN, which fidelity fast needs on the CPU; "
                "use fidelity exact."
            )
        return FastPath.PACKED
    if device.type == "cuda":
        return FastPath.COMPILED
    raise DeviceError(f"Fidelity fast is not supported on {device.type}; use fidelity exact.")
