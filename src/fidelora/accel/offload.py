"""Placement of model parts: on their device, or with hooks that move them there when called."""

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
    """Move parts to `device`, or add offloading hooks to them.

    With `sequential`, the hooks read the parts' original parameters. Adapters that are merged into
    these parameters later therefore take effect.

    Args:
        parts: parts in the order of use.

    Returns:
        hooks that move the parts back to the CPU; empty unless `offload` is `model`.
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
                # Tied parameters, such as T5's embeddings, are needed under each of their names.
                own = dict(part.named_parameters(remove_duplicate=False))
                cpu_offload(part, device, state_dict=own)
    return hooks
