"""Random numbers of the samplers with `sde` in their name: increments of a Brownian path.

The path over all noise levels depends on the seed only, not on the levels of the steps. Its value
at the end is drawn first, then that in the middle, given both ends (a Brownian bridge), then those
in the middle of both halves, and so on, until a requested level is reached. Each interval has its
own seed, which numpy derives from the image's seed and from the position of the interval.

Source of the order and the seeds: https://github.com/google-research/torchsde, `BrownianTree` in
version 0.2.6, which k-diffusion uses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

_DIGITS = 6  # decimal places to which levels are rounded
_POOL_SIZE = 24  # words of entropy of numpy's SeedSequence


class BrownianPath:
    """A path from the lowest to the highest level.

    Args:
        randn: returns standard normal numbers in the shape of the latents for a seed.
        seed: seed of the image.
        low, high: smallest sigma above zero, and largest sigma.
    """

    def __init__(self, randn: Callable[[int], Tensor], seed: int, low: float, high: float) -> None:
        self._randn, self._seed = randn, seed
        self._low, self._high = round(low, _DIGITS), round(high, _DIGITS)
        (first,) = np.random.SeedSequence(seed, pool_size=_POOL_SIZE).generate_state(1)
        self._whole = randn(int(first)) * math.sqrt(high - low)
        self._known: dict[tuple[int, int], Tensor] = {}

    def noise(self, sigma: float, following: float) -> Tensor:
        """Return the increment from a sigma down to the next, scaled to unit variance.

        Zeros if both are equal when rounded. Sigmas outside of the path count as its ends.
        """
        low, high = (
            min(max(round(level, _DIGITS), self._low), self._high) for level in (following, sigma)
        )
        if low >= high:  # equal after rounding
            return torch.zeros_like(self._whole)
        pieces = list(self._pieces(self._whole, self._low, self._high, 0, 0, low, high))
        total = pieces[0]
        for piece in pieces[1:]:
            total = total + piece
        return -total / math.sqrt(sigma - following)

    def _pieces(
        self, change: Tensor, start: float, end: float, number: int, depth: int,
        low: float, high: float,
    ) -> Iterator[Tensor]:  # fmt: skip
        """Yield the increments of the intervals that make up [low, high], in order.

        Args:
            change: increment over the interval [start, end].
            number, depth: position of the interval among those of the same depth, and its depth.
        """
        if (low, high) == (start, end):
            yield change
            return
        middle = round((start + end) / 2, _DIGITS)
        left = self._left(change, start, middle, end, number, depth)
        if low < middle:
            yield from self._pieces(
                left, start, middle, 2 * number, depth + 1, low, min(high, middle)
            )
        if high > middle:
            yield from self._pieces(
                change - left, middle, end, 2 * number + 1, depth + 1, max(low, middle), high
            )

    def _left(
        self, change: Tensor, start: float, middle: float, end: float, number: int, depth: int
    ) -> Tensor:
        """Return the increment over [start, middle], given that over [start, end]."""
        if (number, depth) not in self._known:
            seeds = np.random.SeedSequence(
                self._seed, spawn_key=(number, depth), pool_size=_POOL_SIZE
            )
            noise = self._randn(int(seeds.generate_state(1)[0]))
            share = 1 / (end - start)
            mean = (middle - start) * change * share
            deviation = math.sqrt((middle - start) * (end - middle) * share)
            self._known[number, depth] = mean + deviation * noise
        return self._known[number, depth]
