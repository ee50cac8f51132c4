"""An adapter whose modules were all found in one base model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from fidelora.adapters.deltas import Delta
from fidelora.adapters.rounded_delta import RoundedDelta


@dataclass(frozen=True, eq=False)
class BoundAdapter:
    """An adapter whose modules were all found in one base model.

    Attributes:
        deltas: delta by name of its target, which may be a `VectorTarget`.
        alpha: see `Adapter.alpha`.
        word: word of an embedding; None for adapters of other kinds.
        vectors: vectors of an embedding, float32 [tokens, width] by text encoder.
        tensors_sha256: see `AdapterFile`.
        rounded_to: dtype to which `rounded` rounded the tensors; None for those of the file.
    """

    sha256: str
    deltas: Mapping[str, Delta]
    alpha: float | None = None
    word: str | None = None
    vectors: Mapping[str, Tensor] = field(default_factory=dict)
    tensors_sha256: str = ""
    rounded_to: torch.dtype | None = None

    @property
    def identity(self) -> str:
        """Text that identifies the file together with the alpha, word or rounding in use."""
        if self.word is not None:
            return f"{self.sha256}, word {self.word!r}"
        details = {"alpha": self.alpha, "rounded to": self.rounded_to}
        used = [f"{name} {value!r}" for name, value in details.items() if value is not None]
        return ", ".join([self.sha256, *used])

    def only(self, names: Collection[str]) -> BoundAdapter:
        """Return the same adapter with only the changes of these targets."""
        kept = {name: delta for name, delta in self.deltas.items() if name in names}
        return replace(self, deltas=kept)

    def rounded(self, dtype: torch.dtype) -> BoundAdapter:
        """Return the same adapter with its tensors cast to `dtype`."""
        deltas = {name: one.cast(dtype) for name, one in self.deltas.items()}
        return replace(self, deltas=deltas, rounded_to=dtype)

    def widened(self) -> BoundAdapter:
        """Return the same adapter with its tensors cast to float32, which merging needs."""
        deltas = {name: one.cast(torch.float32) for name, one in self.deltas.items()}
        return replace(self, deltas=deltas)

    def with_rounded_changes(self, dtype: torch.dtype) -> BoundAdapter:
        """Return the same adapter with each change rounded to `dtype` before it is merged."""
        deltas: dict[str, Delta] = {
            name: RoundedDelta.of(one, dtype) for name, one in self.deltas.items()
        }
        return replace(self, deltas=deltas)

    @cached_property
    def components(self) -> frozenset[str]:
        """Names of the parts of the base model that the adapter changes."""
        return frozenset((*(name.partition(".")[0] for name in self.deltas), *self.vectors))

    @cached_property
    def is_dora(self) -> bool:
        """True if the adapter is a DoRA of AI Toolkit, which the trainer never merges."""
        return any(delta.is_dora for delta in self.deltas.values())
