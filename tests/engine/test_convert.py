"""Conversion of adapters: other names, the same bytes of tensors, the same weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tests.support import (
    LOKR,
    LORA,
    LORA_CONV,
    MINIATURE_LORA,
    SDXL_DORA,
    SDXL_LORA,
    TINY_BASE,
    TINY_SDXL,
    ZIMAGE_LORA,
    load_model_of,
    save_adapter,
    weights_of,
)
from torch import Tensor

from fidelora import Recipe
from fidelora.adapters.read import read_adapter
from fidelora.adapters.write import TargetFormat
from fidelora.engine.convert import Conversion, convert_adapter
from fidelora.errors import AdapterConversionError, AdapterFormatError, UnknownModelError
from fidelora.safetensors_header import Header, read_file_header

RANK = 2


def written(conversion: Conversion, path: Path) -> Path:
    path.write_bytes(conversion.content)
    return path


def tensors_of(path: Path) -> dict[str, Tensor]:
    return safetensors.torch.load(path.read_bytes())


def raw(tensors: dict[str, Tensor]) -> list[tuple[str, tuple[int, ...], bytes]]:
    """Return dtype, shape and bytes of all tensors, without their names, sorted."""
    return sorted(
        (str(one.dtype), tuple(one.shape), one.reshape(-1).view(torch.uint8).numpy().tobytes())
        for one in tensors.values()
    )


def lora_of(path: Path, modules: dict[str, tuple[int, int]], **metadata: str) -> Path:
    """Write a LoRA without alphas, with kohya's suffixes, for linear modules [in, out]."""
    generator = torch.Generator().manual_seed(4)
    tensors = {}
    for name, (width, out) in modules.items():
        tensors[f"{name}.lora_down.weight"] = torch.randn(RANK, width, generator=generator)
        tensors[f"{name}.lora_up.weight"] = torch.randn(out, RANK, generator=generator)
    return save_adapter(path, tensors, **metadata)


def peft_config(path: Path) -> dict[str, object]:
    config: dict[str, object] = json.loads(read_file_header(path).metadata["lora_adapter_metadata"])
    return config


# --- there and back -----------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["sd15", "sdxl"])
def test_there_and_back_gives_the_same_tensors_and_weights(tmp_path, model):
    source, base = {"sd15": (LORA, TINY_BASE), "sdxl": (SDXL_LORA, TINY_SDXL)}[model]
    recipe = Recipe(prompt="", model=model, base_model=str(base))
    peft = written(convert_adapter(source, "peft"), tmp_path / "peft.safetensors")
    back = written(convert_adapter(peft, "kohya"), tmp_path / "kohya.safetensors")
    again = written(convert_adapter(back, "peft"), tmp_path / "again.safetensors")
    factors = {key: one for key, one in tensors_of(source).items() if "alpha" not in key}
    assert raw(tensors_of(peft)) == raw(factors)
    assert tensors_of(back).keys() == tensors_of(source).keys()
    assert {key: float(one) for key, one in tensors_of(back).items() if "alpha" in key} == {
        key: float(one) for key, one in tensors_of(source).items() if "alpha" in key
    }
    assert tensors_of(again).keys() == tensors_of(peft).keys()
    assert raw(tensors_of(again)) == raw(tensors_of(peft))
    original = merged_weights(recipe, source)
    assert original != merged_weights(recipe, None)
    for path in (peft, back, again):
        assert merged_weights(recipe, path) == original


def merged_weights(recipe: Recipe, adapter: Path | None) -> dict[str, bytes]:
    """Return the bytes of the UNet's weights with an adapter merged."""
    model = load_model_of(recipe)
    model.merged.apply([(model.targets.bind(read_adapter(adapter)), 0.7)] if adapter else [])
    weights = weights_of(model.parts["unet"])
    return {
        name: one.reshape(-1).view(torch.uint8).numpy().tobytes() for name, one in weights.items()
    }


@pytest.mark.parametrize("source", [LORA, LORA_CONV, LOKR, SDXL_LORA, MINIATURE_LORA])
def test_the_kohya_form_has_every_tensor_of_the_original(tmp_path, source):
    made = written(convert_adapter(source, "kohya"), tmp_path / "made.safetensors")
    had_alpha = any(key.endswith(".alpha") for key in tensors_of(source))
    kept = {k: one for k, one in tensors_of(made).items() if had_alpha or "alpha" not in k}
    assert raw(kept) == raw(tensors_of(source))
    ours, theirs = (sorted(one.scale for one in read_adapter(path).deltas.values())
                    for path in (made, source))  # fmt: skip
    assert ours == theirs


def test_a_loha_keeps_its_tensors(tmp_path):
    stem = "unet.down_blocks.0.attentions.0.proj_in"
    factors = {f"{stem}.hada_w{i}_{side}": torch.randn(4, 4) for i in (1, 2) for side in "ab"}
    source = save_adapter(tmp_path / "a.safetensors", {**factors, f"{stem}.alpha": torch.tensor(2)})
    result = convert_adapter(source, "kohya")
    made = tensors_of(written(result, tmp_path / "b.safetensors"))
    assert result.kind == "loha"
    flat = "lora_unet_down_blocks_0_attentions_0_proj_in"
    assert {key.removeprefix(flat): one.tolist() for key, one in made.items()} == {
        key.removeprefix(stem): one.tolist() for key, one in tensors_of(source).items()
    }


def test_a_loha_with_an_alpha_in_the_metadata_keeps_its_scale(tmp_path):
    stem = "unet.down_blocks.0.attentions.0.proj_in"
    factors = {f"{stem}.hada_w{i}_{side}": torch.ones(4, 4) for i in (1, 2) for side in "ab"}
    config = json.dumps({"unet.lora_alpha": 2})
    source = save_adapter(tmp_path / "a.safetensors", factors, lora_adapter_metadata=config)
    made = written(convert_adapter(source, "kohya"), tmp_path / "b.safetensors")
    for path in (source, made):
        (delta,) = read_adapter(path).deltas.values()
        assert delta.scale == 0.5


def test_a_scaled_dora_is_refused(tmp_path):
    """AI Toolkit stores no alpha of a DoRA; another program's DoRA would get other weights."""
    stem = "unet.mid_block.attentions.0.proj_in"
    tensors = {
        f"{stem}.lora_down.weight": torch.ones(2, 8), f"{stem}.lora_up.weight": torch.ones(8, 2),
        f"{stem}.magnitude": torch.ones(8), f"{stem}.alpha": torch.tensor(1.0),
    }  # fmt: skip
    source = save_adapter(tmp_path / "a.safetensors", tensors)
    with pytest.raises(AdapterConversionError, match="modules of the kind dora"):
        convert_adapter(source, "peft")


def test_dora_and_other_modules_of_a_part_cannot_be_peft(tmp_path):
    """PEFT's metadata has one `use_dora` for a part, and we refuse a file that contradicts it."""
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_"
    plain = {
        f"{stem}{name}.lora_{side}.weight": torch.ones(*shape)
        for name in ("q", "k")
        for side, shape in (("down", (2, 8)), ("up", (8, 2)))
    }
    path = save_adapter(tmp_path / "mixed.safetensors", {
        **plain, f"{stem}q.magnitude": torch.ones(8),
    })  # fmt: skip
    with pytest.raises(AdapterConversionError, match="both DoRA and other modules in unet"):
        convert_adapter(path, "peft", "sd15")
    assert convert_adapter(path, "kohya", "sd15").modules == 2


def test_an_alpha_of_zero_in_files_of_the_trainer_becomes_the_rank(tmp_path):
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {
        f"{stem}.lora_down.weight": torch.ones(2, 8), f"{stem}.lora_up.weight": torch.ones(8, 2),
        f"{stem}.alpha": torch.tensor(0.0),
    }  # fmt: skip
    for software, alpha in (("ai-toolkit", 2.0), ("other", 0.0)):
        metadata = {"software": json.dumps({"name": software})}
        path = save_adapter(tmp_path / f"{software}.safetensors", tensors, **metadata)
        made = convert_adapter(path, "kohya", "sd15").content
        assert float(safetensors.torch.load(made)[f"{stem}.alpha"]) == alpha


def test_the_same_file_gives_the_same_bytes():
    first, second = (convert_adapter(LORA, "peft") for _ in range(2))
    assert (first.content, first.sha256) == (second.content, second.sha256)


# --- names --------------------------------------------------------------------------------------


def names(conversion: Conversion, path: Path) -> set[str]:
    return {key.rsplit(".lora", 1)[0] for key in tensors_of(written(conversion, path))
            if "alpha" not in key}  # fmt: skip


@pytest.mark.parametrize(
    ("source", "peft", "kohya"),
    [
        (
            "lora_te_text_model_encoder_layers_0_mlp_fc1",
            "text_encoder.text_model.encoder.layers.0.mlp.fc1",
            "lora_te_text_model_encoder_layers_0_mlp_fc1",
        ),
        (
            "lora_te2_text_model_encoder_layers_0_mlp_fc1",
            "text_encoder_2.text_model.encoder.layers.0.mlp.fc1",
            "lora_te2_text_model_encoder_layers_0_mlp_fc1",
        ),
        (
            "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0",
            "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0",
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0",
        ),
    ],
)
def test_names_follow_the_target_format(tmp_path, source, peft, kohya):
    path = lora_of(tmp_path / "a.safetensors", {source: (8, 8)})
    expected: dict[TargetFormat, str] = {"peft": peft, "kohya": kohya}
    for to, name in expected.items():
        assert names(convert_adapter(path, to), tmp_path / "b.safetensors") == {name}


def test_kohyas_names_of_sdxl_are_those_of_the_original_code(tmp_path):
    """The numbers of its blocks are certain only if the base is like SDXL's default base."""
    to_q = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    sdxl = lora_of(tmp_path / "sdxl.safetensors", {to_q: (640, 640)})
    tiny = lora_of(tmp_path / "tiny.safetensors", {to_q: (8, 8)})
    out = tmp_path / "out.safetensors"
    assert names(convert_adapter(sdxl, "kohya", "sdxl"), out) == {
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    }
    assert names(convert_adapter(tiny, "kohya", "sdxl"), out) == {
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    }
    peft = written(convert_adapter(sdxl, "kohya", "sdxl"), out)
    assert names(convert_adapter(peft, "peft"), tmp_path / "back.safetensors") == {to_q}


@pytest.mark.parametrize("width", [8, 1536, 5120])
def test_kohyas_names_of_wan_do_not_depend_on_the_size(tmp_path, width):
    paths = ("blocks.2.attn1.to_q", "blocks.0.attn2.to_out.0")
    modules = {f"transformer.{path}": (width, width) for path in paths}
    source = lora_of(tmp_path / "wan.safetensors", modules, ss_base_model_version="wan_2.1")
    made = written(convert_adapter(source, "kohya", "wan21_1b"), tmp_path / "out.safetensors")
    assert names(convert_adapter(source, "kohya", "wan21_1b"), tmp_path / "out.safetensors") == {
        "lora_unet_blocks_2_self_attn_q",
        "lora_unet_blocks_0_cross_attn_o",
    }
    back = convert_adapter(made, "peft", "wan21_1b")
    assert names(back, tmp_path / "back.safetensors") == set(modules)


def test_a_family_is_asked_for_only_if_the_names_differ(tmp_path):
    both = lora_of(
        tmp_path / "both.safetensors", {"text_encoder.text_model.encoder.layers.0.mlp.fc1": (8, 8)}
    )
    assert convert_adapter(both, "peft").model == "sd15"
    with pytest.raises(AdapterConversionError, match="fits sd15 and sdxl"):
        convert_adapter(both, "kohya")
    out = tmp_path / "out.safetensors"
    assert names(convert_adapter(both, "kohya", "sdxl"), out) == {
        "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    }
    with pytest.raises(UnknownModelError):
        convert_adapter(both, "kohya", "sd9")


def test_metadata_decides_between_families(tmp_path):
    name = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    path = lora_of(tmp_path / "a.safetensors", {name: (8, 8)}, ss_base_model_version="sdxl_1.0")
    assert convert_adapter(path, "kohya").model == "sdxl"


# --- alpha and metadata -------------------------------------------------------------------------


def header_of(conversion: Conversion, path: Path) -> Header:
    return read_file_header(written(conversion, path))


def test_alphas_go_to_the_metadata_of_peft_and_back(tmp_path):
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_"
    tensors = {}
    for name, rank, alpha in (("q", 2, 1.0), ("k", 2, 1.0), ("v", 4, 3.0)):
        tensors[f"{stem}{name}.lora_down.weight"] = torch.randn(rank, 8)
        tensors[f"{stem}{name}.lora_up.weight"] = torch.randn(8, rank)
        tensors[f"{stem}{name}.alpha"] = torch.tensor(alpha)
    source = save_adapter(tmp_path / "a.safetensors", tensors)
    result = convert_adapter(source, "peft")
    assert any("0.34" in note for note in result.notes)
    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_"
    assert peft_config(written(result, tmp_path / "b.safetensors")) == {
        "unet.r": 2,
        "unet.lora_alpha": 1,
        "unet.rank_pattern": {f"{path}v": 4},
        "unet.alpha_pattern": {f"{path}v": 3},
        "unet.target_modules": [f"{path}k", f"{path}q", f"{path}v"],
        "unet.use_dora": False,
    }


@pytest.mark.parametrize(
    ("suffix", "field"), [("lora_B.bias", "lora_bias"), ("lora_magnitude_vector", "use_dora")]
)
def test_the_metadata_names_parts_that_peft_would_not_load(tmp_path, suffix, field):
    stem = "unet.mid_block.attentions.0.proj_in"
    tensors = {
        f"{stem}.lora_A.weight": torch.ones(RANK, 8), f"{stem}.lora_B.weight": torch.ones(8, RANK),
        f"{stem}.{suffix}": torch.ones(8),
    }  # fmt: skip
    source = save_adapter(tmp_path / "a.safetensors", tensors)
    made = written(convert_adapter(source, "peft"), tmp_path / "b.safetensors")
    assert peft_config(made)[f"unet.{field}"] is True
    assert raw(tensors_of(made)) == raw(tensors)


def test_a_missing_alpha_is_the_rank(tmp_path):
    name = "unet.mid_block.attentions.0.proj_in"
    source = lora_of(tmp_path / "a.safetensors", {name: (8, 8)})
    kohya = written(convert_adapter(source, "kohya"), tmp_path / "b.safetensors")
    alphas = [float(one) for key, one in tensors_of(kohya).items() if key.endswith(".alpha")]
    assert alphas == [RANK]
    result = convert_adapter(kohya, "peft")
    assert result.notes == ()
    assert peft_config(written(result, tmp_path / "c.safetensors"))["unet.lora_alpha"] == RANK


@pytest.mark.parametrize("to", ["kohya", "peft"])
def test_a_scalar_of_lycoris_becomes_a_part_of_alpha(tmp_path, to):
    name = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {
        f"{name}.lora_down.weight": torch.ones(RANK, 8),
        f"{name}.lora_up.weight": torch.ones(8, RANK),
        f"{name}.alpha": torch.tensor(4.0),
        f"{name}.scalar": torch.tensor(0.25),
    }
    source = save_adapter(tmp_path / "a.safetensors", tensors)
    result = written(convert_adapter(source, to), tmp_path / "b.safetensors")
    assert not any("scalar" in key for key in tensors_of(result))
    scales = [
        [delta.scale for delta in read_adapter(path).deltas.values()] for path in (source, result)
    ]
    assert scales == [[0.5], [0.5]]


def test_an_alpha_that_float32_cannot_hold_is_noted(tmp_path):
    name = "unet.mid_block.attentions.0.proj_in"
    config = json.dumps({"unet.lora_alpha": 0.1, "unet.r": RANK})
    tensors = {f"{name}.lora_A.weight": torch.ones(RANK, 8), f"{name}.lora_B.weight": torch.ones(8, RANK)}  # noqa: E501  # fmt: skip
    source = save_adapter(tmp_path / "a.safetensors", tensors, lora_adapter_metadata=config)
    assert any(
        "0.1" in note and "rounded" in note for note in convert_adapter(source, "kohya").notes
    )
    again = written(convert_adapter(source, "peft"), tmp_path / "b.safetensors")
    assert peft_config(again)["unet.lora_alpha"] == 0.1


def test_metadata_is_kept_except_for_what_no_longer_holds(tmp_path):
    own = {"ss_tag_frequency": "{}", "software": '{"name": "ai-toolkit", "version": "0.12.0"}'}
    stale = {"sshs_model_hash": "1", "sshs_legacy_hash": "2", "modelspec.hash_sha256": "3"}
    name = "lora_unet_mid_block_attentions_0_proj_in"
    source = lora_of(tmp_path / "a.safetensors", {name: (8, 8)}, **own, **stale)
    result = convert_adapter(source, "kohya")
    assert header_of(result, tmp_path / "b.safetensors").metadata == {
        **own,
        "format": "pt",
        "fidelora_converted_from": result.source_sha256,
    }


# --- what cannot be converted -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "to", "says"),
    [
        (LOKR, "peft", "The peft format cannot express modules of the kind lokr"),
        (ZIMAGE_LORA, "kohya", "one name for several modules of Z-Image .*; use peft"),
    ],
)
def test_what_the_format_cannot_express_is_refused(source, to, says):
    with pytest.raises(AdapterConversionError, match=says):
        convert_adapter(source, to)


def test_unknown_modules_are_refused(tmp_path):
    names = {"unet.mid_block.attentions.0.proj_in": (8, 8), "unet.nothing.at_all": (8, 8)}
    source = lora_of(tmp_path / "a.safetensors", names)
    with pytest.raises(AdapterConversionError, match="1 of 2 modules"):
        convert_adapter(source, "kohya")


def test_an_adapter_of_an_unsupported_model_is_named(tmp_path):
    module = "transformer.transformer_blocks.0.attn1.to_q"
    source = lora_of(tmp_path / "a.safetensors", {module: (2048, 2048)})
    with pytest.raises(AdapterConversionError, match="a is an adapter for LTX-Video, which is not"):
        convert_adapter(source, "kohya")


def test_a_module_named_twice_is_refused(tmp_path):
    names = {"unet.mid_block.attentions.0.proj_in": (8, 8), "lora_unet_mid_block_attentions_0_proj_in": (8, 8)}  # noqa: E501  # fmt: skip
    source = lora_of(tmp_path / "a.safetensors", names)
    with pytest.raises(AdapterConversionError, match="twice"):
        convert_adapter(source, "kohya")


def test_an_embedding_is_refused(tmp_path):
    source = save_adapter(tmp_path / "a.safetensors", {"emb_params": torch.ones(1, 8)})
    with pytest.raises(AdapterConversionError, match="contains an embedding"):
        convert_adapter(source, "peft")


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    source = save_adapter(tmp_path / "a.safetensors", {"unet.conv_in.strange": torch.ones(1, 8)})
    with pytest.raises(AdapterFormatError):
        convert_adapter(source, "peft")


# --- DoRA ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("to", "part"), [("kohya", "dora_scale"), ("peft", "lora_magnitude_vector")]
)
def test_a_dora_has_the_weights_of_the_other_format(tmp_path, to, part):
    """The formula of LyCORIS and PEFT, with alpha = rank, gives the weights of AI Toolkit."""
    result = convert_adapter(SDXL_DORA, to)
    made = tensors_of(written(result, tmp_path / "made.safetensors"))
    assert any("multiplier" in note for note in result.notes)
    adapter = read_adapter(SDXL_DORA)
    generator = torch.Generator().manual_seed(2)
    keys = [key for key in made if key.endswith(part)]
    assert len(keys) == len(adapter.deltas)
    down, up = {"kohya": ("lora_down", "lora_up"), "peft": ("lora_A", "lora_B")}[to]
    for key, delta in zip(sorted(keys), (adapter.deltas[n] for n in sorted(adapter.deltas)), strict=True):  # noqa: E501  # fmt: skip
        stem = key.removesuffix(part)
        product = made[f"{stem}{up}.weight"].float() @ made[f"{stem}{down}.weight"].float()
        weight = torch.randn(product.shape, generator=generator)
        changed = weight + product
        magnitude = made[key].float().reshape(-1, 1)
        expected = magnitude * changed / changed.norm(dim=1, keepdim=True)
        torch.testing.assert_close(weight + delta.change(weight, 1.0), expected)
