"""Placement of model parts: on their device, or under hooks that move them there when called."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import UserCpuOffloadHook
from torch import nn

from fidelora.accel import Offload


def place_parts(
    parts: Iterable[nn.Module], device: torch.device, offload: Offload
) -> list[UserCpuOffloadHook]:
    """Put parts, given in the order of use, on `device`, or add offloading hooks to them.

    With `sequential`, the hooks read the parts' original parameters. Adapters that are merged into
    these later therefore take effect.

    Returns:
        hooks that move the parts back to the CPU (`model` only).
    """
    hooks: list[UserCpuOffloadHook] = []
    for part in parts:
        match offload:
            case "none":
                part.to(device)
            case "model":
                previous = hooks[-1] if hooks else None
                _, hook = cpu_offload_with_hook(part, device, prev_module_hook=previous)
                hooks.append(hook)
            case "sequential":
                cpu_offload(part, device, state_dict=dict(part.named_parameters()))
    return hooks
