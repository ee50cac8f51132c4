"""Initial noise and the draws of samplers, for older and newer releases of torch."""

from __future__ import annotations

import hashlib

import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

from fidelora.sampling.noise import NoiseSource, legacy_randn

# sha256 of the bytes of two consecutive `torch.randn(shape, generator=seed 42, dtype=dtype)`,
# recorded with torch 2.9.1. 100 is not a multiple of 16, so the last 16 numbers are drawn twice.
TORCH_2_9_1 = {
    ("bfloat16", (1, 4, 64, 64)): "d239522ce345d5c2",
    ("bfloat16", (1, 4, 9, 8)): "e130480073baa1cb",
    ("bfloat16", (1, 4, 5, 5)): "397c22ee3b609ce6",
    ("float16", (1, 4, 64, 64)): "7818596353dc9e63",
    ("float16", (1, 4, 9, 8)): "8e02431cb94b4d90",
    ("float16", (1, 4, 5, 5)): "c3cf4eb5f580ba31",
}


def digest(*tensors: torch.Tensor) -> str:
    return hashlib.sha256(
        b"".join(tensor.view(torch.int16).numpy().tobytes() for tensor in tensors)
    ).hexdigest()[:16]


@pytest.mark.parametrize(("dtype", "shape"), TORCH_2_9_1)
def test_legacy_noise_equals_that_of_torch_2_9_1(dtype, shape):
    generator = torch.Generator().manual_seed(42)
    draws = [legacy_randn(shape, generator, getattr(torch, dtype)) for _ in range(2)]
    assert digest(*draws) == TORCH_2_9_1[dtype, shape]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_modern_half_precision_noise_is_rounded_float32_noise(dtype):
    """Noise is modern from torch 2.12 on; this fails if a later torch draws in another way."""
    expected = NoiseSource([7], "modern").initial((1, 4, 64, 64), torch.float32).to(dtype)
    assert torch.equal(NoiseSource([7], "modern").initial((1, 4, 64, 64), dtype), expected)


def test_in_float32_both_kinds_of_noise_are_equal():
    legacy, modern = (
        NoiseSource([7], noise).initial((1, 4, 9, 9), torch.float32)
        for noise in ("legacy", "modern")
    )
    assert torch.equal(legacy, modern)


def test_legacy_differs_from_modern_in_half_precision():
    legacy, modern = (
        NoiseSource([7], noise).initial((1, 4, 8, 8), torch.bfloat16)
        for noise in ("legacy", "modern")
    )
    assert not torch.equal(legacy, modern)


def test_a_sampler_draws_legacy_noise_inside_the_block_and_only_there():
    source = NoiseSource([7], "legacy")
    source.initial((1, 4, 8, 8), torch.bfloat16)
    with source.drawing():
        drawn = torch.randn((1, 4, 8, 8), generator=source.generators[0], dtype=torch.bfloat16)
        other = torch.randn(3)

    again = torch.Generator().manual_seed(7)
    legacy_randn((1, 4, 8, 8), again, torch.bfloat16)
    assert torch.equal(drawn, legacy_randn((1, 4, 8, 8), again, torch.bfloat16))
    assert other.dtype == torch.float32
    outside = torch.randn(
        (1, 4, 8, 8), generator=torch.Generator().manual_seed(7), dtype=torch.bfloat16
    )
    assert torch.equal(outside, NoiseSource([7], "modern").initial((1, 4, 8, 8), torch.bfloat16))


def test_legacy_noise_is_standard_normal():
    numbers = legacy_randn(
        (1, 4, 128, 128), torch.Generator().manual_seed(0), torch.float16
    ).float()
    assert abs(numbers.mean().item()) < 0.02
    assert abs(numbers.std().item() - 1) < 0.02


@pytest.mark.parametrize(("noise", "dtype"), [("modern", torch.float32), ("legacy", torch.float16)])
def test_images_of_a_batch_have_the_noise_of_images_made_alone(noise, dtype):
    together = NoiseSource([7, 8], noise)
    first = together.initial((1, 4, 8, 8), dtype)
    with together.drawing():
        second = randn_tensor((2, 4, 8, 8), generator=together.generators, dtype=dtype)
    for place, seed in enumerate((7, 8)):
        alone = NoiseSource([seed], noise)
        assert torch.equal(first[place : place + 1], alone.initial((1, 4, 8, 8), dtype))
        with alone.drawing():
            assert torch.equal(
                second[place : place + 1],
                randn_tensor((1, 4, 8, 8), generator=alone.generators, dtype=dtype),
            )
