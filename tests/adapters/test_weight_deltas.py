"""Adapters of LyCORIS, PEFT and kohya: each file's merged weight, computed a second way."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import pytest
import torch
from safetensors.torch import save_file
from tests.support import merged
from torch import Tensor, nn
from torch.nn import functional

from fidelora.adapters.live import _Hook
from fidelora.adapters.merge import merge_into
from fidelora.adapters.read import Adapter, read_adapter
from fidelora.adapters.targets import Target
from fidelora.errors import AdapterFormatError

OUT, IN, RANK = 12, 15, 4
LINEAR, CONV_1, CONV_3 = (OUT, IN), (OUT, IN, 1, 1), (OUT, IN, 3, 3)
SHAPES = pytest.mark.parametrize(
    "shape", [LINEAR, CONV_1, CONV_3], ids=["linear", "conv 1x1", "conv 3x3"]
)
MULTIPLIERS = pytest.mark.parametrize("multiplier", [1.0, 0.6])


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 2


LOHA = (("a", (OUT, RANK)), ("b", (RANK, IN)))
GLORA = (("a1", (IN, RANK)), ("a2", (RANK, IN)), ("b1", (OUT, RANK)), ("b2", (RANK, IN)))


@pytest.fixture
def read(tmp_path):
    def write_and_read(tensors: Mapping[str, Tensor], **metadata: str) -> Adapter:
        path = tmp_path / "x.safetensors"
        save_file({key: one.contiguous() for key, one in tensors.items()}, path, metadata or None)
        return read_adapter(path)

    return write_and_read


def check(adapter: Adapter, weight: Tensor, multiplier: float, expected: Tensor) -> None:
    """Compare the merged weight and the output of the live path with the expected weight."""
    delta = next(iter(adapter.deltas.values()))
    assert delta.shape_for(weight.shape) == tuple(weight.shape)
    delta = delta.fitted(weight.shape)
    torch.testing.assert_close(
        merged(delta, weight, multiplier), expected.float(), rtol=1e-5, atol=1e-5
    )
    is_conv = weight.dim() == 4
    module = (
        nn.Conv2d(IN, OUT, (weight.shape[2], weight.shape[3])) if is_conv else nn.Linear(IN, OUT)
    )
    x = numbers(2, IN, 5, 5, seed=9) if is_conv else numbers(2, IN, seed=9)
    apply = functional.conv2d if is_conv else functional.linear
    with torch.no_grad():
        module.weight.copy_(weight)
        target = Target("unet.x", module, module.weight, module.bias)
        module.register_forward_hook(_Hook(target, [(delta, multiplier)]))
        torch.testing.assert_close(
            module(x), apply(x, expected.float(), module.bias), rtol=1e-4, atol=1e-4
        )


def lora(shape: tuple[int, ...], names: tuple[str, str] = ("lora_down.weight", "lora_up.weight")):
    down, up = names
    ones = [1] * (len(shape) - 2)
    return {
        f"m.{down}": numbers(RANK, *shape[1:], seed=1),
        f"m.{up}": numbers(OUT, RANK, *ones, seed=2),
    }


def product_of(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return `up @ down` of a LoRA in float64."""
    down, up = (one.double() for one in list(tensors.values())[:2])
    return torch.einsum("or,ri...->oi...", up.flatten(1), down)


# --- LoRA: spellings and scales -------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ("lora.down.weight", "lora.up.weight"),
        ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
        ("processor.to_q_lora.down.weight", "processor.to_q_lora.up.weight"),
        ("lora_A.weight", "lora_B.weight"),
        ("lora_A.some_name.weight", "lora_B.some_name.weight"),
        ("lora_A", "lora_B"),
    ],
)
def test_each_spelling_of_a_lora_without_alpha_has_scale_1(read, names):
    tensors, weight = lora(LINEAR, names), numbers(*LINEAR)
    check(read(tensors), weight, 0.6, weight.double() + 0.6 * product_of(tensors))


@pytest.mark.parametrize("shape", [CONV_1, CONV_3], ids=["1x1", "3x3"])
def test_a_convolution_stored_as_matrices_has_the_same_delta(read, shape):
    tensors, weight = lora(shape), numbers(*shape)
    flat = {key: one.flatten(1) for key, one in tensors.items()}
    check(read(flat), weight, 0.6, weight.double() + 0.6 * product_of(tensors))
    mixed = {key: one.flatten(1) if "up" in key else one for key, one in tensors.items()}
    check(read(mixed), weight, 0.6, weight.double() + 0.6 * product_of(tensors))


def test_a_matrix_stored_as_a_convolution_has_the_same_delta(read):
    tensors, weight = lora(LINEAR), numbers(*LINEAR)
    wide = {key: one[:, :, None, None] for key, one in tensors.items()}
    check(read(wide), weight, 1.0, weight.double() + product_of(tensors))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_widened_exactly(read, dtype):
    stored = {key: one.to(dtype) for key, one in lora(LINEAR).items()}
    delta = read(stored).deltas["m"]
    expected = [one.float() for one in stored.values()]
    assert all(map(torch.equal, delta.tensors(), expected))


@pytest.mark.parametrize(
    ("config", "scales"),
    [
        ({"unet.lora_alpha": 8, "unet.rank_pattern": {"b": 8}}, {"unet.a": 2, "unet.b": 1}),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"b": 4}}, {"unet.a": 2, "unet.b": 0.5}),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"^b": 4}}, {"unet.x.b": 2, "unet.b": 0.5}),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"b": 4}}, {"unet.x.b": 1, "unet.xb": 1}),
        (
            {"unet.lora_alpha": 8, "text_encoder.lora_alpha": 4},
            {"unet.a": 2, "text_encoder.b": 0.5},
        ),
        ({"unet.lora_alpha": 6, "unet.use_rslora": True}, {"unet.a": 3, "unet.b": 6 / 8**0.5}),
        ({"unet.lora_alpha": 0}, {"unet.a": 0, "unet.b": 0}),
        ({"lora_alpha": 8}, {"base_model.model.down_blocks.0.a": 2, "unet.b": 1}),
    ],
)
def test_peft_metadata_gives_each_module_its_scale(read, config, scales):
    """The first module has rank 4, the second rank 8."""
    tensors = {}
    for (module, _), rank in zip(scales.items(), (4, 8), strict=True):
        tensors[f"{module}.lora_A.weight"] = numbers(rank, IN)
        tensors[f"{module}.lora_B.weight"] = numbers(OUT, rank)
    found = read(tensors, lora_adapter_metadata=json.dumps(config)).deltas
    assert {module: delta.scale for module, delta in found.items()} == pytest.approx(scales)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"(a|b)": 4}}, "regular expression"),
        ({"unet.lora_alpha": 8, "unet.use_dora": True}, "no lora_magnitude_vector"),
        ({"unet.alpha": 8, "unet.r": 4}, "alpha 8 and rank 4 differ in unet"),
        ({"text_encoder.lora_alpha": 8, "text_encoder_2.lora_alpha": 4}, "but none for unet.a"),
    ],
)
def test_peft_metadata_that_is_unclear_is_refused(read, config, message):
    tensors = {"unet.a.lora_A.weight": numbers(4, IN), "unet.a.lora_B.weight": numbers(OUT, 4)}
    with pytest.raises(AdapterFormatError, match=message):
        read(tensors, lora_adapter_metadata=json.dumps(config))


def test_alpha_0_is_the_rank_only_in_files_of_the_trainer(read):
    tensors = {**lora(LINEAR), "m.alpha": torch.tensor(0.0)}
    assert read(tensors).deltas["m"].scale == 0
    software = '{"name": "ai-toolkit", "version": "0.12.0"}'
    assert read(tensors, software=software).deltas["m"].scale == 1


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr", "whole lokr", "glora"])
def test_a_scalar_of_lycoris_multiplies_the_change(read, kind):
    tensors = {
        "lora": lora(LINEAR),
        "dora": {**lora(LINEAR), "m.dora_scale": numbers(OUT, 1, seed=5).abs() + 0.5},
        "loha": {f"m.hada_w{n}_{p}": numbers(*s, seed=n) for n in (1, 2) for p, s in LOHA},
        "lokr": {
            "m.lokr_w1": numbers(3, 5, seed=1),
            "m.lokr_w2_a": numbers(4, 2, seed=2),
            "m.lokr_w2_b": numbers(2, 3, seed=3),
        },
        "whole lokr": {"m.lokr_w1": numbers(3, 5, seed=1), "m.lokr_w2": numbers(4, 3, seed=2)},
        "glora": {f"m.{part}.weight": numbers(*s, seed=n) for n, (part, s) in enumerate(GLORA)},
    }[kind]
    factor = {
        "lora": "m.lora_up.weight", "dora": "m.lora_up.weight", "loha": "m.hada_w1_a",
        "lokr": "m.lokr_w1", "whole lokr": "m.lokr_w1",
    }  # fmt: skip
    changed = [factor[kind]] if kind in factor else ["m.a2.weight", "m.b2.weight"]
    # A power of two, so that both orders of multiplication give the same bits.
    folded = {key: tensor * (0.25 if key in changed else 1) for key, tensor in tensors.items()}
    weight = numbers(*LINEAR)
    for multiplier in (1.0, -0.6):
        deltas = (
            read({**tensors, "m.scalar": torch.tensor(0.25)}).deltas["m"],
            read(folded).deltas["m"],
        )
        one, other = (delta.change(weight, multiplier) for delta in deltas)
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
        assert one.abs().max() > 0.01


def test_a_scalar_is_refused_where_lycoris_has_none(read):
    tensors = {"m.oft_blocks": torch.zeros(4, 3, 3), "m.scalar": torch.tensor(0.5)}
    with pytest.raises(AdapterFormatError, match="is incomplete"):
        read(tensors)


# --- Tucker decomposition -------------------------------------------------------------------------


def tucker(core: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return sum_ij core[i, j] * rows[i] * columns[j] in float64, written out."""
    result = torch.zeros(rows.shape[1], columns.shape[1], *core.shape[2:], dtype=torch.float64)
    for i in range(core.shape[0]):
        for j in range(core.shape[1]):
            outer = torch.outer(rows[i].double(), columns[j].double())
            result += outer[:, :, None, None] * core[i, j].double()
    return result


@MULTIPLIERS
def test_a_locon_with_tucker_matches_its_formula(read, multiplier):
    down, up = numbers(RANK, IN, 1, 1, seed=1), numbers(OUT, RANK, 1, 1, seed=2)
    mid, weight = numbers(RANK, RANK, 3, 3, seed=3), numbers(*CONV_3)
    tensors = {
        "m.lora_down.weight": down,
        "m.lora_up.weight": up,
        "m.lora_mid.weight": mid,
        "m.alpha": torch.tensor(2.0),
    }
    change = tucker(mid, up.flatten(1).T, down.flatten(1)) * 0.5
    check(read(tensors), weight, multiplier, weight.double() + multiplier * change)


@MULTIPLIERS
def test_a_loha_with_tucker_matches_its_formula(read, multiplier):
    tensors, halves = {"m.alpha": torch.tensor(2.0)}, []
    for half in (1, 2):
        core = numbers(RANK, RANK, 3, 3, seed=half)
        rows, columns = numbers(RANK, OUT, seed=half + 2), numbers(RANK, IN, seed=half + 4)
        tensors |= {
            f"m.hada_t{half}": core,
            f"m.hada_w{half}_a": rows,
            f"m.hada_w{half}_b": columns,
        }
        halves.append(tucker(core, rows, columns))
    weight = numbers(*CONV_3)
    expected = weight.double() + multiplier * 0.5 * halves[0] * halves[1]
    check(read(tensors), weight, multiplier, expected)


def test_a_lokr_with_tucker_matches_its_formula(read):
    w1, core = numbers(3, 5, seed=1), numbers(2, 2, 3, 3, seed=2)
    rows, columns = numbers(2, 4, seed=3), numbers(2, 3, seed=4)
    tensors = {
        "m.lokr_w1": w1,
        "m.lokr_t2": core,
        "m.lokr_w2_a": rows,
        "m.lokr_w2_b": columns,
        "m.alpha": torch.tensor(1.0),
    }
    second = tucker(core, rows, columns)
    product = torch.einsum("ab,cdkl->acbdkl", w1.double(), second).reshape(CONV_3)
    weight = numbers(*CONV_3)
    check(read(tensors), weight, 0.6, weight.double() + 0.6 * 0.5 * product)


# --- DoRA -----------------------------------------------------------------------------------------


def row_norms(weight: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(weight.flatten(1), dim=1)
    return norms.view(-1, *[1] * (weight.dim() - 1))


@SHAPES
@MULTIPLIERS
@pytest.mark.parametrize("axis", [0, 1], ids=["rows", "columns"])
def test_a_dora_of_lycoris_matches_its_formula(read, shape, multiplier, axis):
    tensors, weight = lora(shape), numbers(*shape)
    scale_shape = [1] * len(shape)
    scale_shape[axis] = shape[axis]
    magnitude = numbers(*scale_shape, seed=5).abs() + 0.5
    changed = weight.double() + 0.5 * product_of(tensors)
    norms = row_norms(changed) if axis == 0 else row_norms(changed.transpose(0, 1)).transpose(0, 1)
    decomposed = changed / norms * magnitude.double()
    expected = weight.double() + multiplier * (decomposed - weight.double())
    dora = {**tensors, "m.dora_scale": magnitude, "m.alpha": torch.tensor(2.0)}
    check(read(dora), weight, multiplier, expected)


@SHAPES
@MULTIPLIERS
def test_a_dora_of_peft_matches_its_formula(read, shape, multiplier):
    tensors, weight = lora(shape, ("lora_A.weight", "lora_B.weight")), numbers(*shape)
    magnitude = numbers(OUT, seed=5).abs() + 0.5
    changed = weight.double() + multiplier * product_of(tensors)
    ones = [1] * (len(shape) - 2)
    expected = changed / row_norms(changed) * magnitude.double().view(-1, 1, *ones)
    stored = magnitude if len(shape) == 2 else magnitude.view(1, -1, 1, 1)
    for key in ("lora_magnitude_vector", "lora_magnitude_vector.weight"):
        check(read({**tensors, f"m.{key}": stored}), weight, multiplier, expected)


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_loha_and_lokr_can_be_decomposed(read, kind):
    weight, magnitude = numbers(*LINEAR), numbers(1, IN, seed=5).abs() + 0.5
    if kind == "loha":
        names = {"w1_a": (OUT, 2), "w1_b": (2, IN), "w2_a": (OUT, 2), "w2_b": (2, IN)}
        tensors = {f"m.hada_{key}": numbers(*s, seed=n) for n, (key, s) in enumerate(names.items())}
        one, two, three, four = (tensor.double() for tensor in tensors.values())
        change = (one @ two) * (three @ four)
    else:
        tensors = {"m.lokr_w1": numbers(3, 5, seed=1), "m.lokr_w2": numbers(4, 3, seed=2)}
        change = torch.kron(*(tensor.double() for tensor in tensors.values()))
    changed = weight.double() + change
    expected = changed / changed.norm(dim=0) * magnitude.double()
    check(read({**tensors, "m.dora_scale": magnitude}), weight, 1.0, expected)


def test_adapters_before_a_dora_are_part_of_its_weight(read):
    first, weight = read(lora(LINEAR)).deltas["m"], numbers(*LINEAR)
    magnitude = numbers(OUT, 1, seed=5).abs() + 0.5
    dora = read({**lora(LINEAR), "m.dora_scale": magnitude}).deltas["m"]
    result = torch.empty_like(weight)
    merge_into(result, weight, [[(first, 0.5), (dora, 1.0)]])
    torch.testing.assert_close(row_norms(result), magnitude, rtol=1e-5, atol=1e-5)


# --- GLoRA, (IA)^3, OFT, BOFT, full ---------------------------------------------------------------


@MULTIPLIERS
@pytest.mark.parametrize(
    ("shape", "is_old"),
    [(LINEAR, False), (LINEAR, True), (CONV_1, False), (CONV_3, False)],
    ids=["linear", "old order", "conv 1x1", "conv 3x3"],
)
def test_a_glora_matches_its_formula(read, shape, multiplier, is_old):
    ones = [1] * (len(shape) - 2)
    a1, a2 = numbers(IN, RANK, *ones, seed=1), numbers(RANK, IN, *ones, seed=2)
    b1, b2 = numbers(OUT, RANK, *ones, seed=3), numbers(RANK, *shape[1:], seed=4)
    weight = numbers(*shape)
    inner = a1.flatten(1).double() @ a2.flatten(1).double()
    change = torch.einsum("oi...,ij->oj...", weight.double(), inner)
    change += (b1.flatten(1).double() @ b2.flatten(1).double()).view(shape)
    if is_old:
        a1, a2, b1, b2 = a2, a1, b2, b1
    names = {"a1": a1, "a2": a2, "b1": b1, "b2": b2}
    tensors = {f"m.{key}.weight": tensor for key, tensor in names.items()}
    adapter = read({**tensors, "m.alpha": torch.tensor(2.0)})
    check(adapter, weight, multiplier, weight.double() + multiplier * 0.5 * change)


@SHAPES
@MULTIPLIERS
@pytest.mark.parametrize("on_input", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16])
def test_an_ia3_matches_its_formula(read, shape, multiplier, on_input, dtype):
    count = IN if on_input else OUT
    factors, weight = numbers(count, seed=1), numbers(*shape)
    stored = factors if len(shape) == 2 else factors.view(1, -1, 1, 1)
    tensors = {"m.weight": stored, "m.on_input": torch.tensor([on_input]).to(dtype)}
    expected = weight.double().clone()
    for index in range(count):
        place = (slice(None), index) if on_input else index
        expected[place] *= 1 + multiplier * float(factors[index])
    check(read(tensors), weight, multiplier, expected)


def cayley(block: Tensor, limit: float = math.inf, norm: float = 0.0) -> Tensor:
    skew = block.double() - block.double().T
    if norm > limit:
        skew *= limit / norm
    eye = torch.eye(len(block), dtype=torch.float64)
    rotation: Tensor = (eye + skew) @ torch.linalg.inv(eye - skew)
    return rotation


@SHAPES
@MULTIPLIERS
@pytest.mark.parametrize("alpha", [None, 0.0, 0.05])
@pytest.mark.parametrize("module", ["oft_unet_m", "lora_unet_m"])
def test_an_oft_matches_its_formula(read, shape, multiplier, alpha, module):
    blocks, rescale = numbers(3, 4, 4, seed=1), numbers(OUT, seed=2).abs() + 0.5
    tensors = {f"{module}.oft_blocks": blocks}
    ones = [1] * (len(shape) - 1)
    if module == "lora_unet_m":
        tensors[f"{module}.rescale"] = rescale.view(-1, *ones)
    if alpha is not None:
        tensors[f"{module}.alpha"] = torch.tensor(alpha)
    norm = float((blocks.double() - blocks.double().transpose(1, 2)).norm())
    is_limited = bool(alpha) or (alpha == 0 and module == "oft_unet_m")
    limit = alpha * OUT if is_limited and alpha is not None else math.inf
    weight, expected = numbers(*shape), torch.empty(shape, dtype=torch.float64)
    for number, block in enumerate(blocks):
        eye = torch.eye(4, dtype=torch.float64)
        rotation = multiplier * (cayley(block, limit, norm) - eye) + eye
        rows = slice(4 * number, 4 * number + 4)
        expected[rows] = (rotation.T @ weight[rows].double().flatten(1)).view(4, *shape[1:])
    if module == "lora_unet_m":
        expected *= rescale.double().view(-1, *ones)
    check(read(tensors), weight, multiplier, expected)


@MULTIPLIERS
def test_a_boft_matches_its_formula(read, multiplier):
    """Two factors of blocks of 2: the second one rotates rows at the distance 2."""
    blocks, weight = numbers(2, 6, 2, 2, seed=1), numbers(*LINEAR)
    expected = weight.double().clone()
    for stride, factor in zip((1, 2), blocks, strict=True):
        pairs = [row for row in range(OUT) if row // stride % 2 == 0]
        for block, row in zip(factor, pairs, strict=True):
            eye = torch.eye(2, dtype=torch.float64)
            rotation = multiplier * (cayley(block) - eye) + eye
            both = [row, row + stride]
            expected[both] = rotation @ expected[both]
    check(read({"m.oft_blocks": blocks}), weight, multiplier, expected)


@SHAPES
@MULTIPLIERS
def test_weight_differences_are_scaled_and_added(read, shape, multiplier):
    weight, difference = numbers(*shape), numbers(*shape, seed=1)
    adapter = read({"m.diff": difference, "m.diff_b": numbers(OUT, seed=2)})
    check(adapter, weight, multiplier, weight.double() + multiplier * difference.double())
    bias = numbers(OUT, seed=3)
    torch.testing.assert_close(
        merged(adapter.biases["m"], bias, multiplier), bias + multiplier * numbers(OUT, seed=2)
    )


@pytest.mark.parametrize(
    ("down", "up", "end"),
    [
        ("lora_A.weight", "lora_B.weight", "lora_B.bias"),
        ("lora_A.default.weight", "lora_B.default.weight", "lora_B.default.bias"),
        ("lora_down.weight", "lora_up.weight", "lora_up.bias"),
        ("lora.down.weight", "lora.up.weight", "lora.up.bias"),
    ],
)
def test_the_bias_of_a_lora_of_peft_is_scaled(read, down, up, end):
    tensors = {**lora(LINEAR, (down, up)), f"m.{end}": numbers(OUT)}
    metadata = json.dumps({"lora_alpha": 2})
    bias = read(tensors, lora_adapter_metadata=metadata).biases["m"]
    assert torch.equal(merged(bias, torch.zeros(OUT), 1.0), numbers(OUT) * 0.5)


@pytest.mark.parametrize(
    "tensors",
    [
        {"m.oft_blocks": torch.ones(2, 4, 3)},
        {"m.oft_blocks": torch.ones(3, 3, 4, 4)},
        {"m.weight": torch.ones(3, 2), "m.on_input": torch.tensor(True)},
        {"m.diff_b": torch.ones(3, 2)},
        {**lora(LINEAR), "m.dora_scale": torch.ones(OUT)},
        {**lora(LINEAR), "m.dora_scale": torch.ones(OUT, IN)},
        {**lora(CONV_3), "m.lora_mid.weight": torch.ones(RANK, RANK, 3, 3)},
        {
            "m.a1.weight": torch.ones(IN, 4),
            "m.a2.weight": torch.ones(5, IN),
            "m.b1.weight": torch.ones(OUT, 4),
            "m.b2.weight": torch.ones(4, IN),
        },
    ],
    ids=["oft", "boft", "ia3", "bias", "dora", "dora axes", "tucker", "glora"],
)
def test_invalid_shapes_are_refused_with_the_module(read, tensors):
    with pytest.raises(AdapterFormatError, match=r"The shapes of m in .* are not valid for a"):
        read(tensors)
