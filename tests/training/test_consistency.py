"""Statistical tests of `consistency.py` with synthetic differences."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fidelora.training.consistency import DifferenceImage, Differences, direction_test, size_test

SHAPE = (8, 8, 3)
DRAWS = 8


def noise(random: np.random.Generator, size: float = 1.0) -> DifferenceImage:
    """Return a smooth field, because neighbouring pixels of real differences are alike."""
    coarse = random.normal(0, size, (4, 4, 3))
    field: DifferenceImage = np.kron(coarse, np.ones((2, 2, 1))).astype(np.float32)
    return field


def samples(
    random: np.random.Generator,
    count: int = 4,
    signal: DifferenceImage | None = None,
    size: float = 1.0,
) -> list[Differences]:
    """Return samples; the difference of the trainer's image is noise of this size plus `signal`."""
    extra = np.zeros(SHAPE, np.float32) if signal is None else signal
    return [
        Differences(noise(random, size) + extra, tuple(noise(random) for _ in range(DRAWS)))
        for _ in range(count)
    ]


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


def test_right_settings_raise_no_more_false_alarms_than_the_limit(random):
    change = noise(random)
    sizes = [size_test(samples(random)).p_value for _ in range(1000)]
    directions = [direction_test(samples(random), [change] * 4, 0.01).p_value for _ in range(1000)]
    for limit in (0.01, 0.05):
        assert np.mean(np.array(sizes) < limit) <= 1.5 * limit
        assert np.mean(np.array(directions) < limit) <= 1.5 * limit + 0.005


def test_larger_differences_are_detected(random):
    found = size_test(samples(random, size=2.0))
    assert 1.6 < found.ratio < 2.5
    assert found.p_value < 0.01


def test_smaller_differences_raise_no_alarm(random):
    found = size_test(samples(random, size=0.3))
    assert found.ratio < 0.5
    assert found.p_value == 1.0


def test_one_wrong_sample_among_right_ones_is_detected(random):
    mixed = [*samples(random, count=5), *samples(random, count=1, size=4.0)]
    assert size_test(mixed).p_value < 0.01


def test_a_small_change_is_detected_by_its_direction_only(random):
    change = noise(random, 0.5)
    wrong = samples(random, count=8, signal=change)
    assert size_test(wrong).p_value > 0.01
    found = direction_test(wrong, [change] * 8, 0.01)
    assert found.p_value < 0.01
    assert 0.5 < found.amount < 1.5
    assert found.detectable < 1


def test_the_amount_is_signed_and_relative_to_the_change(random):
    change = noise(random, 3.0)
    wrong = samples(random, signal=(-2 * change).astype(np.float32))
    assert direction_test(wrong, [change] * 4, 0.01).amount == pytest.approx(-2, abs=0.3)


def test_a_noisier_sample_has_less_weight(random):
    change = noise(random)
    quiet = samples(random, count=1, signal=change)
    loud = [
        Differences(
            (100 * noise(random)).astype(np.float32),
            tuple((100 * noise(random)).astype(np.float32) for _ in range(DRAWS)),
        )
    ]
    alone = direction_test(quiet, [change], 0.01)
    both = direction_test([*quiet, *loud], [change, change], 0.01)
    assert both.amount == pytest.approx(alone.amount, abs=0.05)


def test_a_change_without_effect_is_not_detectable(random):
    found = direction_test(samples(random), [np.zeros(SHAPE, np.float32)] * 4, 0.01)
    assert (found.amount, found.p_value, found.detectable) == (0.0, 1.0, float("inf"))


def test_identical_draws_do_not_fail(random):
    still = np.zeros(SHAPE, np.float32)
    same = [Differences(still, (still,) * DRAWS)] * 2
    assert size_test(same).p_value > 0.4
    assert direction_test(same, [noise(random)] * 2, 0.01).p_value == 1.0


def rounded(random: np.random.Generator, setting: DifferenceImage, count: int = DRAWS):
    """Return the synthetic differences of a sample whose images have independent rounding errors.

    The mean square of the errors is 1.

    Args:
        setting: change of the trainer's image by a setting that differs from the configuration.
        count: number of draws.

    Returns:
        The differences of the trainer's image and of the draws from the replayed image, and the
        rounding errors of the replayed image.
    """
    center = fine_noise(random)
    draws = tuple((fine_noise(random) - center).astype(np.float32) for _ in range(count))
    trainer = (setting + fine_noise(random) - center).astype(np.float32)
    return Differences(trainer, draws), center


def fine_noise(random: np.random.Generator, size: float = 1.0) -> DifferenceImage:
    field: DifferenceImage = random.normal(0, size, (48, 48, 3)).astype(np.float32)
    return field


def test_the_signal_does_not_include_rounding_errors(random):
    effect = fine_noise(random, 0.5)  # a quarter of the power of an image's rounding errors
    sample, center = rounded(random, effect)
    change = (effect + fine_noise(random) - center).astype(np.float32)
    found = direction_test([sample], [change], 0.01)
    assert found.signal == pytest.approx(0.25 / 2.25, abs=0.05)
    assert found.amount == pytest.approx(1, abs=0.6)
    assert found.detectable > 0.2


def test_a_change_that_consists_of_rounding_errors_is_not_detectable(random):
    nothing = np.zeros((48, 48, 3), np.float32)
    sample, center = rounded(random, nothing)
    found = direction_test([sample], [(fine_noise(random) - center).astype(np.float32)], 0.01)
    assert found.signal < 0.05
    assert found.p_value > 0.01
    assert found.detectable == float("inf")


def test_an_averaged_change_detects_what_a_single_one_hides(random):
    effect = fine_noise(random, 0.2)
    sample, center = rounded(random, effect)
    single = (effect + fine_noise(random) - center).astype(np.float32)
    pairs = [effect + fine_noise(random) - fine_noise(random) for _ in range(DRAWS)]
    mean = np.mean(pairs, axis=0).astype(np.float32)
    blurred = direction_test([sample], [single], 0.01)
    clear = direction_test([sample], [mean], 0.01, [2 / DRAWS])
    assert clear.signal > 4 * blurred.signal
    assert clear.p_value < 0.01
    assert clear.amount == pytest.approx(1, abs=0.3)
    assert clear.detectable < blurred.detectable / 2


@pytest.mark.parametrize(("size", "is_found"), [(0.0, False), (-1.0, True)])
def test_a_sample_with_few_rounding_errors_does_not_look_changed(random, size, is_found):
    """Another machine may round only a few values differently; draws replace all rounding."""
    pairs = []
    for _ in range(2):
        setting = fine_noise(random)
        one, center = rounded(random, setting * 0)
        few = np.where(random.random(center.shape) < 0.2, one.trainer, size * setting)
        change = (setting + fine_noise(random) - center).astype(np.float32)
        pairs.append((replace(one, trainer=few.astype(np.float32)), change))
    found = direction_test([one for one, _ in pairs], [change for _, change in pairs], 0.01)
    assert (found.p_value < 0.01) == is_found
