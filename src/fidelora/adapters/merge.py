"""Merged path: adapters are added to the base model's weights, and removed without rounding errors.

Whenever a weight changes, it is computed again from the base model's file. The file stays mapped.
The mapping takes no memory of the process, and the disk is read only if the file is not in the page
cache. Subtracting the old adapters instead would leave rounding errors.

The trainer does subtract, so its base model drifts with each round of samples. `apply` computes the
drifted weights if it gets the adapters of these rounds (`history`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial

import torch
from torch import Tensor

from fidelora.accel.weight_protocols import AcceptsWeight
from fidelora.adapters.bound import BoundAdapter
from fidelora.adapters.deltas import Delta
from fidelora.adapters.targets import Target, Targets, VectorTarget

Group = Sequence[tuple[Delta, float]]
"""Deltas with multipliers, which are summed in float32 before one cast to the weight's dtype."""

Applied = tuple[tuple[tuple[str, float], ...], ...]
"""(identity, multiplier) of each adapter merged into one weight, by group, in order."""

_PART_BYTES = 8 * 2**20
"""Size in float32 of the rows of a weight that are merged at a time: small enough to stay in the
CPU cache together with the changes that are added to them."""
_ROW_MULTIPLE = 16
"""The number of rows merged at a time is a multiple of this. With other numbers, the product of a
few rows differs more often from the same rows of the whole product, in the last bits."""

_UNKNOWN: Applied = ((("not written, or partly", 0.0),),)
"""State of a weight that is not written, or only in part; `apply` always writes it."""


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
    def apply(
        self,
        adapters: Sequence[tuple[BoundAdapter, float]],
        history: Sequence[tuple[BoundAdapter, float]] = (),
        training: Sequence[tuple[BoundAdapter, float]] = (),
    ) -> int:
        """Merge exactly these adapters in this order, writing only weights that change.

        As in the trainer, each weight is computed in float32: the deltas are added in order, and
        the sum is cast once to the weight's dtype. Adapters with multiplier 0 are skipped.

        Args:
            history: adapters that were merged and subtracted before, one after the other. As in the
                trainer, each adapter is merged with its multiplier, subtracted with the absolute
                value of the multiplier, and each of the two results is cast to the weight's dtype.
            training: adapters that were merged before all others and stay merged; the result is
                cast to the weight's dtype.

        Returns:
            number of weights and vectors that were written.
        """
        groups = [list(training)] if training else []
        groups += [
            [(bound, m)] for bound, multiplier in history for m in (multiplier, -abs(multiplier))
        ]
        wanted: dict[str, list[list[tuple[BoundAdapter, float]]]] = {}
        for group in (*groups, adapters):
            by_name: dict[str, list[tuple[BoundAdapter, float]]] = {}
            for bound, multiplier in group:
                if multiplier != 0:
                    for name in bound.deltas:
                        by_name.setdefault(name, []).append((bound, multiplier))
            for name, merged in by_name.items():
                wanted.setdefault(name, []).append(merged)

        targets, vectors = self._targets.by_name, self._targets.vectors
        assert wanted.keys() <= targets.keys() | vectors.keys(), (
            "the adapter was bound to another model"
        )
        plans: dict[str, Applied] = {
            name: tuple(
                tuple((bound.identity, m) for bound, m in group) for group in wanted.get(name, [])
            )
            # Few adapters change vectors, and base models have thousands of them.
            for name in (*targets, *vectors.keys() & (wanted.keys() | self._applied.keys()))
        }
        changed = [name for name, plan in plans.items() if self._applied.get(name, ()) != plan]
        stale_vectors = [name for name in changed if name in vectors]
        # Some modules pack their weight together with their bias. If only the bias changes, the
        # weight is written again, too.
        with_bias = {vectors[name].module for name in stale_vectors}
        stale = [
            name
            for name, target in targets.items()
            if self._applied.get(name, ()) != plans[name]
            or (name in with_bias and isinstance(target.module, AcceptsWeight))
        ]
        self._mark_unknown(stale, stale_vectors)
        for name in (*stale_vectors, *stale):
            groups_of_target = [
                [(bound.deltas[name], m) for bound, m in group] for group in wanted.get(name, [])
            ]
            self._write(vectors.get(name) or targets[name], groups_of_target)
            if plans[name]:
                self._applied[name] = plans[name]
            else:
                del self._applied[name]
        self._adapters = frozenset(
            bound.sha256 for bound, multiplier in adapters if multiplier != 0
        )
        return len(stale) + len(stale_vectors)

    def _mark_unknown(self, stale: Sequence[str], stale_vectors: Sequence[str]) -> None:
        """Mark weights and vectors as unknown before they are written.

        If `apply` is interrupted or runs out of memory, its next call then writes them again.

        Modules with packed weights release their memory here: all of them before the first weight
        is written, in the order of writing. The memory then becomes one free block, which is filled
        again from its beginning. A gap of only one weight would not be reused for a weight of the
        same size, because the allocation is a little larger to allow for alignment.
        """
        if stale or stale_vectors:
            self._adapters = frozenset()
        self._applied |= dict.fromkeys((*stale, *stale_vectors), _UNKNOWN)
        for name in stale:
            module = self._targets.by_name[name].module
            if isinstance(module, AcceptsWeight):
                module.release_weight()

    def _write(self, target: Target | VectorTarget, groups: Sequence[Group]) -> None:
        assert target.pristine is not None, "these targets have only names and shapes"
        if isinstance(target, Target) and isinstance(target.module, AcceptsWeight):
            target.module.set_weight(partial(self._scratch.merged, target.pristine, groups))
        else:
            merge_into(target.weight, target.pristine, groups)


class _Scratch:
    """Reusable buffer for the merged weight of one packed module at a time.

    The buffer is allocated once and kept, because freeing it would leave a gap between the packed
    weights. This class must not refer to modules: they refer to it, so that would form a cycle.
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
    def merged(self, pristine: Tensor, groups: Sequence[Group], dtype: torch.dtype) -> Tensor:
        """Return the merged weight in `dtype`: `pristine` itself or the buffer.

        The result is valid until the next call.
        """
        if not groups and pristine.dtype == dtype:
            return pristine
        weight = self._bytes[: pristine.numel() * dtype.itemsize].view(dtype).view(pristine.shape)
        merge_into(weight, pristine, groups)
        return weight


@torch.no_grad()
def merge_into(weight: Tensor, pristine: Tensor, groups: Sequence[Group]) -> None:
    """Overwrite `weight` with `pristine` plus each delta at its multiplier, in order.

    The sum is cast to the dtype of `weight` after each group.

    Args:
        weight: [out, in] or [out, in, kh, kw], in the dtype in which the base model was loaded.
        pristine: the same weight in the file's dtype; it is first cast to the dtype of `weight`, as
            when the model is loaded.
    """
    if not groups:
        weight.copy_(pristine)
        return
    rows = max(1, _PART_BYTES // (4 * pristine[0].numel()) // _ROW_MULTIPLE) * _ROW_MULTIPLE
    if rows < len(weight) and all(
        delta.can_change_rows(rows, weight.device) for group in groups for delta, _ in group
    ):
        for part in (slice(start, start + rows) for start in range(0, len(weight), rows)):
            source = pristine[part]
            for group in groups:
                merged = _as_loaded(source, weight)
                for number, (delta, m) in enumerate(group, start=1):
                    change = delta.change_rows(part, m, weight.device)
                    merged = _add(merged, change, weight[part], is_last=number == len(group))
                source = _written(weight[part], merged)
    else:
        source = pristine
        for group in groups:
            loaded = _as_loaded(source, weight)
            merged = loaded
            for number, (delta, m) in enumerate(group, start=1):
                change = delta.change(merged if delta.uses_weight else loaded, m)
                merged = _add(merged, change, weight, is_last=number == len(group))
            source = _written(weight, merged)


def _as_loaded(pristine: Tensor, weight: Tensor) -> Tensor:
    """Return `pristine` rounded to the dtype of `weight`, as float32 on the device of `weight`."""
    return pristine.to(weight.device, weight.dtype).to(torch.float32)


def _add(merged: Tensor, change: Tensor, weight: Tensor, *, is_last: bool) -> Tensor:
    """Return `merged + change`, computed in place.

    The sum is written to `change`; for the last delta of a group, to `weight` if it is float32.
    """
    return torch.add(
        merged, change, out=weight if is_last and weight.dtype == torch.float32 else change
    )


def _written(weight: Tensor, merged: Tensor) -> Tensor:
    """Write `merged` to `weight` unless it was written directly, and return `weight`."""
    if merged.data_ptr() != weight.data_ptr():
        weight.copy_(merged)
    return weight
