"""The order of operations, with numbers for which every order gives other bits.

The golden training runs have scales and multipliers that are nearly powers of two, for which every
order gives the same bits. Each test here first shows that another order gives other bits, so that
the test is able to fail.
"""

from __future__ import annotations

import pytest
import torch
from tests.support import merged
from torch import nn
from torch.nn import functional

from fidelora.adapters import deltas, products
from fidelora.adapters.deltas import LohaDelta, LokrDelta, LoraDelta

SCALE, MULTIPLIER = 1 / 3, 0.7


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(5)


def differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    return not torch.equal(one, other)


def test_a_merged_lora_is_multiplied_first_and_scaled_second():
    weight, down, up = torch.randn(48, 32), torch.randn(7, 32), torch.randn(48, 7)
    expected = weight + (MULTIPLIER * (up @ down)) * SCALE
    assert differ(expected, weight + (SCALE * (up @ down)) * MULTIPLIER)
    assert differ(expected, weight + (SCALE * MULTIPLIER) * (up @ down))
    assert torch.equal(merged(LoraDelta(SCALE, down, up), weight, MULTIPLIER), expected)


def test_a_convolution_delta_is_computed_by_convolution():
    weight, down, up = torch.randn(12, 8, 3, 3), torch.randn(5, 8, 3, 3), torch.randn(12, 5, 1, 1)
    product = functional.conv2d(down.permute(1, 0, 2, 3), up).permute(1, 0, 2, 3)
    expected = weight + (MULTIPLIER * product) * SCALE
    assert differ(expected, weight + (SCALE * product) * MULTIPLIER)
    assert torch.equal(merged(LoraDelta(SCALE, down, up), weight, MULTIPLIER), expected)


@pytest.mark.parametrize("same", [True, False], ids=["as matrices", "as a convolution"])
@pytest.mark.parametrize("rank", [1, 4, 5, 16, 33])
def test_a_merged_convolution_has_the_same_bits_with_both_methods(monkeypatch, rank, same):
    """The matrix product is used only where it was found to give the same bits; test both cases."""
    down, up, weight = (
        torch.randn(rank, 40, 3, 3),
        torch.randn(72, rank, 1, 1),
        torch.randn(72, 40, 3, 3),
    )
    expected = weight + functional.conv2d(down.permute(1, 0, 2, 3), up).permute(1, 0, 2, 3)
    if not same:
        monkeypatch.setattr(deltas, "row_products_match", lambda *shapes: False)
    assert torch.equal(merged(LoraDelta(1.0, down, up), weight, 1.0), expected)


def test_a_matrix_product_with_other_bits_is_detected_and_not_used(monkeypatch):
    down, up, weight = torch.randn(4, 40, 3, 3), torch.randn(72, 4, 1, 1), torch.randn(72, 40, 3, 3)
    products.row_products_match.cache_clear()
    convolved = products.convolved
    for module in (products, deltas):
        monkeypatch.setattr(
            module, "convolved", lambda up, down: convolved(up, down).nextafter(torch.tensor(9.0))
        )
    result = merged(LoraDelta(1.0, down, up), weight, 1.0)
    products.row_products_match.cache_clear()
    assert torch.equal(result, weight + products.convolved(up, down))
    assert differ(result, weight + convolved(up, down))


def test_a_merged_1x1_convolution_is_a_matrix_product():
    weight, down, up = torch.randn(48, 32, 1, 1), torch.randn(7, 32, 1, 1), torch.randn(48, 7, 1, 1)
    expected = weight + (MULTIPLIER * (up[:, :, 0, 0] @ down[:, :, 0, 0]))[:, :, None, None] * SCALE
    assert torch.equal(merged(LoraDelta(SCALE, down, up), weight, MULTIPLIER), expected)


def test_a_live_lora_is_scaled_first_and_multiplied_second_in_float32():
    module = nn.Linear(32, 48, dtype=torch.bfloat16)
    down, up, x = torch.randn(7, 32), torch.randn(48, 7), torch.randn(2, 32, dtype=torch.bfloat16)
    run = functional.linear(functional.linear(x.float(), down), up)
    expected = (run * SCALE) * MULTIPLIER
    assert differ(expected, (run * MULTIPLIER) * SCALE)
    result = LoraDelta(SCALE, down, up).low_rank_output(module, x, MULTIPLIER)
    assert result.dtype == torch.float32
    assert torch.equal(result, expected)


def test_a_live_lora_reads_inputs_with_other_strides_as_one_matrix():
    """SDXL's `proj_in` gets such inputs. The weights of the trainer's modules require gradients."""
    rows = torch.randn(2, 32, 4, 6).permute(0, 2, 3, 1).reshape(2, 24, 32)
    assert not rows.is_contiguous()
    down, up = nn.Linear(32, 8, bias=False), nn.Linear(8, 48, bias=False)
    weights = down.weight.detach(), up.weight.detach()
    with torch.no_grad():
        expected = up(down(rows))
        assert differ(expected, functional.linear(functional.linear(rows, weights[0]), weights[1]))
        result = LoraDelta(1.0, *weights).low_rank_output(nn.Linear(32, 48), rows, 1.0)
    assert torch.equal(result, expected)


@pytest.mark.parametrize("kind", ["lokr", "loha"])
def test_a_weight_delta_is_scaled_first_and_multiplied_second(kind):
    weight = torch.randn(24, 30)
    if kind == "lokr":
        w1, w2_a, w2_b = torch.randn(4, 5), torch.randn(6, 2), torch.randn(2, 6)
        delta: LokrDelta | LohaDelta = LokrDelta(SCALE, (w1,), (w2_a, w2_b))
        product = torch.kron(w1, w2_a @ w2_b)
    else:
        factors = [torch.randn(24, 2), torch.randn(2, 30), torch.randn(24, 2), torch.randn(2, 30)]
        delta = LohaDelta(SCALE, (factors[0], factors[1]), (factors[2], factors[3]))
        product = (factors[0] @ factors[1]) * (factors[2] @ factors[3])
    expected = weight + (product * SCALE) * MULTIPLIER
    assert differ(expected, weight + (product * MULTIPLIER) * SCALE)
    assert torch.equal(merged(delta, weight, MULTIPLIER), expected)

    half = weight.to(torch.bfloat16)
    live = half + (product * SCALE).to(torch.bfloat16) * MULTIPLIER
    assert differ(live, expected.to(torch.bfloat16))
    assert torch.equal(delta.live_weight(half, MULTIPLIER), live)
