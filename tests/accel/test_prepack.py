"""Prepacked weights and cached projections: the same bits, and renewed when the weights change."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.support import LOKR, LORA_CONV, NEEDS_BFLOAT16, TINY_BASE, TINY_SDXL, load_model_of
from torch import Tensor, nn

import fidelora.engine.model as base_module
from fidelora import Recipe
from fidelora.accel import prepack
from fidelora.accel.prepack import CachedTextLinear, PrepackedConv2d
from fidelora.adapters.live import live_adapters
from fidelora.adapters.read import read_adapter
from fidelora.engine.model import LoadedModel
from fidelora.families.protocols import Encoded, Guidance, Size

CPU = torch.device("cpu")


def laid_out(conv: nn.Conv2d) -> PrepackedConv2d:
    module = PrepackedConv2d(conv)
    module.set_weight(conv.weight.detach().to)
    return module


CONVOLUTIONS: dict[str, Callable[[], nn.Conv2d]] = {
    "usual": lambda: nn.Conv2d(48, 64, 3, padding=1),
    "halving": lambda: nn.Conv2d(48, 64, 3, stride=2, padding=1),
    "without bias": lambda: nn.Conv2d(48, 40, 3, padding=1, bias=False),
    "few channels in": lambda: nn.Conv2d(4, 320, 3, padding=1),
    "few channels out": lambda: nn.Conv2d(320, 4, 3, padding=1),
    "many channels": lambda: nn.Conv2d(640, 320, 3, padding=1),
    "bfloat16": lambda: nn.Conv2d(48, 64, 3, padding=1, dtype=torch.bfloat16),
}
SIZES = {
    "two": (2, 16, 16),
    "other size": (2, 8, 12),
    "two tiny ones": (2, 2, 2),
    "one tiny one": (1, 4, 4),
    "a pixel": (1, 1, 1),
    "one": (1, 64, 64),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=NEEDS_BFLOAT16) if name == "bfloat16" else name
        for name in CONVOLUTIONS
    ],
)
@torch.no_grad()
def test_a_prepacked_convolution_has_the_bits_of_a_plain_one(name, threads, golden_threads):
    torch.set_num_threads(threads)
    torch.manual_seed(1)
    conv = CONVOLUTIONS[name]()
    module = laid_out(conv)
    for _ in range(2):
        for batch, height, width in SIZES.values():
            for layout in (torch.contiguous_format, torch.channels_last):
                x = torch.randn(
                    batch, conv.in_channels, height, width, dtype=conv.weight.dtype
                ).contiguous(memory_format=layout)
                assert torch.equal(module(x), conv(x)), (batch, height, width, layout)
        conv.weight.copy_(torch.randn_like(conv.weight))
        module.set_weight(conv.weight.detach().to)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
@torch.no_grad()
def test_a_weight_is_prepacked_once_and_its_plain_form_freed(stored):
    weight = torch.randn(64, 48, 3, 3).to(stored)
    written: list[weakref.ref[Tensor]] = []

    def write(dtype: torch.dtype) -> Tensor:
        given = weight.to(dtype)
        written.append(weakref.ref(given))
        return given

    module = PrepackedConv2d(nn.Conv2d(48, 64, 3, padding=1))
    module.set_weight(write)
    layout = module._prepacked
    for _ in range(2):
        module(torch.randn(2, 48, 8, 8))
    assert module._prepacked is layout
    (kept, *_), _ = layout.__getstate__()
    assert kept.untyped_storage().nbytes() == 0
    assert kept._base is None
    assert len(written) == 1
    assert (written[0]() is None) == (stored != torch.float32), "the cast copy was not freed"
    assert weight.shape == (64, 48, 3, 3), "the stored weight was changed"


@torch.no_grad()
def test_a_convolution_without_weight_raises():
    conv = nn.Conv2d(48, 64, 3, padding=1)
    module, x = PrepackedConv2d(conv), torch.randn(2, 48, 8, 8)

    def fails(dtype: torch.dtype) -> Tensor:
        raise MemoryError

    for leave in (lambda: None, module.release_weight, lambda: module.set_weight(fails)):
        with contextlib.suppress(MemoryError):
            leave()
        with pytest.raises(AssertionError, match="released"):
            module(x)
        module.set_weight(conv.weight.detach().to)
        assert torch.equal(module(x), conv(x))
        module.release_weight()


def test_an_unused_base_model_is_freed_immediately():
    gc.collect()
    gc.disable()
    try:
        base = load(TINY_BASE)
        base.merged.apply([(base.targets.bind(read_adapter(LORA_CONV)), 1.0)])
        convolution = weakref.ref(
            next(
                module
                for module in base.parts["unet"].modules()
                if isinstance(module, PrepackedConv2d)
            )
        )
        del base
        assert convolution() is None
    finally:
        gc.enable()


@torch.no_grad()
def test_the_plain_weight_stays_until_the_next_one_is_set():
    conv = nn.Conv2d(48, 64, 3, padding=1)
    module = laid_out(conv)
    x = torch.randn(2, 48, 8, 8)
    expected = module(x)
    weight = module.plain_weight()
    assert torch.equal(weight, conv.weight)
    assert torch.equal(module(x), expected)
    assert module.plain_weight() is weight
    assert module._prepacked is None
    module.set_weight(conv.weight.detach().to)
    assert module._plain is None
    assert torch.equal(module(x), expected)


@torch.no_grad()
def test_a_text_is_projected_again_only_if_it_or_the_weight_changes(monkeypatch):
    linear = nn.Linear(24, 32, bias=False).requires_grad_(False)
    module, plain = CachedTextLinear(linear), nn.Linear.forward
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
    linear.weight[:5].mul_(2)  # merging an adapter changes only some rows
    assert torch.equal(module(same_numbers), plain(linear, same_numbers))
    assert len(calls) == 3


def load(folder: Any, **fields: Any) -> LoadedModel:
    return load_model_of(Recipe(prompt="", base_model=str(folder), **fields))


@pytest.mark.parametrize(
    ("folder", "fields"),
    [
        (TINY_BASE, {}),
        (TINY_SDXL, {"model": "sdxl"}),
        pytest.param(TINY_BASE, {"dtype": "bfloat16"}, marks=NEEDS_BFLOAT16),
    ],
)
@torch.no_grad()
def test_a_prepacked_unet_has_the_bits_of_a_plain_one_with_adapters(folder, fields, monkeypatch):
    ours = load(folder, **fields)
    monkeypatch.setattr(base_module, "prepack", lambda unet: None)
    plain = load(folder, **fields)
    assert any(isinstance(module, PrepackedConv2d) for module in ours.parts["unet"].modules())
    assert any(isinstance(module, CachedTextLinear) for module in ours.parts["unet"].modules())
    assert not any(
        isinstance(module, PrepackedConv2d | CachedTextLinear)
        for module in plain.parts["unet"].modules()
    )
    paths = (LORA_CONV, LOKR) if folder == TINY_BASE else ()
    for merged, live in [((), ()), (paths, ()), ((), paths), (paths[:1], paths[1:]), ((), ())]:
        with ExitStack() as hooks:
            for base in (ours, plain):
                base.merged.apply([(base.targets.bind(read_adapter(path)), 0.7) for path in merged])
                applied = [(base.targets.bind(read_adapter(path)), 0.9) for path in live]
                hooks.enter_context(live_adapters(base.targets, applied))
            for rows, size in [(2, 16), (1, 4), (1, 32), (2, 8)]:
                torch.manual_seed(rows)
                dtype = ours.compute_dtype
                latents = torch.randn(rows, 4, size, size, dtype=dtype)
                blank = ours.text.blank(Size(64, 64), negative=False).positive
                encoded = [
                    Encoded(replace(blank, text=torch.randn_like(blank.text))) for _ in range(rows)
                ]
                results = []
                for base in (ours, plain):
                    denoise = base.denoiser.prepare(encoded, Guidance(1), Size(64, 64), dtype)
                    results.append([denoise(latents, torch.tensor(t)) for t in (900, 20)])
                same = all(torch.equal(*pair) for pair in zip(*results, strict=True))
                assert same, (merged, live, rows, size)


def test_unsupported_convolutions_are_not_prepacked():
    assert prepack._is_worth_prepacking(nn.Conv2d(8, 8, 3, padding=1))
    assert not prepack._is_worth_prepacking(nn.Conv2d(8, 8, 1))
    assert not prepack._is_worth_prepacking(nn.Conv2d(8, 8, 3, groups=2))
    assert not prepack._is_worth_prepacking(nn.Conv2d(8, 8, 3, padding="same"))
    assert not prepack._is_worth_prepacking(nn.Conv2d(8, 8, 3, padding_mode="reflect"))
    assert not prepack._is_worth_prepacking(nn.Conv2d(8, 8, 3, padding=1, dtype=torch.float16)), (
        "float16 is prepacked, although oneDNN computes other bits than PyTorch"
    )


@pytest.mark.parametrize("processor", ["x86_64", "AMD64", "arm64"])
@pytest.mark.parametrize("onednn", [True, False])
def test_nothing_is_prepacked_where_pytorch_does_not_use_onednn(processor, onednn, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: processor)
    with torch.backends.mkldnn.flags(enabled=onednn):
        assert prepack._is_worth_prepacking(nn.Conv2d(8, 8, 3, padding=1)) == (
            onednn and processor != "arm64"
        )
