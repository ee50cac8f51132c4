"""Put the parts of a model on their device, or under hooks that move them there when they work."""

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
    """Put parts, in the order of their work, on `device`, or under offloading hooks.

    `sequential` keeps the numbers in the parameters that the parts had before, so weights that
    adapters are merged into take effect.

    Returns:
        the hooks that move a part back to the CPU.
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
