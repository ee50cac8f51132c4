"""All randomness of an image: one CPU generator, seeded once, drawn from in a fixed order.

The order is part of the algorithm: first the initial latents, then whatever the sampler draws, step by step. The device of the
computation has no part in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_HALF = (torch.bfloat16, torch.float16)


class NoiseSource:
    """The random numbers of one image, or of several that are made side by side, each from its own generator.

    Args:
        seeds: of the generators, one for each image.
        noise: `modern` draws as the installed torch does (>= 2.12: float32 normals, rounded); `legacy` draws half precision
            as torch <= 2.11 did, from fewer random bits and with every step of the formula rounded. In float32 they are one.
    """

    def __init__(self, seeds: Sequence[int], noise: Literal["modern", "legacy"]) -> None:
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        self._legacy = noise == "legacy"

    def initial(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The first draw: standard normal numbers on the CPU, of this shape [1, ...] for each image, one image after the other."""
        with self.drawing():
            return torch.cat(
                [
                    torch.randn(tuple(shape), generator=generator, dtype=dtype)
                    for generator in self.generators
                ]
            )

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Within this block `torch.randn` draws in this source's way; samplers call it inside their step."""
        if self._legacy:
            with _LegacyRandn():
                yield
        else:
            yield


class _LegacyRandn(TorchFunctionMode):
    """Answers `torch.randn` calls for half-precision CPU noise from `legacy_randn`, all others as they are."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        generator = kwargs.get("generator")
        if (
            func is torch.randn
            and kwargs.get("dtype") in _HALF
            and generator is not None
            and generator.device.type == "cpu"
        ):
            return legacy_randn(args[0], generator, kwargs["dtype"])
        return func(*args, **kwargs)


def legacy_randn(shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Standard normal numbers in half precision as `torch.randn` of torch <= 2.11 draws them on the CPU, to the bit.

    torch then did Box-Muller in the half type itself (ATen `normal_fill`): blocks of 16 uniform numbers, the first 8 of which
    give radii and the other 8 angles; if the count is no multiple of 16, the last 16 numbers are drawn again. A uniform number
    has as many random bits as the type's significand (8 in bfloat16, 11 in float16), so there are few values, and the formula
    is a table of them. Checked against torch 2.9.1: equal in every bit.

    Args:
        shape: at least 16 numbers; smaller tensors were drawn in another way, and no image is that small.
    """
    count = math.prod(shape)
    assert count >= 16, "latents of the smallest image, 64x64 pixels, have 256 numbers"
    blocks = count // 16 * 16
    uniform = _uniform(count, generator, dtype)
    result = torch.empty(count, dtype=dtype)
    result[:blocks] = _box_muller(uniform[:blocks], dtype)
    if count % 16:
        result[-16:] = _box_muller(_uniform(16, generator, dtype), dtype)
    return result.view(tuple(shape))


def _uniform(count: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Uniform numbers as integers: each the low bits of one 32-bit draw."""
    draws = torch.empty(count, dtype=torch.int32).random_(generator=generator)
    return (draws & (_levels(dtype) - 1)).long()


def _levels(dtype: torch.dtype) -> int:
    return 2**8 if dtype == torch.bfloat16 else 2**11


def _box_muller(uniform: Tensor, dtype: torch.dtype) -> Tensor:
    radius, cosine, sine = _tables(dtype)
    block = uniform.view(-1, 2, 8)
    radii, angles = radius[block[:, 0]], block[:, 1]
    # torch adds the mean, 0, at the end, which makes 0 of -0.
    return torch.stack([radii * cosine[angles] + 0, radii * sine[angles] + 0], dim=1).flatten()


@lru_cache(maxsize=2)
def _tables(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """For each uniform value: the radius it gives, and the cosine and sine of the angle, every step rounded to `dtype`."""
    uniform = torch.arange(_levels(dtype), dtype=torch.float32).div(_levels(dtype)).to(dtype)
    radius = torch.sqrt(-2 * torch.log(1 - uniform))
    angle = (2.0 * math.pi * uniform.double()).to(torch.float32).to(dtype)
    return radius, torch.cos(angle), torch.sin(angle)
