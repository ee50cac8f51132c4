"""Verdict on the samples of a training run's step, and the evidence for it."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from enum import StrEnum

from fidelora.training.changes import Change
from fidelora.training.consistency import DirectionTest, SizeTest

_CLEAR = 1e-6  # a mismatch with a smaller p value needs no further draws

MAX_DETECTABLE = 2.0
"""If a change of this many times the tried size would not be detected, the step is undecided."""


class Verdict(StrEnum):
    """Result of checking a sample, from best to worst; the values are those of the JSON report."""

    IDENTICAL = "identical"
    ROUNDING = "rounding"
    UNDECIDED = "undecided"
    MISMATCH = "mismatch"


@dataclass(frozen=True)
class TriedChange:
    """A change that was tried on the samples of a step, and the result of its test."""

    change: Change
    test: DirectionTest

    @property
    def detectable(self) -> float | None:
        """Smallest change of the setting that would have been detected; None without a size."""
        return None if self.change.size is None else self.test.detectable * abs(self.change.size)

    @property
    def fix(self) -> str:
        """Instruction to correct the setting, with its estimated value."""
        estimate = self.change.value + self.test.amount * (self.change.size or 0)
        return self.change.fix.format(value=f"{estimate:.3g}")


@dataclass(frozen=True)
class Evidence:
    """Evidence for the verdict on the samples of a step.

    Attributes:
        verdict: verdict of the samples that are not identical.
        lost: information that was lost, as clauses.
        noise: mean difference of the draws in levels, by index of the sample.
        size: result of comparing the sizes of the differences.
        tried: changed settings that were tried; empty if the sizes already show a mismatch.
        found: the change with which the samples were probably made; None if none was detected.
    """

    verdict: Verdict
    lost: tuple[str, ...]
    noise: dict[int, float]
    size: SizeTest
    tried: tuple[TriedChange, ...] = ()
    found: TriedChange | None = None

    @property
    def is_clear(self) -> bool:
        """True if a mismatch needs no further draws."""
        found = math.inf if self.found is None else self.found.test.p_value
        return min(self.size.p_value, found) < _CLEAR

    @property
    def reason(self) -> str:
        """The evidence as sentences."""
        size = (
            f"The samples differ {self.size.ratio:.2f} times as much as images with random values "
            f"in place of the lost information (p = {self.size.p_value:.2g})"
        )
        if self.found is not None:
            change = f"{self.found.test.amount:.2f} times the effect of a changed setting"
            return f"{size}, and contain {change} (p = {self.found.test.p_value:.1g})."
        return f"{size}. {self._power}".strip()

    @property
    def _power(self) -> str:
        seen: list[str] = []
        unseen: list[str] = []
        values = Counter(one.change.cause for one in self.tried)
        for one in self.tried:
            name = one.change.cause.replace("_", " ")
            if values[one.change.cause] > 1:
                name += f" {one.change.value:g}"
            if one.change.cause == "dtype":
                continue  # its effect is rounding, like that of the draws
            if one.detectable is None:
                (seen if one.test.detectable < 1 else unseen).append(f"another {name}")
            elif one.test.detectable <= MAX_DETECTABLE:
                seen.append(f"{name} by {one.detectable:.2g}")
            else:
                unseen.append(f"{name} by {MAX_DETECTABLE * abs(one.change.size or 0):g}")
        sentences = []
        if seen:
            sentences.append(f"These changes would have been detected: {', '.join(seen)}.")
        if unseen:
            sentences.append(f"These would not have been detected: {', '.join(unseen)}.")
        return " ".join(sentences)
