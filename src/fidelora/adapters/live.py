"""The live path: adapters beside the base model's modules, whose weights stay as they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fidelora.adapters.deltas import Delta, DoraDelta, LoraDelta, Module, WeightDelta
from fidelora.adapters.targets import BoundAdapter, Target, Targets

CPU = torch.device("cpu")


@contextmanager
def live_adapters(
    targets: Targets, adapters: Sequence[tuple[BoundAdapter, float]], device: torch.device = CPU
) -> Iterator[None]:
    """Run the base model with these adapters beside it until the block ends. Multiplier 0 skips an adapter.

    On one module, deltas that change its weight (LoKr, LoHa) come first and those that run beside it (LoRA) after them; within
    each kind the order is that of `adapters`.

    Args:
        device: where the base model computes.
    """
    deltas: dict[str, list[tuple[Delta, float]]] = {}
    for bound, multiplier in adapters:
        if multiplier != 0:
            for name, delta in bound.deltas.items():
                deltas.setdefault(name, []).append((delta.to(device), multiplier))
    with ExitStack() as stack:
        for name, of_module in deltas.items():
            target = targets.by_name[name]
            handle = target.module.register_forward_hook(_Hook(target, of_module))
            stack.callback(handle.remove)
        yield


class _Hook:
    """Replaces a module's output by the output with its adapters."""

    def __init__(self, target: Target, deltas: Sequence[tuple[Delta, float]]) -> None:
        self._target = target
        self._weight_deltas = [(delta, m) for delta, m in deltas if isinstance(delta, WeightDelta)]
        self._loras = [(delta, m) for delta, m in deltas if isinstance(delta, LoraDelta)]

    def __call__(self, module: Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        (x,) = inputs
        if self._weight_deltas:
            output = self._with_changed_weight(module, x).to(x.dtype)
        for lora, multiplier in self._loras:
            # The trainer's order: float32 up to the multiplier, then one cast to the output's dtype, then the sum.
            beside = lora.beside(module, x, multiplier).to(output.dtype)
            if isinstance(lora, DoraDelta):
                beside = beside + lora.stretched(
                    self._target.numbers().to(x.device), x, multiplier
                ).to(output.dtype)
            output = output + beside
        return output

    def _with_changed_weight(self, module: Module, x: Tensor) -> Tensor:
        weight = self._target.numbers().to(x.device)
        for delta, multiplier in self._weight_deltas:
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
