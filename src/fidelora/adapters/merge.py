"""The merged path: adapters added into the base model's weights, and taken out again without a trace.

A weight that an adapter touches is copied before the first touch, and every later change starts from that copy. Subtracting what
was added would leave roundings behind (the trainer does that, which is why its late previews drift); a restored copy leaves none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fidelora.adapters.deltas import Delta
from fidelora.adapters.targets import BoundAdapter, Target, Targets

Applied = tuple[tuple[str, float], ...]
"""What one weight holds: (sha256, multiplier) of each adapter that touches it, in order; empty for the pristine weight."""

_UNKNOWN: Applied = (("half written", 0.0),)


class MergedAdapters:
    """The adapters that are merged into one base model right now."""

    def __init__(self, targets: Targets) -> None:
        self._targets = targets
        self._pristine: dict[str, Tensor] = {}
        self._applied: dict[str, Applied] = {}

    @torch.no_grad()
    def apply(self, adapters: Sequence[tuple[BoundAdapter, float]]) -> int:
        """Make the base model hold exactly these adapters, in this order; only weights that differ from that are written.

        Per weight and as the trainer does it: float32, the deltas in order, one cast to the weight's dtype at the end. An
        adapter with multiplier 0 is not applied.

        Returns:
            how many weights were written.
        """
        wanted: dict[str, list[tuple[BoundAdapter, float]]] = {}
        for bound, multiplier in adapters:
            if multiplier != 0:
                for name in bound.deltas:
                    wanted.setdefault(name, []).append((bound, multiplier))

        written = 0
        for name in wanted.keys() | self._applied.keys():
            contributions = wanted.get(name, [])
            plan: Applied = tuple((bound.sha256, multiplier) for bound, multiplier in contributions)
            if self._applied.get(name, ()) != plan:
                self._write(self._targets.by_name[name], plan, [(bound.deltas[name], m) for bound, m in contributions])
                written += 1
        return written

    def _write(self, target: Target, plan: Applied, deltas: Sequence[tuple[Delta, float]]) -> None:
        weight = target.weight
        pristine = self._pristine.get(target.name)
        if pristine is None:
            pristine = self._pristine[target.name] = weight.detach().clone()
        pristine = pristine.to(weight.device)
        if deltas:
            merged = pristine.to(torch.float32)
            for delta, multiplier in deltas:
                merged = delta.add_to(merged, multiplier)
            result = merged.to(weight.dtype)
        else:
            result = pristine
        # If the copy is cut short (out of memory, an interrupt), the weight is known to be unknown, and written next time.
        self._applied[target.name] = _UNKNOWN
        weight.copy_(result)
        if plan:
            self._applied[target.name] = plan
        else:
            del self._applied[target.name]
