"""Merged path: adapters added into the base model's weights, and removed without rounding errors.

Every change of a weight starts from the base model's file, which stays mapped: this takes no memory
of the process, and no disk access while the file is in the system's cache. Subtracting what was
added would leave rounding errors behind (the trainer does that, so its late samples drift).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial

import torch
from torch import Tensor

from fidelora.accel.weight_protocols import AcceptsWeight
from fidelora.adapters.deltas import Delta
from fidelora.adapters.targets import BoundAdapter, Target, Targets

Applied = tuple[tuple[str, float], ...]
"""(identity, multiplier) of each adapter merged into one weight, in order; empty if pristine."""

_PART_BYTES = 8 * 2**20
"""Size in float32 of the part of a weight that is merged at a time: small enough to stay in the CPU
cache together with what is added to it."""
_ROW_MULTIPLE = 16
"""Parts have a multiple of this many rows; products of parts that begin at other rows are more
often summed in another order."""

_UNKNOWN: Applied = (("not written, or partly", 0.0),)


class MergedAdapters:
    """Adapters that are merged into one base model.

    The weights of a new base model are uninitialised before the first `apply`.
    """

    def __init__(self, targets: Targets) -> None:
        self._targets = targets
        self._scratch = _Scratch(targets)
        self._applied: dict[str, Applied] = dict.fromkeys(targets.by_name, _UNKNOWN)
        self._adapters: frozenset[str] = frozenset()

    @property
    def adapters(self) -> frozenset[str]:
        """Sha256 of each merged adapter."""
        return self._adapters

    @torch.no_grad()
    def apply(self, adapters: Sequence[tuple[BoundAdapter, float]]) -> int:
        """Merge exactly these adapters, in this order, writing only the weights that change.

        As in the trainer, each weight is computed in float32: the deltas are added in order, and
        the sum is cast once to the weight's dtype. Adapters with multiplier 0 are skipped.

        Returns:
            number of weights that were written.
        """
        wanted: dict[str, list[tuple[BoundAdapter, float]]] = {}
        for bound, multiplier in adapters:
            if multiplier != 0:
                for name in bound.deltas:
                    wanted.setdefault(name, []).append((bound, multiplier))

        assert wanted.keys() <= self._targets.by_name.keys(), (
            "the adapter was bound to another model"
        )
        plans = {
            name: tuple((bound.identity, m) for bound, m in wanted.get(name, []))
            for name in self._targets.by_name
        }
        stale = [name for name, plan in plans.items() if self._applied.get(name, ()) != plan]
        self._mark_unknown(stale)
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

    def _mark_unknown(self, stale: Sequence[str]) -> None:
        """Mark weights as unknown before they are written, so that `apply` writes them again if it
        is interrupted or runs out of memory.

        Modules with packed weights release their memory, all of them before the first one is
        written and in the order of writing, so that it becomes one free block that is filled again
        from its beginning. The C library does not reuse the gap of a single weight for one of the
        same size, because it asks for more, to align it.
        """
        if stale:
            self._adapters = frozenset()
        self._applied |= dict.fromkeys(stale, _UNKNOWN)
        for name in stale:
            module = self._targets.by_name[name].module
            if isinstance(module, AcceptsWeight):
                module.release_weight()

    def _write(self, target: Target, deltas: Sequence[tuple[Delta, float]]) -> None:
        assert target.pristine is not None, "these targets have only names and shapes"
        if isinstance(target.module, AcceptsWeight):
            target.module.set_weight(partial(self._scratch.merged, target.pristine, deltas))
        else:
            merge_into(target.weight, target.pristine, deltas)


class _Scratch:
    """Buffer for the merged weight of one module with packed weights at a time.

    It is allocated once and kept: freeing it would leave a gap between the packed weights. It must
    not refer to modules, because they hold a reference to it.
    """

    def __init__(self, targets: Targets) -> None:
        sizes = (
            target.weight.numel()
            for target in targets.by_name.values()
            if isinstance(target.module, AcceptsWeight)
        )
        self._max_numel = max(sizes, default=0)

    @cached_property
    def _bytes(self) -> Tensor:
        return torch.empty(self._max_numel * torch.float32.itemsize, dtype=torch.uint8)

    @torch.no_grad()
    def merged(
        self, pristine: Tensor, deltas: Sequence[tuple[Delta, float]], dtype: torch.dtype
    ) -> Tensor:
        """Return the merged weight in `dtype`.

        It is valid until the next call, and may be `pristine` itself.
        """
        if not deltas and pristine.dtype == dtype:
            return pristine
        weight = self._bytes[: pristine.numel() * dtype.itemsize].view(dtype).view(pristine.shape)
        merge_into(weight, pristine, deltas)
        return weight


@torch.no_grad()
def merge_into(weight: Tensor, pristine: Tensor, deltas: Sequence[tuple[Delta, float]]) -> None:
    """Overwrite `weight` with `pristine` plus each delta at its multiplier, in order.

    Args:
        weight: [out, in] or [out, in, kh, kw], in the dtype in which the base model was loaded.
        pristine: the same weight in the file's dtype; it is cast first, as in loading.
    """
    if not deltas:
        weight.copy_(pristine)
        return
    rows = max(1, _PART_BYTES // (4 * pristine[0].numel()) // _ROW_MULTIPLE) * _ROW_MULTIPLE
    if rows < len(weight) and all(
        delta.can_change_rows(rows, weight.device) for delta, _ in deltas
    ):
        for part in (slice(start, start + rows) for start in range(0, len(weight), rows)):
            _add(
                weight[part],
                _as_loaded(pristine[part], weight),
                [delta.change_rows(part, m, weight.device) for delta, m in deltas],
            )
    else:
        loaded = _as_loaded(pristine, weight)
        _add(weight, loaded, [delta.change(loaded, m) for delta, m in deltas])


def _as_loaded(pristine: Tensor, weight: Tensor) -> Tensor:
    """Return `pristine` rounded to the dtype of `weight`, in float32 on its device."""
    return pristine.to(weight.device, weight.dtype).to(torch.float32)


def _add(weight: Tensor, loaded: Tensor, changes: Sequence[Tensor]) -> None:
    """Overwrite `weight` with `loaded` and the changes, added in order."""
    merged = loaded
    for number, change in enumerate(changes, start=1):
        # The last sum of a float32 weight is written in place; a copy would cost as much again.
        is_last = number == len(changes) and weight.dtype == torch.float32
        merged = torch.add(merged, change, out=weight if is_last else change)
    if merged is not weight:
        weight.copy_(merged)
