"""Statistical tests: can lost information alone explain why samples differ?

A sample cannot be reproduced exactly if information is lost: the adapter was saved in half
precision, checkpoints of earlier rounds are missing, or another kind of processor rounded half
precision in another way. The lost information can be replaced by random values. Each set of random
values gives an image with the same settings, called a *draw*. Let C be the replayed image, which
uses the saved values, T the trainer's sample and D_k the draws. If the settings are right, T is
like one more draw: the differences T - C and D_k - C are exchangeable. If a setting is wrong, T - C
is larger, or has a component in the direction in which changing that setting moves the image.

The tests compare one number of T with those of K draws. The difference of the number from the mean
of the draws, divided by its standard error, follows Student's t distribution with K - 1 degrees of
freedom if the numbers are normal (the prediction interval of one more observation; Student, "The
probable error of a mean", 1908). Logarithms of mean differences and projections of images, which
sum over many pixels, are close to normal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

DifferenceImage = NDArray[np.float32]
"""Difference of an image from the replayed image (C above), in levels, [height, width, 3]."""

_MODEL_ERROR = 0.08
"""Additional standard error of the logarithm of a size, because the draws are only a model.

For right settings, the mean size of a run's differences was 0.93 to 1.12 times that of the draws.
"""
_MIN_SIGNAL = 0.01  # a smaller `DirectionTest.signal` cannot be told from 0
_FEW_ERRORS = 0.8
"""Ratio of sizes below which samples are not like draws, but have only some of their rounding
errors: another machine may round only a few of the values differently."""
_MIN_SIZE = 1e-4  # levels; avoids the logarithm of zero for images that do not differ


@dataclass(frozen=True)
class Differences:
    """Differences of one sample and of its draws from the replayed image.

    Attributes:
        trainer: difference of the trainer's sample.
        draws: differences of the draws, in the same order for all samples of a step: draw k of each
            sample has the same random values in place of the lost information.
    """

    trainer: DifferenceImage
    draws: tuple[DifferenceImage, ...]


@dataclass(frozen=True)
class SizeTest:
    """Result of comparing the size of the trainer's differences with that of the draws.

    Attributes:
        ratio: size of the trainer's differences divided by the size of the draws' differences,
            averaged over the samples (geometric mean); about 1 for right settings.
        p_value: probability of a ratio at least as large with right settings. It covers both the
            mean over all samples and the largest single one.
    """

    ratio: float
    p_value: float


@dataclass(frozen=True)
class DirectionTest:
    """Result of looking for a change of one setting in the trainer's differences.

    Attributes:
        amount: the part of the change that the trainer's samples contain: about 0 for right
            settings, 1 if the samples were made with the changed setting.
        p_value: probability of an amount at least as far from 0 with right settings.
        detectable: smallest amount whose p value would be below the limit of the test; infinite if
            the change cannot be told from rounding errors.
        signal: the part of the changes, as a share of their mean square, that is due to the
            setting. The rest is rounding errors, which differ with every change of the settings.
    """

    amount: float
    p_value: float
    detectable: float
    signal: float = 1.0


def size_test(samples: Sequence[Differences]) -> SizeTest:
    """Compare the sizes of the trainer's differences with those of at least two draws."""
    draws = np.array([[_log_size(draw) for draw in sample.draws] for sample in samples])
    count = draws.shape[1]
    deviations = draws - draws.mean(axis=1, keepdims=True)
    excess = _log_ratios(samples)
    # Test of the mean over the samples. Draw k of all samples uses the same random values, so the
    # deviations of draw k are averaged over the samples before the spread is estimated.
    spread = float(deviations.mean(axis=0).std(ddof=1))
    error = math.sqrt(spread**2 * (1 + 1 / count) + _MODEL_ERROR**2)
    p_mean = float(student.sf(excess.mean() / error, count - 1))
    # The largest single sample, with the spread of all samples (Bonferroni's correction).
    freedom = deviations.size - len(samples)
    spread = math.sqrt(float((deviations**2).sum()) / freedom)
    error = math.sqrt(spread**2 * (1 + 1 / count) + _MODEL_ERROR**2)
    p_largest = len(samples) * float(student.sf(excess.max() / error, freedom))
    return SizeTest(float(np.exp(excess.mean())), min(1.0, 2 * min(p_mean, p_largest)))


def direction_test(
    samples: Sequence[Differences],
    changes: Sequence[DifferenceImage],
    limit: float,
    noise: Sequence[float] | None = None,
) -> DirectionTest:
    """Look for a change of one setting in the trainer's differences.

    The differences are projected on the change, and each sample is weighted by the inverse of its
    draws' variance, which is the matched filter for a known signal (North, "An analysis of the
    factors which determine signal/noise discrimination in pulsed-carrier systems", 1943).

    A change C' - C has the rounding errors of both images, so it is the setting's effect S plus the
    errors n' - n. The errors n are also in the draws' differences D_k - C, whose projections on the
    change therefore have the mean |n|^2 / |C' - C|^2. As n' is about as large as n, the effect's
    share is |S|^2 / |C' - C|^2 = 1 - 2 * mean. Samples made with the changed setting contain S, and
    their projection is larger than the mean by this share, not by 1.

    Args:
        changes: for each sample, difference that the changed setting makes to the replayed image.
        limit: p value below which an amount counts as detected.
        noise: for each sample, mean square of the rounding errors in `changes`, if these errors do
            not depend on the replayed image. By default, the share of the effect is estimated from
            the draws as above.
    """
    weights = [1 / _variance(sample.draws) for sample in samples]
    scale = sum(w * _dot(c, c) for w, c in zip(weights, changes, strict=True))
    if scale == 0:  # the changed setting has no effect on these samples
        return DirectionTest(0.0, 1.0, math.inf)

    def amount(differences: Sequence[DifferenceImage]) -> float:
        products = zip(weights, differences, changes, strict=True)
        return sum(w * _dot(difference, change) for w, difference, change in products) / scale

    count = len(samples[0].draws)
    draws = np.array([amount([sample.draws[k] for sample in samples]) for k in range(count)])
    center, spread = float(draws.mean()), float(draws.std(ddof=1))
    if noise is None:
        signal, uncertainty = 1 - 2 * center, 2 * spread / math.sqrt(count)
    else:
        errors = zip(weights, noise, changes, strict=True)
        signal, uncertainty = 1 - sum(w * one * c.size for w, one, c in errors) / scale, 0.0
    signal = min(1.0, max(0.0, signal))
    trainer = amount([sample.trainer for sample in samples])
    expected = center
    if math.exp(_log_ratios(samples).mean()) < _FEW_ERRORS:
        # With none of the errors n' - n, the projection would be 0; with some of them, it is
        # between 0 and `center`.
        expected = min(max(trainer, 0.0), center)
    excess = trainer - expected
    error = spread * math.sqrt(1 + 1 / count)
    p_value = 2 * float(student.sf(abs(excess) / max(error, 1e-12), count - 1))
    smallest = float(student.isf(limit / 2, count - 1)) * error
    certain = signal - uncertainty
    detectable = smallest / certain if certain > _MIN_SIGNAL else math.inf
    return DirectionTest(excess / max(signal, _MIN_SIGNAL), min(1.0, p_value), detectable, signal)


def _log_ratios(samples: Sequence[Differences]) -> NDArray[np.float64]:
    """Return, for each sample, the logarithm of its size divided by that of its draws."""
    return np.array(
        [
            _log_size(sample.trainer) - np.mean([_log_size(draw) for draw in sample.draws])
            for sample in samples
        ]
    )


def _log_size(difference: DifferenceImage) -> float:
    return math.log(max(_MIN_SIZE, float(np.abs(difference).mean())))


def _variance(differences: Sequence[DifferenceImage]) -> float:
    return max(_MIN_SIZE**2, float(np.mean([np.square(one).mean() for one in differences])))


def _dot(first: DifferenceImage, second: DifferenceImage) -> float:
    return float(np.vdot(first.astype(np.float64), second.astype(np.float64)))
