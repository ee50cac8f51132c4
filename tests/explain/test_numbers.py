"""Noise and noise levels of other programs against published values and closed formulas."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from tests.explain.other_programs import gpu_randn, levels

from fidelora.explain.k_samplers import DRAWING, SAMPLERS, sample
from fidelora.explain.noise import SimulatedNoise
from fidelora.explain.philox import PhiloxGenerator, philox
from fidelora.explain.sigmas import SCHEDULES, NoiseLevels, sigmas_of

LEVELS = NoiseLevels.of_stable_diffusion()

# Known answers of Random123's `kat_vectors` for philox4x32-10: counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_the_known_answers(counter, key, expected):
    first, second = words(key)
    result = philox([np.array([word], np.uint64) for word in words(counter)], (first, second))
    assert [int(word[0]) for word in result] == words(expected)


def test_gpu_noise_equals_values_that_a_gpu_drew():
    # Printed by `torch.randn(3, 4, device="cuda")` for seed 0, as A1111's sources document it.
    expected = [
        [-0.92466259, -0.42534415, -2.6438457, 0.14518388],
        [-0.12086647, -0.57972564, -0.62285122, -0.32838709],
        [-1.07454231, -0.36314407, -1.67105067, 2.26550497],
    ]
    found = PhiloxGenerator(0).randn((3, 4))
    assert torch.allclose(found, torch.tensor(expected), atol=1e-6)


def test_gpu_noise_equals_integer_arithmetic_in_later_draws():
    generator = PhiloxGenerator(2**40 + 5)
    draws = [generator.randn((1, 2, 3)) for _ in range(3)]
    for call, drawn in enumerate(draws):
        assert torch.allclose(drawn.flatten(), gpu_randn(2**40 + 5, call, 6), atol=1e-5)


@pytest.mark.parametrize("schedule", ["normal", "karras", "sgm_uniform", "exponential"])
@pytest.mark.parametrize("steps", [1, 7, 20])
def test_noise_levels_equal_closed_formulas(schedule, steps):
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    cumulative = np.cumprod(1 - betas)
    table = np.sqrt((1 - cumulative) / cumulative)
    found = sigmas_of(LEVELS, "euler", schedule, steps)
    assert found == pytest.approx(levels(table, schedule, steps), rel=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_noise_levels_descend(schedule):
    found = sigmas_of(LEVELS, "euler", schedule, 20)
    assert found == sorted(found, reverse=True)


def test_levels_and_timesteps_are_inverse():
    for timestep in (0, 1.25, 500, 998.5, 999):
        assert LEVELS.timestep(LEVELS.at(timestep), whole=False) == pytest.approx(
            timestep, abs=0.01
        )
    assert LEVELS.timestep(LEVELS.at(10.4), whole=True) == 10


def test_a1111s_ddim_ends_with_the_noise_of_timestep_1():
    found = sigmas_of(LEVELS, "euler", "ddim_timesteps", 10)
    expected = [LEVELS.at(timestep) for timestep in range(901, 0, -100)]
    assert found == pytest.approx(expected, rel=1e-6)


def test_a1111s_lcm_uses_every_20th_level():
    few = LEVELS.for_lcm()
    levels = sigmas_of(few, "lcm", "normal", 50)
    assert levels[:-1] == pytest.approx([LEVELS.at(t) for t in range(999, 0, -20)], rel=1e-5)
    assert [few.timestep(one, whole=False) for one in levels[:3]] == [999, 979, 959]
    middle = sigmas_of(few, "lcm", "sgm_uniform", 2)[1]
    assert middle == pytest.approx(math.sqrt(LEVELS.at(499) * LEVELS.at(519)), rel=1e-3)


@pytest.mark.parametrize("sampler", sorted(SAMPLERS.keys() - DRAWING))
def test_samplers_follow_the_exact_solution(sampler):
    # If the data are normal with deviation 0.5, the latents at sigma are normal, too, and a
    # solution of the differential equation is proportional to their deviation.
    def denoised(x: torch.Tensor, sigma: float) -> torch.Tensor:
        return x * 0.25 / (0.25 + sigma**2)

    start = torch.full((1, 1, 2, 2), 14.0, dtype=torch.float64)
    sigmas = sigmas_of(LEVELS, sampler, "karras", 60)
    result = sample(sampler, denoised, start, sigmas, lambda *_: torch.zeros(1))
    exact = 14.0 * 0.5 / math.sqrt(0.25 + sigmas[0] ** 2)
    assert result.flatten()[0] == pytest.approx(exact, rel=0.1 if sampler == "euler" else 0.03)


@pytest.mark.parametrize("sampler", sorted(DRAWING))
def test_drawing_samplers_keep_the_deviation_of_the_data(sampler):
    generator = torch.Generator().manual_seed(0)

    def draw(*_levels: float) -> torch.Tensor:
        return torch.randn((1, 1, 64, 64), generator=generator, dtype=torch.float64)

    def denoised(x: torch.Tensor, sigma: float) -> torch.Tensor:
        return x * 0.25 / (0.25 + sigma**2)

    sigmas = sigmas_of(LEVELS, sampler, "normal", 100)
    result = sample(sampler, denoised, draw() * sigmas[0], sigmas, draw)
    expected = 0.5
    if sampler == "lcm":  # each step keeps the estimate, which has less variance, and adds noise
        variance = sigmas[0] ** 2
        for sigma, following in pairwise(sigmas):
            variance = variance * (0.25 / (0.25 + sigma**2)) ** 2 + following**2
        expected = math.sqrt(variance)
    assert float(result.std()) == pytest.approx(expected, rel=0.05 if sampler == "lcm" else 0.12)


# Made with `torchsde.BrownianTree(0.03, torch.zeros(3), 14.6, entropy=43)` of torchsde 0.2.6, as
# k-diffusion scales and signs it.
BROWNIAN_NOISE = {
    (14.6, 5.5): [-0.303421, -0.151427, 1.042112],
    (5.5, 1.25): [-0.907116, -0.493583, -1.945659],
    (1.25, 0.03): [0.628493, -0.300428, 0.474658],
}


def test_brownian_path_has_the_numbers_of_torchsde():
    path = SimulatedNoise(43).path((1, 3), 0.03, 14.6)
    for (sigma, following), expected in BROWNIAN_NOISE.items():
        assert path.noise(sigma, following)[0].tolist() == pytest.approx(expected, rel=1e-5)


def test_brownian_path_does_not_depend_on_the_steps():
    shape = (1, 4, 8, 8)
    one, other = (SimulatedNoise(5).path(shape, 0.03, 14.6) for _ in range(2))
    whole = one.noise(10.0, 1.0) * 3.0  # increments are scaled by the root of the width
    parts = other.noise(4.0, 1.0) * math.sqrt(3) + other.noise(10.0, 4.0) * math.sqrt(6)
    assert torch.allclose(whole, parts, atol=1e-5)


def test_brownian_path_ends_at_its_levels():
    path = SimulatedNoise(5).path((1, 4, 8, 8), 0.03, 14.6)
    assert torch.equal(path.noise(2.0000001, 2.0), torch.zeros(1, 4, 8, 8))
    outside = path.noise(16.0, 0.01) * math.sqrt(15.99)
    assert torch.allclose(outside, path.noise(14.6, 0.03) * math.sqrt(14.57), atol=1e-5)


def test_brownian_path_on_a_gpu_has_philox_numbers():
    shape = (1, 4, 8, 8)
    seed = int(np.random.SeedSequence(7, pool_size=24).generate_state(1)[0])
    found = SimulatedNoise(7, step_noise="gpu").path(shape, 0.0, 4.0).noise(4.0, 0.0)
    assert torch.allclose(found, -PhiloxGenerator(seed).randn(shape))


def test_comfyui_draws_a_batch_from_one_seed():
    shape = (1, 4, 8, 8)
    generator = torch.Generator().manual_seed(9)
    batch = torch.randn((3, 4, 8, 8), generator=generator)
    for index in range(3):
        noise = SimulatedNoise(9, batch=3, index=index)
        assert torch.equal(noise.initial(shape), batch[index : index + 1])


def test_step_noise_has_its_own_source():
    shape = (1, 4, 8, 8)
    on_cpu = SimulatedNoise(9, step_noise="cpu_next_seed")
    expected = torch.randn(shape, generator=torch.Generator().manual_seed(10))
    assert torch.equal(on_cpu.step(shape), expected)
    assert torch.equal(
        SimulatedNoise(9, step_noise="gpu").step(shape), PhiloxGenerator(9).randn(shape)
    )
    again = SimulatedNoise(9, step_noise="cpu_same_seed")
    assert torch.equal(again.step(shape), again.initial(shape))
    with_delta = SimulatedNoise(9, device="gpu", seed_delta=31337)
    assert torch.equal(with_delta.step(shape), PhiloxGenerator(9 + 31337).randn(shape))
