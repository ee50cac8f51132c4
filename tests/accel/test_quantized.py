"""Linear layers in float8: rounding of weights, order of additions, and excluded layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fidelora.accel.quantized import QuantizedLinear, quantize, quantized_bytes
from fidelora.accel.weight_protocols import AcceptsWeight, ProvidesWeight

DTYPES = (torch.float32, torch.bfloat16)


def linear(dtype: torch.dtype = torch.float32, *, bias: bool = True) -> nn.Linear:
    generator = torch.Generator().manual_seed(1)
    layer = nn.Linear(24, 16, bias=bias, dtype=dtype).requires_grad_(False)
    for tensor in layer.parameters():
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return layer


def quantized(layer: nn.Linear, kind: str) -> QuantizedLinear:
    result = QuantizedLinear(layer, kind)  # type: ignore[arg-type]
    result.set_weight(lambda dtype: layer.weight.to(dtype))
    return result


@pytest.mark.parametrize("dtype", DTYPES)
def test_qfloat8_rounds_rows_and_adds_the_bias_separately(dtype):
    layer = linear(dtype)
    scale = layer.weight.abs().amax(1, keepdim=True) / 448
    rounded = (layer.weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    weight = scale * rounded.to(dtype)
    x = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(2)).to(dtype)
    result = quantized(layer, "qfloat8")
    assert torch.equal(result.plain_weight(), weight)
    assert torch.equal(result(x), torch.matmul(x, weight.T) + layer.bias)
    assert not torch.equal(weight, layer.weight)


def test_float8_multiplies_by_the_reciprocal_and_fuses_the_bias():
    layer = linear(torch.bfloat16)
    scale = (layer.weight.abs().amax(1, keepdim=True) / 448).clamp(min=1.1920928955078125e-07)
    rounded = (layer.weight * (1.0 / scale)).clamp(-448, 448).to(torch.float8_e4m3fn)
    weight = rounded.to(torch.bfloat16) * scale
    x = torch.randn(7, 24, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    result = quantized(layer, "float8")
    assert torch.equal(result.plain_weight(), weight)
    assert torch.equal(result(x), nn.functional.linear(x, weight, layer.bias))


def test_the_largest_value_of_a_row_and_rows_of_zeros_are_kept():
    layer = linear(bias=False)
    layer.weight[3] = 0
    for kind in ("qfloat8", "float8"):
        weight = quantized(layer, kind).plain_weight()
        assert torch.equal(weight[3], torch.zeros(24))
        row = layer.weight[5]
        place = row.abs().argmax()
        assert weight[5, place] == pytest.approx(float(row[place]), rel=1e-6)


def test_linear_layers_are_replaced_unless_a_pattern_matches():
    module = nn.ModuleDict(
        {"t_embedder": nn.Sequential(linear()), "layers": nn.Sequential(linear(), nn.LayerNorm(16))}
    )
    before = linear().weight
    quantize(module, "qfloat8", ("t_embedder*",), has_weights=True)
    assert type(module.get_submodule("t_embedder.0")) is nn.Linear
    layer = module.get_submodule("layers.0")
    assert isinstance(layer, QuantizedLinear)
    assert isinstance(layer, AcceptsWeight)
    assert isinstance(layer, ProvidesWeight)
    assert torch.allclose(layer.plain_weight(), before, rtol=0.07)
    assert quantized_bytes(module) == before.numel() + 4 * len(before)
    assert layer.weight.shape == before.shape
    assert [*dict(layer.named_parameters())] == ["bias"]
