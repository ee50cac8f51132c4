"""Search for the settings with which a simulated image comes nearest to a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any

from fidelora.errors import BaseModelError, NumericsError, RecipeError
from fidelora.explain.picture import Picture
from fidelora.explain.simulation import Simulation, Simulator

Changes = Mapping[str, Any]
"""New values of fields of `Simulation`, by name."""

_MIN_IMPROVEMENT = 0.05  # levels; smaller ones are rounding
_MIN_SHARE = 0.08
"""Share of the distance by which a change must reduce it. While a setting with a large effect is
wrong, other changes alter the distance at random by a few percent."""
_ENOUGH = 0.05  # levels; below it, distances do not show which setting is right
_SCREENING_STEPS = (4, 8)
"""Smallest and largest number of steps for ranking options; a third of the steps in between."""
_MAX_UNSCREENED = 4
"""Largest number of options whose images are made with all steps. If there are more options, they
are ranked at few steps, and the best ones are made."""
_ROUNDS = 3
_MAX_PAIRS = 16  # images; `_ROUNDS` of single changes cost about as many
_JOINT_SHARE = 0.7  # of the limit on the work; the rest is for the other settings


@dataclass(frozen=True)
class Axis:
    """A setting with the values that are tried.

    Attributes:
        cause: one of `differences.CAUSES`.
        options: the values, as changes of fields.
        is_ordered: True if the options are numbers in order, of which only neighbours of the best
            one are tried.
    """

    cause: str
    options: Sequence[Changes]
    is_ordered: bool = False


class Search:
    """Coordinate descent over axes, with a limit on the work.

    Args:
        max_evaluations: number of evaluations of the denoiser after which no new image is made.
    """

    def __init__(
        self,
        simulator: Simulator,
        picture: Picture,
        max_evaluations: int,
    ) -> None:
        self._simulator = simulator
        self._picture = picture
        self._max_evaluations = max_evaluations

    @property
    def is_exhausted(self) -> bool:
        """True if the limit is reached."""
        return self._simulator.evaluations >= self._max_evaluations

    def distance(self, simulation: Simulation) -> float:
        """Return the mean difference from the picture in levels; infinite if it cannot be made."""
        try:
            return self._picture.distance(self._simulator.image(simulation))
        except (RecipeError, BaseModelError, NumericsError, ZeroDivisionError):
            return math.inf

    def joint(self, start: Simulation, pairs: Sequence[tuple[Axis, Axis]]) -> Simulation:
        """Return the best combination of noise and sampler.

        Both are tried together: with the wrong sampler, the right noise does not come near, and
        with the wrong noise, the right sampler does not either. The samplers that draw no random
        numbers in their steps are similar, so the first of them finds the initial noise for all of
        them, even at few steps. The others are tried with each noise and all steps.

        Args:
            pairs: axes of noise and sampler, one pair for each program.
        """
        fixed: list[Simulation] = []
        drawing: list[Simulation] = []
        for noises, samplers in pairs:
            for sampler, noise in product(samplers.options, noises.options):
                one = replace(start, **sampler, **noise)
                if one.draws_in_steps:
                    drawing.append(one)
                else:
                    fixed.append(replace(one, step_noise="continued"))
        fixed, drawing = list(dict.fromkeys(fixed)), list(dict.fromkeys(drawing))
        if fixed:
            probes: dict[object, Simulation] = {}
            for one in fixed:
                probes.setdefault(one.device, one)
            device = self._screened(list(probes.values()))[0].device
            fixed = self._screened([one for one in fixed if one.device == device])
        tried = [start, *fixed]
        for one in drawing:
            if self._simulator.evaluations >= _JOINT_SHARE * self._max_evaluations:
                break
            tried.append(one)
            if self.distance(one) <= _ENOUGH:
                break
        return min(tried, key=self.distance)

    def descend(self, start: Simulation, axes: Sequence[Axis]) -> Simulation:
        """Return the best simulation after changing one axis at a time, until nothing helps."""
        best, distance = start, self.distance(start)
        for _ in range(_ROUNDS):
            before = distance
            for axis in axes:
                if distance <= _ENOUGH or self.is_exhausted:
                    return best
                best, distance = self._along(axis, best, distance)
            if distance == before:
                break
        return best

    def best_pair(self, start: Simulation, axes: Sequence[Axis]) -> Simulation:
        """Return the best simulation after changing two settings together.

        For pictures that `descend` does not explain: two settings can cancel, so that neither of
        them comes nearer alone. Pairs are tried in the order of the axes, up to `_MAX_PAIRS`.

        Args:
            axes: the likeliest settings first.

        Returns:
            `start` if no pair comes nearer.
        """
        best, distance, tried = start, self.distance(start), {start}
        for first, second in combinations(axes, 2):
            for changes in product(first.options, second.options):
                pair = replace(replace(start, **changes[0]), **changes[1])
                if distance <= _ENOUGH or self.is_exhausted or len(tried) > _MAX_PAIRS:
                    return best
                if pair in tried:
                    continue
                tried.add(pair)
                found = self.distance(pair)
                if _is_better(found, distance):
                    best, distance = pair, found
        return best

    def _along(self, axis: Axis, best: Simulation, distance: float) -> tuple[Simulation, float]:
        if axis.is_ordered:
            return self._along_numbers(axis, best, distance)
        others = [replace(best, **changes) for changes in axis.options]
        others = [one for one in dict.fromkeys(others) if one != best]
        if len(others) > _MAX_UNSCREENED:
            others = self._screened(others)
        for other in others:
            if self.is_exhausted:
                break
            found = self.distance(other)
            if _is_better(found, distance):
                best, distance = other, found
        return best, distance

    def _along_numbers(
        self, axis: Axis, best: Simulation, distance: float
    ) -> tuple[Simulation, float]:
        """Move to the next smaller and larger values as long as that helps."""
        values = [replace(best, **changes) for changes in axis.options]
        own = replace(best)
        (name,) = axis.options[0]
        values = sorted({*values, own}, key=lambda one: float(getattr(one, name)))
        start = values.index(own)
        for direction in (1, -1):
            position = start + direction
            while 0 <= position < len(values) and not self.is_exhausted:
                found = self.distance(values[position])
                if not _is_better(found, distance):
                    break
                best, distance = values[position], found
                position += direction
            if best != own:
                break
        return best, distance

    def _screened(self, simulations: list[Simulation]) -> list[Simulation]:
        """Return the simulations that are nearest to the picture at few steps.

        Samplers that draw random numbers in their steps are made with all steps, because fewer
        steps would use other numbers at each noise level.
        """
        distances = []
        for number, simulation in enumerate(simulations):
            if self.is_exhausted:
                break
            quick = simulation
            few = min(max(simulation.steps // 3, _SCREENING_STEPS[0]), _SCREENING_STEPS[1])
            if not simulation.draws_in_steps and simulation.steps > few:
                quick = replace(simulation, steps=few)
            distances.append((self.distance(quick), number))
        nearest = sorted(distances)[:_MAX_UNSCREENED]
        return [simulations[number] for _, number in nearest] or simulations[:1]


def _is_better(found: float, distance: float) -> bool:
    return found < distance - max(_MIN_IMPROVEMENT, _MIN_SHARE * distance)
