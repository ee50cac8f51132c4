"""Reading of adapter files, and the change that each adapter makes to a weight."""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tests.support import merged
from torch import nn
from torch.nn import functional

from fidelora.adapters.deltas import LohaDelta, LokrDelta, LoraDelta
from fidelora.adapters.read import read_adapter
from fidelora.adapters.tensor_names import noise_of_trainer, trainer_version
from fidelora.errors import (
    AdapterError,
    AdapterFormatError,
    AdapterNotFoundError,
    NonFiniteWeightsError,
    PickleRefusedError,
    WeightsFileError,
)


def numbers(*shape, seed=0):
    """Return random float32 numbers, the same ones at each call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lora(rank=4, inputs=6, outputs=8, kernel=(), module="unet.a", alpha: float | None = 2.0):
    """Return the tensors of a LoRA of one module, with kohya's names."""
    tensors = {
        f"{module}.lora_down.weight": numbers(rank, inputs, *kernel, seed=1),
        f"{module}.lora_up.weight": numbers(outputs, rank, *[1] * len(kernel), seed=2),
    }
    return tensors if alpha is None else {**tensors, f"{module}.alpha": torch.tensor(alpha)}


def lokr(first, second, alpha: float | None = 2.0):
    """Return the tensors of a LoKr of module `a`; a factor has two shapes if it is decomposed."""
    tensors: dict[str, torch.Tensor] = {}
    for stem, shapes in (("lokr_w1", first), ("lokr_w2", second)):
        names = [stem] if len(shapes) == 1 else [f"{stem}_a", f"{stem}_b"]
        tensors |= {
            f"a.{name}": numbers(*shape, seed=len(name))
            for name, shape in zip(names, shapes, strict=True)
        }
    return tensors if alpha is None else {**tensors, "a.alpha": torch.tensor(alpha)}


def loha(rank=4, inputs=6, outputs=8, alpha: float | None = 2.0):
    tensors = {
        "a.hada_w1_a": numbers(outputs, rank, seed=1),
        "a.hada_w1_b": numbers(rank, inputs, seed=2),
        "a.hada_w2_a": numbers(outputs, rank, seed=3),
        "a.hada_w2_b": numbers(rank, inputs, seed=4),
    }
    return tensors if alpha is None else {**tensors, "a.alpha": torch.tensor(alpha)}


@pytest.fixture
def read(tmp_path):
    """Return a function that writes tensors to `style.safetensors` and reads it as an adapter."""

    def write_and_read(tensors, metadata=None):
        path = tmp_path / "style.safetensors"
        save_file(tensors, path, metadata=metadata)
        return read_adapter(path)

    return write_and_read


# --- LoRA ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        (torch.float16, "F16"),
        (torch.bfloat16, "BF16"),
        (torch.float32, "F32"),
        (torch.float64, "F64"),
    ],
)
def test_a_lora_of_any_float_type_becomes_float32(read, dtype, stored):
    tensors = {name: tensor.to(dtype) for name, tensor in lora().items()}
    adapter = read(tensors)
    delta = adapter.deltas["unet.a"]
    assert isinstance(delta, LoraDelta)
    assert delta.down.dtype == delta.up.dtype == torch.float32
    assert torch.equal(delta.down, tensors["unet.a.lora_down.weight"].to(torch.float32))
    assert torch.equal(delta.up, tensors["unet.a.lora_up.weight"].to(torch.float32))


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
def test_a_lora_of_a_convolution_is_read(read, kernel):
    delta = read(lora(rank=4, inputs=6, outputs=8, kernel=kernel)).deltas["unet.a"]
    assert isinstance(delta, LoraDelta)
    assert delta.down.shape == (4, 6, *kernel)
    assert delta.up.shape == (8, 4, 1, 1)
    assert delta.scale == 0.5


@pytest.mark.parametrize(
    ("alpha", "scale"), [(None, 1.0), (0.0, 0.0), (4.0, 1.0), (2.0, 0.5), (8.0, 2.0), (-2.0, -0.5)]
)
def test_the_scale_of_a_lora_is_alpha_divided_by_rank(read, alpha, scale):
    assert read(lora(rank=4, alpha=alpha)).deltas["unet.a"].scale == scale


@pytest.mark.parametrize(
    "alpha",
    [
        torch.tensor([2.0]),
        torch.tensor(2, dtype=torch.int64),
        torch.tensor(2.0, dtype=torch.bfloat16),
    ],
)
def test_alpha_is_read_in_several_forms(read, alpha):
    assert read({**lora(alpha=None), "unet.a.alpha": alpha}).deltas["unet.a"].scale == 0.5


@pytest.mark.parametrize(
    ("down", "up"), [("lora_A", "lora_B"), ("lora_A.default", "lora_B.default")]
)
def test_a_lora_with_the_names_of_peft_is_read(read, down, up):
    delta = read(
        {f"unet.a.{down}.weight": numbers(4, 6), f"unet.a.{up}.weight": numbers(8, 4, seed=1)}
    ).deltas["unet.a"]
    assert isinstance(delta, LoraDelta)
    assert torch.equal(delta.down, numbers(4, 6))
    assert torch.equal(delta.up, numbers(8, 4, seed=1))
    assert delta.scale == 1.0


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"unet.lora_alpha": 2}, 0.5),
        ({"lora_alpha": 8.0}, 2.0),
        ({"unet.lora_alpha": 2, "text_encoder.lora_alpha": 2.0}, 0.5),
        ({"unet.lora_alpha": 0}, 0.0),
        ({"unet.lora_alpha": 2, "unet.alpha_pattern": {}, "unet.rank_pattern": {}}, 0.5),
        ({"unet.r": 4}, 1.0),
    ],
)
def test_alpha_comes_from_the_metadata_of_peft_if_the_modules_have_none(read, config, scale):
    adapter = read(lora(rank=4, alpha=None), {"lora_adapter_metadata": json.dumps(config)})
    assert adapter.deltas["unet.a"].scale == scale


def test_alpha_of_a_module_takes_precedence_over_the_metadata(read):
    adapter = read(lora(rank=4, alpha=2.0), {"lora_adapter_metadata": '{"unet.lora_alpha": 16}'})
    assert adapter.deltas["unet.a"].scale == 0.5


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1]", "5", '{"lora_alpha": "four"}', '{"lora_alpha": null}', '{"lora_alpha": [4]}'],
)
def test_invalid_peft_metadata_is_refused(read, text):
    with pytest.raises(AdapterFormatError, match="lora_adapter_metadata that cannot be read"):
        read(lora(alpha=None), {"lora_adapter_metadata": text})


# --- LoKr and LoHa -------------------------------------------------------------------------------

WHOLE_1, SPLIT_1 = ((3, 6),), ((3, 4), (4, 6))
WHOLE_2, SPLIT_2 = ((4, 5),), ((4, 2), (2, 5))


@pytest.mark.parametrize(
    ("first", "second", "scale"),
    [(WHOLE_1, SPLIT_2, 1.5), (SPLIT_1, WHOLE_2, 0.75), (((3, 2), (2, 6)), SPLIT_2, 1.5)],
    ids=["second split", "first split", "both split"],
)
def test_the_scale_of_a_factored_lokr_is_alpha_divided_by_rank(read, first, second, scale):
    delta = read(lokr(first, second, alpha=3.0)).deltas["a"]
    assert isinstance(delta, LokrDelta)
    assert tuple(tuple(factor.shape) for factor in delta.w1) == first
    assert tuple(tuple(factor.shape) for factor in delta.w2) == second
    assert delta.scale == scale


@pytest.mark.parametrize("alpha", [None, 0.0, 2.0, 1e10, math.inf, math.nan])
def test_alpha_is_ignored_in_a_lokr_with_full_matrices(read, alpha):
    """The trainer stores an alpha of 1e10 in such modules, which is infinite in float16."""
    delta = read(lokr(WHOLE_1, WHOLE_2, alpha)).deltas["a"]
    assert isinstance(delta, LokrDelta)
    assert delta.scale == 1.0
    assert torch.equal(delta.w1[0], numbers(3, 6, seed=len("lokr_w1")))
    assert torch.equal(delta.w2[0], numbers(4, 5, seed=len("lokr_w2")))


def test_an_infinite_alpha_of_a_factored_lokr_is_refused(read):
    with pytest.raises(NonFiniteWeightsError, match=r"NaN or infinity in a\.alpha"):
        read(lokr(WHOLE_1, SPLIT_2, math.inf))


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (0.0, 0.0), (2.0, 0.5)])
def test_a_loha_is_read(read, alpha, scale):
    tensors = loha(rank=4, alpha=alpha)
    delta = read(tensors).deltas["a"]
    assert isinstance(delta, LohaDelta)
    assert delta.scale == scale
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    assert all(
        torch.equal(found, tensors[f"a.{name}"])
        for found, name in zip(delta.tensors(), names, strict=True)
    )


# --- the whole file ------------------------------------------------------------------------------


def test_an_adapter_has_hash_name_modules_metadata_and_size(tmp_path):
    path = tmp_path / "my style.v2.safetensors"
    save_file(
        lora(module="b") | loha() | lora(module="unet.a.b", alpha=None),
        path,
        metadata={"who": "trainer"},
    )
    adapter = read_adapter(path)
    assert adapter.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert adapter.name == "my style.v2"
    assert set(adapter.deltas) == {"a", "b", "unet.a.b"}
    assert adapter.metadata == {"who": "trainer"}
    tensors = 4 * (2 * (4 * 6 + 8 * 4) + 2 * (4 * 6 + 8 * 4))
    assert adapter.size_bytes == tensors + sys.getsizeof("trainer")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(
        AdapterNotFoundError, match=r"The adapter file .*nowhere\.safetensors does not exist"
    ):
        read_adapter(tmp_path / "nowhere.safetensors")


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(AdapterNotFoundError, match="is a folder, not an adapter file"):
        read_adapter(tmp_path)


def test_a_file_with_a_pickle_extension_is_refused(tmp_path):
    path = tmp_path / "style.pt"
    torch.save(lora(), path)
    with pytest.raises(PickleRefusedError, match=r"style\.pt is a Python pickle"):
        read_adapter(path)


def test_a_truncated_file_is_refused(tmp_path):
    path = tmp_path / "style.safetensors"
    save_file(lora(), path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WeightsFileError, match="is truncated"):
        read_adapter(path)


def test_a_file_without_tensors_is_refused(read):
    with pytest.raises(AdapterFormatError, match="has no tensors"):
        read({}, {"who": "trainer"})


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("unet.a.oft_R.weight", "is an OFT in the format of PEFT"),
        ("unet.a.boft_R", "is a BOFT in the format of PEFT"),
        ("unet.a.ia3_l", "is an (IA)^3 in the format of PEFT"),
        ("unet.a.vera_lambda_b", "is a VeRA"),
        ("unet.a.oft_diag", "is an OFT in a format that LyCORIS has replaced"),
        ("unet.a.bm.weight", "is a GLoRA with the Tucker decomposition"),
        ("unet.a.set_weight", "replaces weights"),
        ("unet.a.bias_indices", "has sparse biases"),
        ("unet.a.scale_weight", "is quantised with separate scales"),
        ("unet.a.delora_lambda", "is a DeLoRA in the format of PEFT"),
        ("base_model.vera_A", "is a VeRA in the format of PEFT"),
        ("unet.a.lora_down1.weight", "is an ABBA"),
        ("unet.a.lora_up_b.weight", "is an ABBA"),
        ("unet.a.lora_A2", "is an ABBA"),
        ("unet.a.lora_B_1.weight", "is an ABBA"),
        ("unet.a.abba_a1", "is an ABBA"),
        ("unet.a.lambda_layer", "is a T-LoRA"),
        ("unet.a.q_layer.weight", "is a T-LoRA"),
        ("unet.a.base_p.weight", "is a T-LoRA"),
        ("unet.a.up_list.0", "is a DyLoRA"),
        ("unet.a.lora_A.3", "is a DyLoRA"),
        ("unet.a.lora_A.bias", "has a bias in the first factor"),
        ("unet.a.lora_down.bias", "has a bias in the first factor"),
        ("unet.a.lora_A.default.bias", "has a bias in the first factor"),
        ("transformer_blocks.0.qkv_proj.lora_down", "in the format of Nunchaku (SVDQuant)"),
        ("transformer_blocks.0.qkv_proj.smooth_factor", "has quantised weights (SVDQuant"),
        ("double_blocks.0.img_attn.norm.key_norm.scale", "is a control LoRA of FLUX.1"),
        ("scaled_fp8", "is quantised with separate scales"),
        ("double_blocks.0.processor.q_loras.0.down.weight", "is an EasyControl LoRA"),
        ("unet:0:up", "is a LoRA in the format of cloneofsimo's trainer"),
        ("lora_controlnet", "is a Control-LoRA"),
    ],
)
def test_an_adapter_of_an_unsupported_kind_is_refused_with_its_reason(read, key, reason):
    with pytest.raises(AdapterFormatError) as raised:
        read({**lora(), key: torch.ones(8, 1)})
    assert reason in str(raised.value)
    assert f"({key})" in str(raised.value)


@pytest.mark.parametrize("key", ["step", "epoch", "global_step"])
def test_counters_of_the_training_have_no_effect(read, key):
    plain, counted = read(lora()), read({**lora(), key: torch.tensor(1200)})
    assert counted.modules == plain.modules
    (module,) = plain.modules
    shape = plain.deltas[module].shape_for(torch.Size((0, 0)))
    assert counted.deltas[module].shape_for(torch.Size((0, 0))) == shape
    embedding = read({"emb_params": torch.ones(2, 768), key: torch.tensor([1200])})
    assert embedding.is_embedding
    with pytest.raises(AdapterFormatError, match="stores steps_taken as I64"):
        read({**lora(), "steps_taken": torch.tensor(1200)})


@pytest.mark.parametrize(
    ("module", "what"),
    [
        ("controlnet.down_blocks.0.attn1.to_q", "a LoRA of a ControlNet"),
        ("lora_controlnet_down_blocks_0_attn1_to_q", "a LoRA of a ControlNet"),
        ("unet.down_blocks.0.motion_modules.0.attn1.to_q", "a motion module of AnimateDiff"),
        ("lora_unet_down_blocks_0_motion_modules_0_attn1_to_q", "a motion module of AnimateDiff"),
        ("ip_adapter.0.to_q", "an IP-Adapter"),
        ("lllite_unet_input_blocks_1_1_attn1_to_q", "a ControlNet-LLLite"),
    ],
)
def test_a_lora_of_something_else_is_refused_with_its_name(read, module, what):
    with pytest.raises(AdapterFormatError, match=f"is {what}.*, which is not supported"):
        read(lora(module=module))


@pytest.mark.parametrize("key", ["body.0.in_conv.weight", "adapter.body.0.resnets.0.block1.weight"])
def test_a_t2i_adapter_is_refused_with_its_name(read, key):
    with pytest.raises(AdapterFormatError, match="is a T2I-Adapter"):
        read({key: torch.ones(2, 2)})


@pytest.mark.parametrize("keys", [["t5"], ["clip_l", "t5"], ["clip_l", "t5xxl"]])
def test_an_embedding_for_t5_is_refused_with_its_name(read, keys):
    tensors = {key: torch.ones(2, 4096 if "t5" in key else 768) for key in keys}
    with pytest.raises(AdapterFormatError, match=f"for the text encoder {keys[-1]}"):
        read(tensors)


def test_a_file_with_only_parameters_is_refused_as_a_model(read):
    tensors = {f"blocks.0.attn.{part}": torch.ones(2) for part in ("weight", "bias")}
    with pytest.raises(AdapterFormatError, match="is a model or a part of one, not an adapter"):
        read(tensors)


@pytest.mark.parametrize(
    "key",
    [
        "model.diffusion_model.input_blocks.0.0.weight",
        "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight",
        "down_blocks.0.resnets.0.conv1.weight",
    ],
)
def test_the_error_for_a_full_model_names_its_kind(read, key):
    with pytest.raises(AdapterFormatError, match="is a whole model, not an adapter"):
        read({key: torch.ones(2, 2)})


def test_unknown_keys_are_refused_and_named(read):
    unknown = {f"unet.a.strange_{number}": torch.ones(1) for number in range(5)}
    with pytest.raises(
        AdapterFormatError,
        match=r"keys that no supported adapter format uses: unet\.a\.strange_\d.* and 2 more",
    ):
        read({**lora(), **unknown})


@pytest.mark.parametrize(
    "key",
    ["lora_down.weight", "unet.a.alpha2", "unet.a.xlora_up.weight", "unet.a.lora_up.weight.extra"],
)
def test_a_key_that_only_resembles_a_known_one_is_refused(read, key):
    with pytest.raises(AdapterFormatError, match="keys that no supported adapter format uses"):
        read({**lora(), key: torch.ones(1)})


@pytest.mark.parametrize(
    "tensors",
    [
        {"unet.a.lora_down.weight": torch.ones(4, 6)},
        {"unet.a.lora_up.weight": torch.ones(8, 4), "unet.a.alpha": torch.tensor(1.0)},
        {"unet.a.alpha": torch.tensor(1.0)},
        {"unet.a.lokr_w1": torch.ones(2, 3)},
        {"unet.a.lokr_w1": torch.ones(2, 3), "unet.a.lokr_w2_a": torch.ones(2, 3)},
        {"unet.a.hada_w1_a": torch.ones(8, 4), "unet.a.hada_w1_b": torch.ones(4, 6)},
        {**lora(), "unet.a.lokr_w1": torch.ones(2, 3)},
    ],
    ids=["only down", "only up", "only alpha", "only w1", "half of w2", "half a LoHa", "two kinds"],
)
def test_an_incomplete_module_is_refused(read, tensors):
    with pytest.raises(AdapterFormatError, match=r"is incomplete: unet\.a has only unet\.a\."):
        read({**lora(module="unet.sound"), **tensors})


def test_two_tensors_for_the_same_part_are_refused(read):
    with pytest.raises(
        AdapterFormatError, match=r"has two tensors for the same part of unet\.a"
    ) as raised:
        read({**lora(), "unet.a.lora_A.weight": torch.ones(4, 6)})
    assert "unet.a.lora_A.weight" in str(raised.value)
    assert "unet.a.lora_down.weight" in str(raised.value)


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [(torch.int8, "I8"), (torch.int64, "I64"), (torch.bool, "BOOL")],
)
def test_weights_of_unsupported_dtypes_are_refused(read, dtype, stored):
    with pytest.raises(
        AdapterFormatError,
        match=rf"stores unet\.a\.lora_up\.weight as {stored}; only F8, F16, BF16, F32 and F64",
    ):
        read({**lora(), "unet.a.lora_up.weight": torch.ones(8, 4).to(dtype)})


def test_an_empty_tensor_is_refused(read):
    with pytest.raises(
        AdapterFormatError, match=r"the tensor unet\.a\.lora_down\.weight with the shape \[0, 6\]"
    ):
        read(
            {"unet.a.lora_down.weight": torch.ones(0, 6), "unet.a.lora_up.weight": torch.ones(8, 1)}
        )


@pytest.mark.parametrize("shape", [(2,), (0,), (1, 2)])
def test_an_alpha_that_is_not_a_single_number_is_refused(read, shape):
    with pytest.raises(AdapterFormatError, match=r"the tensor unet\.a\.alpha with the shape"):
        read({**lora(), "unet.a.alpha": torch.ones(shape)})


@pytest.mark.parametrize(
    ("down", "up"),
    [
        ((4, 6), (8, 5)),
        ((4, 6, 3, 3), (8, 4, 3, 3)),
        ((4, 6), (8, 4, 3, 3)),
        ((4, 6, 3, 3), (8, 5, 1, 1)),
        ((4, 6, 3), (8, 4, 1)),
        ((4,), (8,)),
    ],
)
def test_invalid_lora_shapes_are_refused(read, down, up):
    with pytest.raises(AdapterFormatError) as raised:
        read({"unet.a.lora_down.weight": torch.ones(down), "unet.a.lora_up.weight": torch.ones(up)})
    message = str(raised.value)
    assert message.startswith("The shapes of unet.a in ")
    assert f"are not valid for a LoRA: down {list(down)}, up {list(up)}. Export" in message


@pytest.mark.parametrize(
    "tensors",
    [
        lokr(WHOLE_1, ((4, 2), (3, 5))),
        lokr(((2, 4), (3, 3)), WHOLE_2),
        lokr(WHOLE_1, ((4, 2, 1, 1), (2, 5))),
        {**loha(), "a.hada_w1_b": numbers(5, 6)},
        {**loha(), "a.hada_w2_a": numbers(8)},
    ],
    ids=["w2 of a LoKr", "w1 of a LoKr", "four dimensions", "w1 of a LoHa", "one dimension"],
)
def test_factors_that_cannot_be_multiplied_are_refused(read, tensors):
    with pytest.raises(AdapterFormatError, match=r"The factors of a in .* cannot be multiplied"):
        read(tensors)


@pytest.mark.parametrize(
    ("first", "second"), [(((2, 3, 1, 1),), WHOLE_2), (WHOLE_1, ((4, 5, 3),)), (((2,),), WHOLE_2)]
)
def test_invalid_lokr_shapes_are_refused(read, first, second):
    with pytest.raises(AdapterFormatError, match=r"The shapes of a in .* are not valid for a LoKr"):
        read(lokr(first, second))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "key", ["unet.a.lora_down.weight", "unet.a.lora_up.weight", "unet.a.alpha"]
)
def test_the_error_for_nan_or_infinity_names_the_key(read, key, value):
    tensors = lora()
    tensors[key].view(-1)[-1] = value
    with pytest.raises(
        NonFiniteWeightsError, match="training diverged or the file is damaged"
    ) as raised:
        read(tensors)
    assert f"infinity in {key}:" in str(raised.value)


def test_a_number_out_of_the_range_of_float32_is_refused(read):
    tensors = {name: tensor.double() for name, tensor in lora().items()}
    tensors["unet.a.lora_up.weight"][0, 0] = 1e300
    with pytest.raises(NonFiniteWeightsError, match=r"unet\.a\.lora_up\.weight"):
        read(tensors)


def test_weights_of_a_lokr_with_full_matrices_must_be_finite(read):
    tensors = lokr(WHOLE_1, WHOLE_2, math.inf)
    tensors["a.lokr_w2"][0, 0] = math.inf
    with pytest.raises(NonFiniteWeightsError, match=r"a\.lokr_w2"):
        read(tensors)


PARTS = [
    "lora_down.weight",
    "lora_up.weight",
    "lora_A.weight",
    "lokr_w1",
    "lokr_w1_a",
    "lokr_w1_b",
    "lokr_w2",
    "lokr_w2_a",
]
PARTS += [
    "lokr_w2_b",
    "hada_w1_a",
    "hada_w1_b",
    "hada_w2_a",
    "hada_w2_b",
    "alpha",
    "diff",
    "weight",
    "",
]
TENSORS = st.builds(
    lambda shape, dtype: torch.ones(shape, dtype=dtype),
    st.lists(st.integers(0, 3), max_size=4),
    st.sampled_from([torch.float32, torch.float16, torch.int64]),
)


@settings(max_examples=100, deadline=None)
@given(
    tensors=st.dictionaries(
        st.builds("{}.{}".format, st.sampled_from(["a", "b"]), st.sampled_from(PARTS)),
        TENSORS,
        max_size=5,
    )
)
def test_any_mixture_of_parts_is_read_or_refused(tmp_path_factory, tensors):
    path = tmp_path_factory.getbasetemp() / "mixture.safetensors"
    save_file(tensors, path)
    try:
        adapter = read_adapter(path)
    except (AdapterError, WeightsFileError):
        return
    assert set(adapter.deltas) == {key.split(".")[0] for key in tensors}


# --- which trainer -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("software", "version", "noise"),
    [
        ('{"name": "ai-toolkit", "version": "0.5.3"}', (0, 5, 3), "legacy"),
        ('{"name": "ai-toolkit", "version": "0.11.1"}', (0, 11, 1), "legacy"),
        ('{"name": "ai-toolkit", "version": "0.11.2"}', (0, 11, 2), "modern"),
        ('{"name": "ai-toolkit", "version": "0.12.0"}', (0, 12, 0), "modern"),
        ('{"name": "ai-toolkit", "version": "v1.2.3.4"}', (1, 2, 3), "modern"),
        ('{"name": "kohya", "version": "0.5.3"}', None, "modern"),
        ('{"name": "ai-toolkit"}', None, "modern"),
        ('{"version": "0.5.3"}', None, "modern"),
        ('{"name": "ai-toolkit", "version": null}', None, "modern"),
        ('["ai-toolkit", "0.5.3"]', None, "modern"),
        ("ai-toolkit 0.5.3", None, "modern"),
        ("null", None, "modern"),
        ("", None, "modern"),
    ],
)
def test_trainer_and_noise_are_read_from_the_software_field(software, version, noise):
    metadata = {"software": software, "name": "style"}
    assert trainer_version(metadata) == version
    assert noise_of_trainer(metadata) == noise


def test_without_a_software_field_the_trainer_is_unknown():
    assert trainer_version({}) is None
    assert noise_of_trainer({}) == "modern"


# --- deltas --------------------------------------------------------------------------------------

LINEAR, CONV_1, CONV_3 = (12, 15), (12, 15, 1, 1), (12, 15, 3, 3)
SHAPES = pytest.mark.parametrize(
    "shape", [LINEAR, CONV_1, CONV_3], ids=["linear", "conv 1x1", "conv 3x3"]
)


def lora_delta(shape, scale=0.5):
    outputs, inputs, *kernel = shape
    return LoraDelta(
        scale, numbers(4, inputs, *kernel, seed=1), numbers(outputs, 4, *[1] * len(kernel), seed=2)
    )


def lokr_delta(shape, first="whole", second="whole", scale=0.5):
    kernel = shape[2:]
    w1 = (
        (numbers(3, 5, seed=1),)
        if first == "whole"
        else (numbers(3, 2, seed=1), numbers(2, 5, seed=2))
    )
    if second == "whole":
        return LokrDelta(scale, w1, (numbers(4, 3, *kernel, seed=3),))
    return LokrDelta(scale, w1, (numbers(4, 2, seed=3), numbers(2, 3 * math.prod(kernel), seed=4)))


def loha_delta(shape, scale=0.5):
    outputs, inputs = shape[0], math.prod(shape[1:])
    first, second = ((numbers(outputs, 4, seed=s), numbers(4, inputs, seed=s + 1)) for s in (1, 3))
    return LohaDelta(scale, first, second)


def test_a_merged_lora_of_a_linear_weight_matches_its_formula():
    delta, weight = lora_delta(LINEAR), numbers(*LINEAR)
    expected = weight.double() + 0.75 * 0.5 * (delta.up.double() @ delta.down.double())
    torch.testing.assert_close(merged(delta, weight, 0.75), expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [CONV_1, CONV_3], ids=["conv 1x1", "conv 3x3"])
def test_a_merged_lora_of_a_convolution_matches_its_formula(shape):
    delta, weight = lora_delta(shape), numbers(*shape)
    product = torch.einsum("or,rihw->oihw", delta.up.double()[:, :, 0, 0], delta.down.double())
    expected = weight.double() + 0.75 * 0.5 * product
    torch.testing.assert_close(merged(delta, weight, 0.75), expected.float(), rtol=1e-5, atol=1e-5)


def whole(factors):
    """Return a factor in float64, as one matrix."""
    return factors[0].double() if len(factors) == 1 else factors[0].double() @ factors[1].double()


@SHAPES
@pytest.mark.parametrize("first", ["whole", "split"])
@pytest.mark.parametrize("second", ["whole", "split"])
def test_the_merged_lokr_is_the_kronecker_product(shape, first, second):
    delta, weight = lokr_delta(shape, first, second), numbers(*shape)
    kernel = shape[2:]
    w1, w2 = whole(delta.w1), whole(delta.w2).reshape(4, 3, *kernel)
    # Written out: block (a, b) of the weight's first two dimensions is w1[a, b] times w2.
    product = torch.einsum("ab,cdk->acbdk", w1, w2.reshape(4, 3, -1)).reshape(shape)
    expected = weight.double() + 0.75 * 0.5 * product
    torch.testing.assert_close(merged(delta, weight, 0.75), expected.float(), rtol=1e-5, atol=1e-5)


@SHAPES
def test_the_merged_loha_is_the_elementwise_product(shape):
    delta, weight = loha_delta(shape), numbers(*shape)
    expected = weight.double() + 0.75 * 0.5 * (whole(delta.w1) * whole(delta.w2)).reshape(shape)
    torch.testing.assert_close(merged(delta, weight, 0.75), expected.float(), rtol=1e-5, atol=1e-5)


@SHAPES
@pytest.mark.parametrize("make", [lora_delta, lokr_delta, loha_delta])
def test_merging_does_not_modify_its_inputs(make, shape):
    delta, weight = make(shape), numbers(*shape)
    kept = [tensor.clone() for tensor in delta.tensors()]
    result = merged(delta, weight, 1.0)
    assert not torch.equal(result, weight)
    assert torch.equal(weight, numbers(*shape))
    assert all(torch.equal(now, before) for now, before in zip(delta.tensors(), kept, strict=True))


@SHAPES
@pytest.mark.parametrize("make", [lora_delta, lokr_delta, loha_delta])
def test_a_multiplier_of_zero_changes_nothing(make, shape):
    assert torch.equal(merged(make(shape), numbers(*shape), 0.0), numbers(*shape))


@pytest.mark.parametrize("make", [lokr_delta, loha_delta])
def test_a_live_float32_weight_equals_the_merged_one(make):
    weight = numbers(*CONV_3)
    assert torch.equal(make(CONV_3).live_weight(weight, 0.75), merged(make(CONV_3), weight, 0.75))


@pytest.mark.parametrize("make", [lokr_delta, loha_delta])
def test_a_live_weight_keeps_the_dtype_of_the_weight(make):
    weight = numbers(*LINEAR).bfloat16()
    live = make(LINEAR).live_weight(weight, 0.75)
    assert live.dtype == torch.bfloat16
    torch.testing.assert_close(
        live.float(), merged(make(LINEAR), weight.float(), 0.75), rtol=0.02, atol=0.05
    )


CONVOLUTIONS = [
    {"kernel_size": 1},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 3, "stride": (2, 1), "padding": (0, 2)},
]


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=["1x1", "padded", "strided", "uneven"])
def test_a_live_lora_of_a_convolution_equals_the_merged_one(options):
    module = nn.Conv2d(15, 12, **options)
    delta, x = lora_delta(tuple(module.weight.shape)), numbers(2, 15, 9, 10, seed=5)
    with torch.no_grad():
        plain = module.double()(x.double())
        module.weight.copy_(merged(delta, module.weight.float(), 0.75).double())
        difference = module(x.double()) - plain
        beside = delta.low_rank_output(module.float(), x, 0.75)
    assert beside.dtype == torch.float32
    torch.testing.assert_close(beside, difference.float(), rtol=1e-4, atol=1e-4)


def test_a_live_lora_of_a_linear_module_equals_the_merged_one():
    delta, x, weight = lora_delta(LINEAR), numbers(2, 7, 15, seed=5), numbers(*LINEAR)
    expected = functional.linear(x.double(), merged(delta, weight, 0.75).double() - weight.double())
    torch.testing.assert_close(
        delta.low_rank_output(nn.Linear(15, 12), x, 0.75), expected.float(), rtol=1e-4, atol=1e-4
    )


def test_a_live_lora_of_a_half_precision_module_runs_in_float32():
    delta, x = lora_delta(LINEAR), numbers(2, 15, seed=5).bfloat16()
    beside = delta.low_rank_output(nn.Linear(15, 12).bfloat16(), x, 1.0)
    assert beside.dtype == torch.float32
    assert torch.equal(beside, delta.low_rank_output(nn.Linear(15, 12), x.float(), 1.0))


@SHAPES
@pytest.mark.parametrize("make", [lora_delta, lokr_delta, loha_delta])
def test_a_delta_reports_the_weight_shape_that_it_fits(make, shape):
    assert make(shape).shape_for(torch.Size(shape)) == shape


@SHAPES
def test_a_factored_lokr_reports_the_weight_shape_that_it_fits(shape):
    assert lokr_delta(shape, second="split").shape_for(torch.Size(shape)) == shape


@SHAPES
@pytest.mark.parametrize("make", [lora_delta, lokr_delta, loha_delta])
@pytest.mark.parametrize("change", [(1, 0), (0, 1)], ids=["outputs", "inputs"])
def test_a_delta_reports_another_shape_if_it_does_not_fit(make, shape, change):
    other = (shape[0] + change[0], shape[1] + change[1], *shape[2:])
    assert make(shape).shape_for(torch.Size(other)) != other


def test_a_lora_of_a_linear_weight_fits_only_a_1x1_convolution():
    assert lora_delta(LINEAR).shape_for(torch.Size(CONV_1)) == CONV_1
    assert lora_delta(LINEAR).shape_for(torch.Size(CONV_3)) == LINEAR


def test_a_loha_with_halves_of_different_shapes_does_not_fit():
    delta = LohaDelta(1.0, loha_delta(CONV_3).w1, loha_delta(CONV_1).w2)
    assert delta.shape_for(torch.Size(CONV_3)) != CONV_3


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (
            '{"unet.lora_alpha": NaN}',
            NonFiniteWeightsError,
            "alpha in its PEFT metadata that is not finite",
        ),
        ('{"unet.lora_alpha": 1' + "0" * 400 + "}", AdapterFormatError, "cannot be read"),
        ('{"unet.use_dora": true}', AdapterFormatError, "no lora_magnitude_vector"),
        ("[" * 100_000, AdapterFormatError, "cannot be read"),
    ],
    ids=["NaN", "long", "dora", "deep"],
)
def test_peft_metadata_with_unsupported_scaling_is_refused(tmp_path, config, error, message):
    tensors = {
        "unet.conv_in.lora_A.weight": torch.ones(2, 4, 3, 3),
        "unet.conv_in.lora_B.weight": torch.ones(16, 2, 1, 1),
    }
    path = tmp_path / "peft.safetensors"
    save_file(tensors, path, {"lora_adapter_metadata": config})
    with pytest.raises(error, match=re.escape(message)):
        read_adapter(path)


@pytest.mark.parametrize(
    "software", ['{"name": "ai-toolkit", "version": "dev"}', "[" * 100_000, "1" * 5000]
)
def test_an_invalid_version_does_not_select_legacy_noise(software):
    assert trainer_version({"software": software}) is None
    assert noise_of_trainer({"software": software}) == "modern"
