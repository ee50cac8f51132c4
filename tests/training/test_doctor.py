"""Shares of differences that the doctor's suspects explain."""

from __future__ import annotations

import pytest

from fidelora.training.doctor import explained_share


@pytest.mark.parametrize(
    ("before", "after", "noise", "share"),
    [
        (4.0, 0.0, 0.0, 1.0),  # nothing was lost
        (4.0, 3.0, 0.0, 0.25),
        (3.0, 2.0, 2.0, 1.0),  # only noise remains
        (3.0, 2.5, 2.0, 0.5),
        (3.0, 1.5, 2.0, 1.5),  # less than the noise remains
        (3.0, 3.5, 2.0, -0.5),
        (2.0, 1.9, 1.9, 0.2),  # the difference is hardly above the noise
        (2.0, 1.5, 3.0, 1.0),
    ],
)
def test_the_noise_of_lost_information_needs_no_explanation(before, after, noise, share):
    assert explained_share(before, after, noise) == pytest.approx(share)
