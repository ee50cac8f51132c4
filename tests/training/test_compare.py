"""Comparison of two images."""

from __future__ import annotations

import numpy as np
import pytest

from fidelora.training.compare import compare, similarity

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (64, 72, 3), np.uint8)


def test_one_level_in_one_channel_of_one_pixel_is_a_difference():
    other = IMAGE.copy()
    other[3, 4, 1] ^= 1
    found = compare(other, IMAGE)
    assert (found.identical, found.max_difference) == (False, 1)
    assert found.identical_percent == pytest.approx(100 * (1 - 1 / (64 * 72)))
    assert found.identical_values_percent == pytest.approx(100 * (1 - 1 / (64 * 72 * 3)))
    assert found.mean_difference == pytest.approx(1 / (64 * 72 * 3))


def test_only_identical_images_give_100_percent():
    large = np.zeros((512, 512, 3), np.uint8)
    other = large.copy()
    other[0, 0, 0] = 1
    assert compare(large, large).percent_text == "100.00"
    assert compare(other, large).percent_text == "99.99"
    assert "99.99 %" in compare(other, large).summary


def test_psnr_and_ssim_match_their_definitions():
    assert similarity(IMAGE, IMAGE) == (None, 1.0)
    grey = np.full((64, 64, 3), 100, np.uint8)
    psnr, ssim = similarity(grey + 10, grey)
    assert psnr == pytest.approx(10 * np.log10(255**2 / 100))
    c1 = (0.01 * 255) ** 2
    # Flat images have no variance, so only the luminance term remains.
    assert ssim == pytest.approx((2 * 110 * 100 + c1) / (110**2 + 100**2 + c1))
    noise = similarity(RNG.integers(0, 256, IMAGE.shape, np.uint8), IMAGE)
    assert abs(noise[1]) < 0.05
