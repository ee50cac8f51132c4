"""Live path: forward hooks apply adapters at each call; the weights are not changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fidelora.adapters.bound import BoundAdapter
from fidelora.adapters.deltas import Delta, Module
from fidelora.adapters.targets import Target, Targets

CPU = torch.device("cpu")


@contextmanager
def live_adapters(
    targets: Targets, adapters: Sequence[tuple[BoundAdapter, float]], device: torch.device = CPU
) -> Iterator[None]:
    """Apply adapters to the base model until the block ends; multiplier 0 skips an adapter.

    On each module, deltas that change its weight (LoHa, LoKr, OFT, ...) are applied first, then
    those that change its output (LoRA, DoRA of AI Toolkit, factorised LoKr); within each group the
    order is that of `adapters`. Changes of vectors are not applied here: they are always merged.

    Args:
        adapters: bound adapters with their multipliers.
        device: device of the base model.
    """
    deltas: dict[str, list[tuple[Delta, float]]] = {}
    for bound, multiplier in adapters:
        if multiplier != 0:
            for name, delta in bound.deltas.items():
                if name in targets.by_name:
                    deltas.setdefault(name, []).append((delta.to(device), multiplier))
    with ExitStack() as stack:
        for name, module_deltas in deltas.items():
            target = targets.by_name[name]
            handle = target.module.register_forward_hook(_Hook(target, module_deltas))
            stack.callback(handle.remove)
        yield


class _Hook:
    """Forward hook that returns a module's output with the adapters applied."""

    def __init__(self, target: Target, deltas: Sequence[tuple[Delta, float]]) -> None:
        self._target, module = target, target.module
        self._on_weight = [(delta, m) for delta, m in deltas if not delta.changes_output(module)]
        self._on_output = [(delta, m) for delta, m in deltas if delta.changes_output(module)]

    def __call__(self, module: Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        (x,) = inputs
        if self._on_weight:
            output = self._with_changed_weight(module, x).to(x.dtype)
        for delta, multiplier in self._on_output:
            output = delta.live_output(
                module, x, output, multiplier, lambda: self._target.current_weight().to(x.device)
            )
        return output

    def _with_changed_weight(self, module: Module, x: Tensor) -> Tensor:
        weight = self._target.current_weight().to(x.device)
        for delta, multiplier in self._on_weight:
            weight = delta.live_weight(weight, multiplier)
        bias = None if self._target.bias is None else self._target.bias.to(x.device)
        if isinstance(module, nn.Conv2d):
            return functional.conv2d(
                x,
                weight,
                bias,
                stride=module.stride,
                padding=module.padding,
                dilation=module.dilation,
                groups=module.groups,
            )
        return functional.linear(x, weight, bias)
