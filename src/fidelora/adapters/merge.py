"""The merged path: adapters added into the base model's weights, and taken out again without a trace.

Every change of a weight starts from the base model's file, which stays mapped: that costs no memory of the process, and where the
system has the file in its cache, no time on the disk. Subtracting what was added would leave roundings behind (the trainer does
that, which is why its late previews drift); what is read again leaves none.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial

import torch
from torch import Tensor

from fidelora.accel.weight_protocols import AcceptsWeight
from fidelora.adapters.deltas import Delta, DoraDelta
from fidelora.adapters.targets import BoundAdapter, Target, Targets

Applied = tuple[tuple[str, float], ...]
"""What one weight holds: (identity, multiplier) of each adapter that touches it, in order; empty for the pristine weight."""

_PART_BYTES = 8 * 2**20
"""Of a weight that is merged at a time, in float32, with what is added to it: they stay in the cache meanwhile."""
_ROWS_TOGETHER = 16
"""Parts have multiples of so many rows: parts of a product that begin elsewhere are more often summed in another order."""

_UNKNOWN: Applied = (("not written, or half", 0.0),)


class MergedAdapters:
    """The adapters that are merged into one base model right now. The weights of a new one have no numbers before `apply`."""

    def __init__(self, targets: Targets) -> None:
        self._targets = targets
        self._scratch = _Scratch(targets)
        self._applied: dict[str, Applied] = dict.fromkeys(targets.by_name, _UNKNOWN)
        self._adapters: frozenset[str] = frozenset()

    @property
    def adapters(self) -> frozenset[str]:
        """Sha256 of each adapter that is merged into any weight."""
        return self._adapters

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

        assert wanted.keys() <= self._targets.by_name.keys(), (
            "an adapter that was bound to another model"
        )
        plans = {
            name: tuple((bound.identity, m) for bound, m in wanted.get(name, []))
            for name in self._targets.by_name
        }
        stale = [name for name, plan in plans.items() if self._applied.get(name, ()) != plan]
        self._forget(stale)
        for name in stale:
            self._write(
                self._targets.by_name[name],
                [(bound.deltas[name], m) for bound, m in wanted.get(name, [])],
            )
            if plans[name]:
                self._applied[name] = plans[name]
            else:
                del self._applied[name]
        self._adapters = frozenset(
            bound.sha256 for bound, multiplier in adapters if multiplier != 0
        )
        return len(stale)

    def _forget(self, stale: Sequence[str]) -> None:
        """Have weights known to be unknown: if writing is cut short (out of memory, an interrupt), they are written next time.

        Modules that have theirs in a form of their own give up its memory, all of them before the first one is written and in the
        order of writing. It is then one piece, and filled again from its beginning; of the pieces that single weights leave, the
        C library takes none for another weight as large, because it looks for more than it needs, to align it.
        """
        if stale:
            self._adapters = frozenset()
        self._applied |= dict.fromkeys(stale, _UNKNOWN)
        for name in stale:
            module = self._targets.by_name[name].module
            if isinstance(module, AcceptsWeight):
                module.release_weight()

    def _write(self, target: Target, deltas: Sequence[tuple[Delta, float]]) -> None:
        assert target.pristine is not None, "names and shapes alone cannot be merged into"
        if isinstance(target.module, AcceptsWeight):
            target.module.set_weight(partial(self._scratch.merged, target.pristine, deltas))
        else:
            merge_into(target.weight, target.pristine, deltas)


class _Scratch:
    """Memory for one weight after the other, on its way to a module that keeps it in a form of its own.

    It stays: what is written beside it would else leave a hole behind. It knows no modules, because these keep it.
    """

    def __init__(self, targets: Targets) -> None:
        taken = (
            target
            for target in targets.by_name.values()
            if isinstance(target.module, AcceptsWeight)
        )
        self._numbers = max((target.weight.numel() for target in taken), default=0)

    @cached_property
    def _bytes(self) -> Tensor:
        return torch.empty(self._numbers * torch.float32.itemsize, dtype=torch.uint8)

    @torch.no_grad()
    def merged(
        self, pristine: Tensor, deltas: Sequence[tuple[Delta, float]], dtype: torch.dtype
    ) -> Tensor:
        """What `merge_into` writes over a weight of `dtype`; lasts until another is asked for, and may be `pristine` itself."""
        if not deltas and pristine.dtype == dtype:
            return pristine
        weight = self._bytes[: pristine.numel() * dtype.itemsize].view(dtype).view(pristine.shape)
        merge_into(weight, pristine, deltas)
        return weight


@torch.no_grad()
def merge_into(weight: Tensor, pristine: Tensor, deltas: Sequence[tuple[Delta, float]]) -> None:
    """Write `pristine`, with each delta at its multiplier added in order, over `weight`.

    Args:
        weight: what is overwritten, in the dtype in which the base model was loaded.
        pristine: the same weight as the file has it; another dtype is cast first, as loading does it.
    """
    if not deltas:
        weight.copy_(pristine)
        return
    rows = max(1, _PART_BYTES // (4 * pristine[0].numel()) // _ROWS_TOGETHER) * _ROWS_TOGETHER
    if rows < len(weight) and all(
        delta.can_change_rows(rows, weight.device) for delta, _ in deltas
    ):
        for part in (slice(start, start + rows) for start in range(0, len(weight), rows)):
            _add(
                weight[part],
                pristine[part],
                [delta.change_rows(part, m, weight.device) for delta, m in deltas],
            )
    else:
        _add(weight, pristine, [_change(delta, pristine, m, weight) for delta, m in deltas])


def _change(delta: Delta, pristine: Tensor, multiplier: float, weight: Tensor) -> Tensor:
    if isinstance(delta, DoraDelta):  # the only one whose change depends on the weight
        return delta.change_of(
            pristine.to(weight.device, weight.dtype).to(torch.float32), multiplier
        )
    return delta.change(weight.shape, multiplier, weight.device)


def _add(weight: Tensor, pristine: Tensor, changes: Sequence[Tensor]) -> None:
    """Write `pristine` and the changes, added in their order, over `weight`."""
    merged = pristine.to(weight.device, weight.dtype).to(torch.float32)
    for number, change in enumerate(changes, start=1):
        # The last sum of a float32 weight goes where it belongs; a copy of it would cost as much as the sum.
        is_last = number == len(changes) and weight.dtype == torch.float32
        merged = torch.add(merged, change, out=weight if is_last else change)
    if merged is not weight:
        weight.copy_(merged)
