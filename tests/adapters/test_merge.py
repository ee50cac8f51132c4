"""Adapters are merged into the weights and removed again, bit for bit."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support import (
    LOKR,
    LORA,
    LORA_CONV,
    TINY_BASE,
    change_weights,
    copy_base,
    load_model_of,
    merged,
    save_adapter,
    unmerged_model_of,
    weights_of,
)

from fidelora import Recipe
from fidelora.accel.prepack import PrepackedConv2d
from fidelora.adapters.read import read_adapter
from fidelora.engine.model import LoadedModel
from fidelora.errors import AdapterMismatchError

SWITCHES = 100
"""Number of random switches: each of the 8 subsets of three adapters is applied several times."""


def fresh_base(dtype: str = "float32", folder: Path = TINY_BASE) -> LoadedModel:
    """A base model with its original weights."""
    recipe = Recipe(prompt="", base_model=str(folder), dtype=dtype)  # type: ignore[arg-type]
    base = load_model_of(recipe)
    base.merged.apply([])
    return base


def bits(base: LoadedModel) -> dict[str, torch.Tensor]:
    """Return every weight of every part as integers, so that 0 and -0 are different."""
    view = {4: torch.int32, 2: torch.int16}
    return {
        f"{part}.{name}": weight.detach().clone().view(view[weight.element_size()])
        for part, module in base.parts.items()
        for name, weight in weights_of(module).items()
    }


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) for name in left
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_random_switches_leave_no_trace(dtype):
    base = fresh_base(dtype)
    pristine = bits(base)
    bound = [base.targets.bind(read_adapter(path)) for path in (LORA, LORA_CONV, LOKR)]
    generator = random.Random(20261122)
    multipliers = [-2.0, -0.75, 0.0, 0.5, 1.0, 2.0]
    for number in range(1, SWITCHES + 1):
        chosen = generator.sample(bound, generator.randint(0, 3))
        base.merged.apply([(adapter, generator.choice(multipliers)) for adapter in chosen])
        if number % 20 == 0:  # a later switch could write over a trace
            base.merged.apply([])
            assert same(bits(base), pristine)

    last = [(bound[2], 0.5), (bound[0], -0.75), (bound[1], 1.0)]
    base.merged.apply(last)
    after_switches = bits(base)
    untouched = fresh_base(dtype)
    in_untouched = {
        adapter.identity: untouched.targets.bind(read_adapter(path))
        for adapter, path in zip(bound, (LORA, LORA_CONV, LOKR), strict=True)
    }
    untouched.merged.apply(
        [(in_untouched[adapter.identity], multiplier) for adapter, multiplier in last]
    )
    assert same(after_switches, bits(untouched))
    assert not same(after_switches, pristine)

    base.merged.apply([])
    assert same(bits(base), pristine)


def test_the_first_adapters_are_merged_without_writing_pristine_weights(
    monkeypatch,
):
    """The values of uninitialised weights do not matter; this test fills them with NaN."""
    empty = torch.empty

    def filled(*args: Any, **options: Any) -> torch.Tensor:
        made = empty(*args, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", filled)
    base = unmerged_model_of(Recipe(prompt="", base_model=str(TINY_BASE)))
    assert all(
        target.weight.is_meta or target.weight.isnan().all()
        for target in base.targets.by_name.values()
    )
    assert base.merged.apply([(base.targets.bind(read_adapter(LORA)), 0.7)]) == len(
        base.targets.by_name
    )
    expected = fresh_base()
    expected.merged.apply([(expected.targets.bind(read_adapter(LORA)), 0.7)])
    assert same(bits(base), bits(expected))


def test_only_weights_that_differ_are_written():
    base = fresh_base()
    lora, conv = (base.targets.bind(read_adapter(path)) for path in (LORA, LORA_CONV))
    assert base.merged.apply([(lora, 1.0)]) == len(lora.deltas)
    assert base.merged.apply([(lora, 1.0)]) == 0
    only_conv = conv.deltas.keys() - lora.deltas.keys()
    assert only_conv
    assert base.merged.apply([(lora, 1.0), (conv, 0.0)]) == 0
    assert base.merged.apply([(conv, 1.0)]) == len(conv.deltas.keys() | lora.deltas.keys())
    assert base.merged.apply([]) == len(conv.deltas)


def test_the_order_of_adapters_is_kept():
    base = fresh_base()
    lora, conv = (base.targets.bind(read_adapter(path)) for path in (LORA, LORA_CONV))
    base.merged.apply([(lora, 0.7), (conv, 0.3)])
    one_way = bits(base)
    base.merged.apply([(conv, 0.3), (lora, 0.7)])
    assert not same(one_way, bits(base))


def test_an_adapter_can_be_applied_twice():
    base = fresh_base()
    lora = base.targets.bind(read_adapter(LORA))
    base.merged.apply([(lora, 0.5), (lora, 0.5)])
    name = next(iter(lora.deltas))
    weight = base.targets.by_name[name].current_weight()
    twice = weight.clone()
    base.merged.apply([(lora, 1.0)])
    assert torch.allclose(twice, weight, atol=1e-6)


def test_a_merge_in_bfloat16_is_rounded_once():
    """The sum is computed in float32 and cast once, instead of adding in bfloat16."""
    base = fresh_base("bfloat16")
    lora = base.targets.bind(read_adapter(LORA))
    name, delta = next(iter(lora.deltas.items()))
    pristine = base.targets.by_name[name].current_weight().clone()
    base.merged.apply([(lora, 1.0)])
    expected = merged(delta, pristine.to(torch.float32), 1.0).to(torch.bfloat16)
    assert torch.equal(base.targets.by_name[name].current_weight(), expected)


def test_several_adapters_in_bfloat16_are_rounded_once_at_the_end():
    base = fresh_base("bfloat16")
    lora, conv = (base.targets.bind(read_adapter(path)) for path in (LORA, LORA_CONV))
    in_one, in_two = [], []
    for name in lora.deltas.keys() & conv.deltas.keys():
        pristine = base.targets.by_name[name].current_weight().to(torch.float32)
        first = merged(lora.deltas[name], pristine, 0.7)
        in_one.append((name, merged(conv.deltas[name], first, 0.3).to(torch.bfloat16)))
        rounded = first.to(torch.bfloat16).to(torch.float32)
        in_two.append((name, merged(conv.deltas[name], rounded, 0.3).to(torch.bfloat16)))
    base.merged.apply([(lora, 0.7), (conv, 0.3)])
    assert all(
        torch.equal(base.targets.by_name[name].current_weight(), expected)
        for name, expected in in_one
    )
    assert not all(
        torch.equal(base.targets.by_name[name].current_weight(), other) for name, other in in_two
    )


@pytest.mark.parametrize("path", [LORA, LORA_CONV], ids=lambda path: path.stem)
def test_an_interrupted_merge_is_repaired_by_the_next_one(path, monkeypatch):
    base = fresh_base()
    pristine = bits(base)
    lora = base.targets.bind(read_adapter(path))
    add, sums = torch.add, []

    def fails_in_the_middle(*args, out):
        sums.append(out)
        if len(sums) == 7:
            out.fill_(1e9)
            raise MemoryError
        return add(*args, out=out)

    monkeypatch.setattr(torch, "add", fails_in_the_middle)
    with pytest.raises(MemoryError):
        base.merged.apply([(lora, 1.0)])
    monkeypatch.undo()
    base.merged.apply([(lora, 1.0)])
    repaired = bits(base)

    untouched = fresh_base()
    untouched.merged.apply([(untouched.targets.bind(read_adapter(path)), 1.0)])
    assert same(repaired, bits(untouched))
    base.merged.apply([])
    assert same(bits(base), pristine)


def test_all_changed_weights_are_released_before_the_first_is_written(
    monkeypatch,
):
    base = fresh_base()
    lora = base.targets.bind(read_adapter(LORA_CONV))
    done: list[tuple[str, PrepackedConv2d]] = []
    for name in ("release_weight", "set_weight"):
        plain = getattr(PrepackedConv2d, name)

        def noted(self, *arguments, name=name, plain=plain):
            done.append((name, self))
            plain(self, *arguments)

        monkeypatch.setattr(PrepackedConv2d, name, noted)
    base.merged.apply([(lora, 1.0)])
    changed = [
        target.module for name, target in base.targets.by_name.items() if name in lora.deltas
    ]
    convolutions = [module for module in changed if isinstance(module, PrepackedConv2d)]
    assert len(convolutions) > 10
    assert done[: len(convolutions)] == [("release_weight", module) for module in convolutions]
    assert [module for name, module in done if name == "set_weight"] == convolutions
    done.clear()
    base.merged.apply([(lora, 1.0)])
    assert done == []


def test_an_adapter_that_does_not_fit_changes_nothing(tmp_path):
    base = fresh_base()
    before = bits(base)
    tensors = {
        "lora_unet_conv_in.lora_down.weight": torch.zeros(2, 4, 3, 3),
        "lora_unet_conv_in.lora_up.weight": torch.zeros(16, 2, 1, 1),
        "lora_unet_no_such_module.lora_down.weight": torch.zeros(2, 16),
        "lora_unet_no_such_module.lora_up.weight": torch.zeros(16, 2),
    }
    with pytest.raises(
        AdapterMismatchError, match="1 of 2 modules do not exist in it: lora_unet_no_such_module"
    ):
        base.targets.bind(read_adapter(save_adapter(tmp_path / "a.safetensors", tensors)))
    assert same(bits(base), before)


def test_a_shape_that_does_not_fit_is_named_with_both_shapes(tmp_path):
    tensors = {
        "lora_unet_conv_in.lora_down.weight": torch.zeros(2, 9, 3, 3),
        "lora_unet_conv_in.lora_up.weight": torch.zeros(16, 2, 1, 1),
    }
    with pytest.raises(
        AdapterMismatchError,
        match=r"has the shape \[16, 9, 3, 3\] instead of \[16, 4, 3, 3\]",
    ):
        fresh_base().targets.bind(read_adapter(save_adapter(tmp_path / "a.safetensors", tensors)))


def test_an_sdxl_adapter_is_recognised_by_its_metadata(tmp_path):
    tensors = {
        "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.zeros(2, 32),
        "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.zeros(64, 2),
    }
    base = fresh_base()
    with pytest.raises(AdapterMismatchError, match=r"trained on sdxl_1\.0"):
        base.targets.bind(
            read_adapter(
                save_adapter(tmp_path / "a.safetensors", tensors, ss_base_model_version="sdxl_1.0")
            )
        )


@pytest.mark.parametrize(
    "name",
    [
        "lora_te_text_model_encoder_layers_0_mlp_fc1",
        "lora_te_encoder_layers_0_mlp_fc1",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1",
        "text_encoder.encoder.layers.0.mlp.fc1",
    ],
)
def test_text_encoder_modules_are_found_by_every_spelling(tmp_path, name):
    base = fresh_base()
    pristine = bits(base)
    tensors = {
        f"{name}.lora_down.weight": torch.ones(2, 32),
        f"{name}.lora_up.weight": torch.ones(64, 2),
    }
    bound = base.targets.bind(read_adapter(save_adapter(tmp_path / "a.safetensors", tensors)))
    base.merged.apply([(bound, 1.0)])
    changed = [key for key, value in bits(base).items() if not torch.equal(value, pristine[key])]
    assert changed == ["text_encoder.encoder.layers.0.mlp.fc1.weight"]


def test_two_modules_of_one_file_for_the_same_weight_are_refused(tmp_path):
    tensors: dict[str, torch.Tensor] = {}
    for name in ("lora_te_text_model_encoder_layers_0_mlp_fc1", "lora_te_encoder_layers_0_mlp_fc1"):
        tensors |= {
            f"{name}.lora_down.weight": torch.ones(2, 32),
            f"{name}.lora_up.weight": torch.ones(64, 2),
        }
    with pytest.raises(AdapterMismatchError, match="names 1 of its 2 modules twice"):
        fresh_base().targets.bind(read_adapter(save_adapter(tmp_path / "a.safetensors", tensors)))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_restored_in_another_precision_equal_loaded_ones(tmp_path, stored, dtype):
    """Original weights are read from the file again and cast exactly as when loading."""
    folder = copy_base(tmp_path)
    change_weights(
        folder / "unet" / "diffusion_pytorch_model.safetensors",
        lambda weights: {name: weight.to(stored) for name, weight in weights.items()},
    )
    base = fresh_base(dtype, folder)
    loaded = bits(base)
    lora, lokr = (base.targets.bind(read_adapter(path)) for path in (LORA, LOKR))
    base.merged.apply([(lora, 0.7), (lokr, 0.3)])
    merged_once = bits(base)
    assert not same(merged_once, loaded)
    base.merged.apply([(lokr, 1.0)])
    base.merged.apply([(lora, 0.7), (lokr, 0.3)])
    assert same(bits(base), merged_once)
    base.merged.apply([])
    assert same(bits(base), loaded)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc/self/maps of Linux")
def test_original_weights_use_no_private_memory():
    """They are mapped from the file, and no copy of a changed weight is kept."""
    base = fresh_base()
    lora = base.targets.bind(read_adapter(LORA))
    kept = {name: target.pristine for name, target in base.targets.by_name.items()}
    base.merged.apply([(lora, 1.0)])
    assert all(base.targets.by_name[name].pristine is weight for name, weight in kept.items())
    mapped = [
        line
        for line in Path("/proc/self/maps").read_text().splitlines()
        if "diffusion_pytorch_model.safetensors" in line
    ]
    ranges = [tuple(int(end, 16) for end in line.split()[0].split("-")) for line in mapped]
    for name in lora.deltas:
        weight = kept[name]
        assert weight is not None
        pointer = weight.data_ptr()
        assert any(start <= pointer < end for start, end in ranges), (
            f"{name} is not mapped from its file"
        )
