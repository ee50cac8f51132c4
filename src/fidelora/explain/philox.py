"""Normal random numbers as CUDA devices draw them, computed on the CPU.

Programs that draw noise on the GPU, such as AUTOMATIC1111's web UI by default, get other numbers
from a seed than programs that draw it on the CPU.

Sources: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (2011) for Philox 4x32-10;
PyTorch, `aten/src/ATen/native/cuda/DistributionTemplates.h`, for the use of counters by
`torch.randn`; the documentation of cuRAND for the conversion to normal numbers (Box-Muller).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
"""Constants of the key schedule: the golden ratio and the square root of 3, as 32-bit fractions."""
_ROUNDS = 10
_MASK = np.uint64(0xFFFFFFFF)
_LOW = np.uint64(32)

_Words = NDArray[np.uint64]


def philox(counter: Sequence[_Words], key: tuple[int, int]) -> list[_Words]:
    """Return four 32-bit random words for each counter.

    Args:
        counter: four arrays of 32-bit words, the lowest word first.
        key: two 32-bit words, the lower one first.
    """
    words = list(counter)
    for round_ in range(_ROUNDS):
        keys = [
            np.uint64((one + round_ * weyl) & 0xFFFFFFFF)
            for one, weyl in zip(key, _WEYL, strict=True)
        ]
        first = words[0] * np.uint64(_MULTIPLIERS[0])
        second = words[2] * np.uint64(_MULTIPLIERS[1])
        words = [
            (second >> _LOW) ^ words[1] ^ keys[0],
            second & _MASK,
            (first >> _LOW) ^ words[3] ^ keys[1],
            first & _MASK,
        ]
    return words


class PhiloxGenerator:
    """Generator with the numbers of `torch.Generator("cuda")`.

    The numbers are right for tensors with at most as many values as the device runs threads at a
    time. On current devices these are more than 100,000, enough for the latents of an image of
    1024x1024 pixels.

    Args:
        seed: 0..2**64-1.
    """

    def __init__(self, seed: int) -> None:
        self._key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
        self._offset = 0

    def randn(self, shape: Sequence[int]) -> Tensor:
        """Return the next standard normal numbers, float32."""
        count = math.prod(shape)
        zeros = np.zeros(count, np.uint64)
        counter = [zeros + np.uint64(self._offset), zeros, np.arange(count, dtype=np.uint64), zeros]
        self._offset += 1
        # Each thread draws four words and converts them to four normal numbers, of which
        # `torch.randn` uses the first, unless a thread has to fill several values.
        radius, angle, *_ = philox(counter, self._key)
        uniform = _scaled(radius, 1.0)
        normal = np.sqrt(np.float32(-2) * np.log(uniform)) * np.sin(_scaled(angle, 2 * math.pi))
        return torch.from_numpy(normal.astype(np.float32).reshape(tuple(shape)))


def _scaled(words: _Words, range_: float) -> NDArray[np.float32]:
    """Map 32-bit words to (0, range], with the roundings of cuRAND's float32 conversion."""
    unit = np.float32(2.0**-32 * range_)
    return words.astype(np.float32) * unit + unit / np.float32(2)
