"""Random numbers of an image: one CPU generator, seeded once and used in a fixed order.

The order is part of the algorithm: the initial latents first, then the sampler's draws, step by
step. The numbers do not depend on the device that computes the image.
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
    """Random numbers of one image or of a batch; each image has its own generator.

    Args:
        seeds: one seed per image.
        noise: `modern` draws like the installed torch (>= 2.12), which draws float32 normal numbers
            and rounds them. `legacy` draws half precision like torch <= 2.11, which used fewer
            random bits and rounded every step of the formula. In float32, both give the same
            numbers.
    """

    def __init__(self, seeds: Sequence[int], noise: Literal["modern", "legacy"]) -> None:
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        self._legacy = noise == "legacy"

    def initial(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return the first draw: standard normal numbers [images, ...] on the CPU, image by image.

        Args:
            shape: shape of one image's latents, [1, ...].
        """
        with self.drawing():
            return torch.cat(
                [
                    torch.randn(tuple(shape), generator=generator, dtype=dtype)
                    for generator in self.generators
                ]
            )

    @staticmethod
    def jittered(latents: Tensor, seed: int, dtype: torch.dtype) -> Tensor:
        """Return `latents` with random relative errors of at most half the epsilon of `dtype`.

        This changes all later rounding errors but not their typical size, as would a processor that
        rounds differently.

        Args:
            dtype: the half-precision dtype in which the denoiser computes. The latents of some
                families are float32 nevertheless.
        """
        generator = torch.Generator().manual_seed(seed)
        random = torch.rand(latents.shape, generator=generator) - 0.5
        factor = 1 + random * torch.finfo(dtype).eps
        return (latents.float() * factor).to(latents.dtype)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Make `torch.randn` draw this source's kind of noise until the block ends.

        diffusers' schedulers call `torch.randn` in their steps.
        """
        if self._legacy:
            with _LegacyRandn():
                yield
        else:
            yield


class _LegacyRandn(TorchFunctionMode):
    """Redirects `torch.randn` to `legacy_randn` if it draws half precision from a CPU generator."""

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
    """Return the normal numbers that `torch.randn` of torch <= 2.11 draws in half precision.

    These versions computed Box-Muller in the half-precision dtype itself (ATen `normal_fill`), in
    blocks of 16 uniform numbers: 8 radii, then 8 angles. If the count is not a multiple of 16, the
    last 16 numbers are drawn again. A uniform number has as many random bits as the significand of
    the dtype (8 in bfloat16, 11 in float16). The few possible values are looked up in a table.
    The result equals that of torch 2.9.1 on the CPU in every bit.

    Args:
        shape: at least 16 numbers. Smaller tensors, which no image needs, were drawn in another
            way.
    """
    count = math.prod(shape)
    assert count >= 16, "the latents of the smallest image (64x64 pixels) have 256 numbers"
    blocks = count // 16 * 16
    uniform = _uniform(count, generator, dtype)
    result = torch.empty(count, dtype=dtype)
    result[:blocks] = _box_muller(uniform[:blocks], dtype)
    if count % 16:
        result[-16:] = _box_muller(_uniform(16, generator, dtype), dtype)
    return result.view(tuple(shape))


def _uniform(count: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Return `count` uniform integers: the low bits of one 32-bit draw each."""
    draws = torch.empty(count, dtype=torch.int32).random_(generator=generator)
    return (draws & (_levels(dtype) - 1)).long()


def _levels(dtype: torch.dtype) -> int:
    """Return the number of different uniform values in a half-precision dtype."""
    return 2**8 if dtype == torch.bfloat16 else 2**11


def _box_muller(uniform: Tensor, dtype: torch.dtype) -> Tensor:
    radius, cosine, sine = _tables(dtype)
    block = uniform.view(-1, 2, 8)
    radii, angles = radius[block[:, 0]], block[:, 1]
    # torch adds the mean, 0, at the end, which turns -0 into 0.
    return torch.stack([radii * cosine[angles] + 0, radii * sine[angles] + 0], dim=1).flatten()


@lru_cache(maxsize=2)
def _tables(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return radius, cosine and sine for each uniform value, every step rounded to `dtype`."""
    uniform = torch.arange(_levels(dtype), dtype=torch.float32).div(_levels(dtype)).to(dtype)
    radius = torch.sqrt(-2 * torch.log(1 - uniform))
    angle = (2.0 * math.pi * uniform.double()).to(torch.float32).to(dtype)
    return radius, torch.cos(angle), torch.sin(angle)
