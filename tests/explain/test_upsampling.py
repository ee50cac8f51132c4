"""Upsampling of the UNet as A1111 computes it."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.nn import functional

from fidelora.explain.upsampling import doubling_sizes


@pytest.fixture
def upsampler() -> Upsample2D:
    torch.manual_seed(0)
    return Upsample2D(2, use_conv=True)


def doubled(upsampler: Upsample2D, hidden: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = upsampler.conv(hidden.repeat_interleave(2, -1).repeat_interleave(2, -2))
    return result


@torch.no_grad()
def test_result_is_resized_after_the_convolution(upsampler):
    hidden = torch.randn(1, 2, 2, 3)
    unet = nn.ModuleList([nn.ModuleList([upsampler])])
    expected = functional.interpolate(doubled(upsampler, hidden), (3, 5), mode="nearest")
    usual = upsampler(hidden, (3, 5))
    with doubling_sizes(unet):
        assert torch.equal(upsampler(hidden, (3, 5)), expected)
    assert not torch.allclose(usual, expected)
    assert torch.equal(upsampler(hidden, (3, 5)), usual)


@torch.no_grad()
@pytest.mark.parametrize("sizes", [(), (None,), ((4, 6),)])
def test_doubled_size_is_kept_if_it_fits(upsampler, sizes):
    hidden = torch.randn(1, 2, 2, 3)
    with doubling_sizes(upsampler):
        found = upsampler(hidden, *sizes)
    assert torch.allclose(found, doubled(upsampler, hidden), atol=1e-6)
