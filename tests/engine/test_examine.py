"""Examination of adapter files: problems found in names, shapes, alphas and values."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.support import LOKR, LORA, LORA_CONV, MINIATURE_LORA, TINY_BASE, save_adapter
from torch import Tensor

from fidelora.adapters.read import read_adapter
from fidelora.engine.adapter_family import default_targets, explain_mismatch
from fidelora.engine.examine import Examination, examine_adapter
from fidelora.errors import AdapterMismatchError, AdapterNotFoundError, BaseModelFilesError
from fidelora.families import get_family

# Modules of Stable Diffusion 1.5 itself, with their [out, in].
SELF = ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", 320, 320)
CROSS = ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", 320, 768)
TEXT = ("lora_te_text_model_encoder_layers_0_self_attn_q_proj", 768, 768)


def lora(
    *modules: tuple[str, int, int], alpha: float | None = 4.0, value: float = 0.1
) -> dict[str, Tensor]:
    tensors = {}
    for name, out, into in modules:
        tensors[f"{name}.lora_down.weight"] = torch.full((4, into), value)
        tensors[f"{name}.lora_up.weight"] = torch.full((out, 4), value)
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


@pytest.fixture
def examined(tmp_path):
    def run(tensors: dict[str, Tensor], **metadata: str) -> Examination:
        return examine_adapter(save_adapter(tmp_path / "x.safetensors", tensors, **metadata))

    return run


def codes(found: Examination) -> list[tuple[str, bool]]:
    return [(problem.code, problem.unusable) for problem in found.problems]


@pytest.mark.parametrize("path", [LORA, LORA_CONV])
def test_adapters_of_the_trainer_have_no_problem(path):
    found = examine_adapter(path, str(TINY_BASE))
    assert found.same_shapes == found.matched
    assert (found.problems, found.usable, found.model, found.matched) == (
        (),
        True,
        "sd15",
        found.summary.modules,
    )
    assert found.alphas == ((4.0,) if path is LORA else (4.0, 8.0))


def test_the_alpha_of_lokr_with_full_matrices_is_only_a_note():
    found = examine_adapter(LOKR, str(TINY_BASE))
    assert (codes(found), found.usable, found.alphas) == (
        [("infinite_alpha", False)],
        True,
        (1e10,),
    )


def test_an_adapter_of_the_real_model_fits_by_shape(examined):
    found = examined(lora(SELF, CROSS, TEXT), ss_base_model_version="sd_1.5")
    assert (found.problems, found.model, found.matched, found.same_shapes) == ((), "sd15", 3, 3)
    assert (found.summary.ranks, found.alphas, found.summary.text_encoder) == ((4,), (4.0,), True)


def test_names_without_shapes_identify_no_family():
    """All modules of the miniature's LoRA exist in SDXL, and some in SD 1.5, which it names."""
    found = examine_adapter(MINIATURE_LORA)
    assert (found.model, found.matched, found.same_shapes) == ("sd15", 90, 0)
    assert (codes(found), found.usable) == ([("other_base", False)], True)
    assert "--base-model" in found.problems[0].message


def test_shapes_of_no_default_base_are_reported_without_metadata(examined):
    found = examined(lora((SELF[0], 8, 8)))
    assert (codes(found), found.same_shapes) == ([("other_base", False)], 0)
    assert found.problems[0].message.startswith("The modules with these names have other shapes")


def test_an_adapter_is_compared_with_a_given_base(tmp_path):
    found = examine_adapter(MINIATURE_LORA, "fidelora:miniature")
    assert (found.problems, found.matched, found.same_shapes) == ((), 114, 114)
    module = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    path = save_adapter(tmp_path / "small.safetensors", lora((module, 8, 8)))
    other = examine_adapter(path, "fidelora:miniature")
    assert codes(other) == [("other_base", True)]
    assert other.problems[0].message == (
        "1 of 1 modules have other shapes than in fidelora:miniature."
    )
    missing = examine_adapter(LORA, "fidelora:miniature")
    assert codes(missing) == [("other_architecture", True)]
    assert "do not exist in fidelora:miniature (" in missing.problems[0].message
    with pytest.raises(BaseModelFilesError, match="use it with model sd15"):
        examine_adapter(LORA, "fidelora:miniature", "sdxl")


def test_modules_without_effect_are_reported(examined):
    nothing = examined(
        lora(SELF, CROSS)
        | {f"{name}.lora_up.weight": torch.zeros(out, 4) for name, out, _ in (SELF, CROSS)}
    )
    assert (codes(nothing), nothing.usable) == ([("nothing_learned", False)], True)
    partly = examined(lora(SELF, CROSS) | {f"{SELF[0]}.lora_down.weight": torch.zeros(4, 320)})
    assert codes(partly) == [("partly_learned", False)]
    assert partly.problems[0].message.startswith("1 of 2 modules have no effect")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_nan_and_infinity_are_reported(examined, number):
    found = examined(lora(SELF) | {f"{SELF[0]}.lora_up.weight": torch.full((320, 4), number)})
    assert codes(found) == [("not_finite", True)]
    assert not found.usable


def test_missing_and_infinite_alphas_are_reported(examined):
    assert codes(examined(lora(SELF, alpha=float("inf")))) == [("infinite_alpha", True)]
    assert codes(examined(lora(SELF, alpha=None))) == [("missing_alpha", False)]
    mixed = examined(lora(SELF) | lora(CROSS, alpha=None))
    assert mixed.problems[0].message.startswith("1 of 2 modules have no alpha")
    module = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    peft = {
        f"{module}.lora_{part}.weight": torch.ones(shape)
        for part, shape in (("A", (4, 320)), ("B", (320, 4)))
    }
    metadata = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 8})}
    assert examined(peft, **metadata).problems == ()
    assert codes(examined(peft)) == [("missing_alpha", False)]
    assert codes(examined(peft, lora_adapter_metadata="{")) == [("unusable", True)]


@pytest.mark.parametrize(
    ("module", "metadata", "words"),
    [
        (
            ("lora_te2_text_model_encoder_layers_0_self_attn_q_proj", 1280, 1280),
            {},
            "1 of 2 modules are not in Stable Diffusion 1.5",
        ),
        (("lora_te2_text_model_encoder_layers_0_self_attn_q_proj", 8, 8), {}, "those of SDXL"),
        (("lora_unet_x", 8, 8), {"ss_base_model_version": "sdxl_1.0"}, "trained on sdxl_1.0"),
        (("lora_unet_double_blocks_0_img_attn_qkv", 8, 8), {}, "those of FLUX"),
    ],
)
def test_keys_of_another_architecture_are_reported(examined, module, metadata, words):
    found = examined(lora(SELF, module), **metadata)
    assert codes(found) == [("other_architecture", True)]
    assert words in found.problems[0].message


def test_keys_of_no_family_are_reported(examined):
    found = examined(lora(("transformer.strange_blocks.0.attn.to_q", 8, 8)))
    assert (codes(found), found.model) == ([("other_architecture", True)], "")
    assert found.problems[0].message == (
        "1 of 1 modules are not in any supported model family "
        "(transformer.strange_blocks.0.attn.to_q)."
    )


OTHER_MODELS = {
    "transformer.transformer_blocks.0.attn.to_q 1536": "Stable Diffusion 3",
    "transformer.transformer_blocks.0.attn.to_q 2432": "Stable Diffusion 3",
    "diffusion_model.joint_blocks.0.x_block.attn.qkv 1536": "Stable Diffusion 3",
    "lora_unet_double_blocks_0_img_mlp_fc1 3072": "HunyuanVideo",
    "transformer.single_transformer_blocks.39.attn.to_q 3072": "HunyuanVideo",
    "transformer.blocks.0.attn1.to_q 1408": "HunyuanDiT",
    "base_model.model.transformer_blocks.0.attn1.to_q 1152": "PixArt",
    "diffusion_model.transformer_blocks.0.attn1.to_q 2048": "LTX-Video",
    "diffusion_model.transformer_blocks.0.audio_attn1.to_q 2048": "LTX-2",
    "transformer.transformer_blocks.0.attn1.to_q 3072": "CogVideoX",
    "transformer.transformer_blocks.0.attn1.add_q_proj 1536": "Mochi",
    "transformer.joint_transformer_blocks.0.attn.to_q 3072": "AuraFlow",
    "diffusion_model.double_stream_blocks.0.block.attn1.to_q 2560": "HiDream",
    "diffusion_model.double_blocks.0.img_attn.qkv 6144": "FLUX.2-dev",
    "diffusion_model.double_blocks.0.img_attn.qkv 4096": "FLUX.2-klein 9B",
    "diffusion_model.blocks.0.cross_attn.k_img 5120": "Wan image-to-video",
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_v 1024": (
        "Stable Diffusion 2"
    ),
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q 768": (
        "the refiner of Stable Diffusion XL"
    ),
    "transformer.blocks.0.attn1.to_q 3072": "Wan 2.2 5B",
    "lora_unet_blocks_0_self_attn_q 3072": "Wan 2.2 5B",
    "base_model.model.model.layers.0.self_attn.q_proj 4096": "a language model",
    "transformer.x_embedder 128": "FLUX.1 with a control image",
    "lora_prior_unet_down_blocks_0_1_attention_attn_out_proj 2048": "Stable Cascade",
}


@pytest.mark.parametrize("module", OTHER_MODELS)
def test_an_adapter_of_an_unsupported_model_is_named(tmp_path, module):
    name, width = module.split()
    path = save_adapter(tmp_path / "x.safetensors", lora((name, 8, int(width))))
    found = examine_adapter(path)
    assert codes(found)[-1] == ("other_architecture", True)
    title = OTHER_MODELS[module]
    assert f"It is an adapter for {title}" in found.problems[-1].message
    assert "which is not supported" in found.problems[-1].message
    adapter, spec = read_adapter(path), get_family("sd15")
    with pytest.raises(AdapterMismatchError) as raised:
        default_targets("sd15").bind(adapter)
    assert f"x is an adapter for {title}" in str(explain_mismatch(adapter, spec, raised.value))


BARE_NAMES = {
    "transformer_blocks.0.attn.to_q": ("flux", 3072, 3072),
    "base_model.model.transformer_blocks.0.attn.to_q": ("flux", 3072, 3072),
    "double_blocks.0.img_attn.qkv": ("flux", 9216, 3072),
    "model.diffusion_model.double_blocks.0.img_attn.qkv": ("flux", 9216, 3072),
    "lycoris_single_transformer_blocks_0_attn_to_q": ("flux", 3072, 3072),
    "transformer_blocks.59.attn.to_q": ("qwen_image", 3072, 3072),
    "blocks.0.self_attn.q": ("wan21_14b", 5120, 5120),
    "pipe.dit.blocks.0.self_attn.q": ("wan21_14b", 5120, 5120),
    "layers.0.attention.to_q": ("zimage", 3840, 3840),
}


@pytest.mark.parametrize("module", BARE_NAMES)
def test_names_of_a_transformer_without_its_prefix_are_found(examined, module):
    model, out, into = BARE_NAMES[module]
    found = examined(lora((module, out, into)))
    assert (found.usable, found.model, found.same_shapes) == (True, model, 1)


def test_the_metadata_of_the_trainer_names_an_unsupported_model(examined):
    tensors = lora(("diffusion_model.layers.0.self_attention.to_q", 8, 8))
    found = examined(tensors, ss_base_model_version="ernie_image")
    assert "It is an adapter for ERNIE-Image, which" in found.problems[-1].message


def test_a_supported_family_in_the_metadata_has_precedence(examined):
    """The names and widths alone are those of Stable Diffusion 3."""
    tensors = lora(("transformer.transformer_blocks.0.attn.to_q", 1536, 1536))
    found = examined(tensors, ss_base_model_version="flux1")
    assert (found.usable, found.model) == (True, "flux")


def test_an_adapter_for_a_related_model_is_reported(examined):
    wider = examined(lora(SELF, (CROSS[0], 320, 1024)))
    assert codes(wider) == [("other_architecture", True)]
    assert "It is an adapter for Stable Diffusion 2, which is not" in wider.problems[0].message
    said = examined(lora(SELF), ss_base_model_version="sd_2.1")
    assert (codes(said), said.usable) == ([("other_base", False)], True)


def test_invalid_lora_shapes_are_reported(examined):
    found = examined(lora(SELF) | {f"{SELF[0]}.lora_up.weight": torch.ones(320, 5)})
    assert codes(found) == [("unusable", True)]
    assert "are not valid for a LoRA" in found.problems[0].message


def test_files_that_are_not_adapters_are_reported(tmp_path):
    path = tmp_path / "page.safetensors"
    path.write_text("<html>")
    found = examine_adapter(path)
    assert codes(found) == [("unusable", True)]
    assert "web page" in found.problems[0].message
    assert len(found.sha256) == 64
    with pytest.raises(AdapterNotFoundError, match=r"nothing\.safetensors does not exist"):
        examine_adapter(Path("nothing.safetensors"))
