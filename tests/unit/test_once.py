"""What is done once for an image: the same bits as doing it at each step, and done again when it has to be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.support import LOKR, LORA_CONV, TINY_BASE, TINY_SDXL
from torch import nn

import fidelora.engine.base as base_module
from fidelora import Recipe
from fidelora.adapters.formats import read_adapter
from fidelora.adapters.live import live_adapters
from fidelora.engine.base import BaseKey, BaseModel, load_base
from fidelora.engine.once import TextLinear

CPU = torch.device("cpu")


@torch.no_grad()
def test_a_text_is_projected_once_until_it_or_the_weight_is_another(monkeypatch):
    linear = nn.Linear(24, 32, bias=False).requires_grad_(False)
    module, plain = TextLinear(linear), nn.Linear.forward
    calls: list[torch.Tensor] = []

    def counted(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        return plain(self, x)

    monkeypatch.setattr(nn.Linear, "forward", counted)
    one = torch.randn(2, 7, 24)
    same_numbers = one.clone()
    assert torch.equal(module(one), plain(linear, one))
    assert torch.equal(module(one), plain(linear, one))
    assert len(calls) == 1
    module(same_numbers)
    assert len(calls) == 2
    linear.weight[:5].mul_(2)  # a part, as adapters are merged
    assert torch.equal(module(same_numbers), plain(linear, same_numbers))
    assert len(calls) == 3


def load(folder: Any, **fields: Any) -> BaseModel:
    base = load_base(BaseKey.of(Recipe(prompt="", base_model=str(folder), **fields)), CPU)
    base.merged.apply([])
    return base


@pytest.mark.parametrize(
    ("folder", "fields"), [(TINY_BASE, {}), (TINY_SDXL, {"model": "sdxl"}), (TINY_BASE, {"dtype": "bfloat16"})]
)
@torch.no_grad()
def test_a_unet_has_the_same_bits_with_adapters_merged_live_and_taken_out(folder, fields, monkeypatch):
    ours = load(folder, **fields)
    monkeypatch.setattr(base_module, "project_texts_once", lambda unet: None)
    plain = load(folder, **fields)
    assert any(isinstance(module, TextLinear) for module in ours.unet.modules())
    assert not any(isinstance(module, TextLinear) for module in plain.unet.modules())
    paths = (LORA_CONV, LOKR) if folder == TINY_BASE else ()
    for merged, live in [((), ()), (paths, ()), ((), paths), (paths[:1], paths[1:]), ((), ())]:
        for rows, size in [(2, 16), (1, 4), (1, 32), (2, 8)]:
            torch.manual_seed(rows)
            latents = torch.randn(rows, 4, size, size, dtype=ours.unet.dtype)
            condition = ours.conditioning.blank(rows, CPU).to(CPU, ours.unet.dtype)
            condition = type(condition)(torch.randn_like(condition.text), condition.added)
            results = []
            for base in (ours, plain):
                base.merged.apply([(base.targets.bind(read_adapter(path)), 0.7) for path in merged])
                with live_adapters(base.targets, [(base.targets.bind(read_adapter(path)), 0.9) for path in live]):
                    results.append([base.predict(condition, latents, torch.tensor(t)) for t in (900, 20)])
            assert all(torch.equal(*pair) for pair in zip(*results, strict=True)), (merged, live, rows, size)
