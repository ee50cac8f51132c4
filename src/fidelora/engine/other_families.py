"""Recognition of adapters for model families that are not supported, to name them in errors.

The metadata of AI Toolkit and kohya names the base model. Without it, the names of modules and the
widths of their inputs are compared with those of known models. Sources: `models/transformers` of
https://github.com/huggingface/diffusers, and `get_base_model_version` of AI Toolkit.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from fidelora.adapters.read import Adapter

_VERSIONS: Mapping[str, str] = {
    "sd3": "Stable Diffusion 3",
    "sd3_medium": "Stable Diffusion 3",
    "pixart": "PixArt",
    "auraflow": "AuraFlow",
    "flux2": "FLUX.2-dev",
    "flux2_klein_9b": "FLUX.2-klein 9B",
    "chroma_radiance": "Chroma Radiance",
    "hidream": "HiDream",
    "hidream_i1": "HiDream",
    "hidream_e1": "HiDream",
    "hidream_o1": "HiDream",
    "hunyuan_video": "HunyuanVideo",
    "omnigen2": "OmniGen2",
    "ltx2": "LTX-2",
    "ltx2.3": "LTX-2",
    "ltx2.5": "LTX-2",
    "wan_2.2_5b": "Wan 2.2 5B",
    "anima": "Anima",
    "krea2": "Krea 2",
    "ideogram4": "Ideogram 4",
    "ernie_image": "ERNIE-Image",
    "f-lite": "F-Lite",
    "prx_pixel": "PRX",
    "mageflow": "MageFlow",
    "mageflow_edit": "MageFlow",
    "minimax_h3": "MiniMax H3",
    "minimax_h3_ref2va": "MiniMax H3",
    "zeta_chroma": "Zeta Chroma",
}
"""Title of a model by `ss_base_model_version` of AI Toolkit and kohya."""


@dataclass(frozen=True)
class _Rule:
    """One sign of a model.

    Attributes:
        title: name of the model.
        pattern: searched in the names of modules, whose dots are replaced by underscores.
        widths: input widths of a module that matches; empty if any width does.
    """

    title: str
    pattern: re.Pattern[str]
    widths: frozenset[int] = frozenset()


def _rule(title: str, pattern: str, *widths: int) -> _Rule:
    return _Rule(title, re.compile(pattern), frozenset(widths))


_BLOCK = r"(?:^|_)transformer_blocks_\d+_"  # not `attentions_0_transformer_blocks_0` of a UNet
_TO_QKV = r"to_(?:q|k|v)$"
_INPUT = r"(?:^|_)(?:img_in|x_embedder)$"
_UNET_BLOCK = r"attentions_\d+_transformer_blocks_"

_RULES = (
    _rule("Stable Diffusion 3", r"(?:^|_)joint_blocks_\d"),
    _rule("AuraFlow", r"(?:^|_)joint_transformer_blocks_\d"),
    _rule("HiDream", r"(?:double|single)_stream_blocks_\d"),
    _rule("LTX-2", r"(?:^|_)audio_(?:attn|ff)|audio_to_video_attn"),
    _rule("HunyuanVideo", r"token_refiner|double_blocks_\d+_(?:img|txt)_mlp_fc[12]$"),
    _rule("HunyuanDiT", r"attn\d_Wqkv$"),
    _rule("HunyuanDiT", r"blocks_\d+_attn[12]_" + _TO_QKV, 1408),
    _rule("Stable Cascade", r"^lora_prior_unet_|_attention_attn_(?:in|out)_proj"),
    _rule("Kandinsky", r"visual_transformer_blocks_\d|attentions_\d+_add_[kv]_proj$"),
    _rule("OmniGen", r"layers_\d+_self_attn_(?:qkv|o)_proj$"),
    _rule("OmniGen2", r"(?:layers|refiner)_\d+_attn_" + _TO_QKV, 2520),
    _rule("Cosmos or Anima", r"(?:^|_)blocks_\d+_(?:self|cross)_attn_(?:[qkv]|output)_proj$"),
    _rule("Cosmos or Anima", _BLOCK + r"norm1_linear_1$"),
    _rule("Wan image-to-video", r"blocks_\d+_cross_attn_[kv]_img$|attn2_add_[kv]_proj$"),
    _rule("Wan VACE", r"(?:^|_)vace_(?:blocks|layers)_\d"),
    _rule("Mochi", _BLOCK + r"attn1_add_[qkv]_proj$"),
    _rule("Sana", _BLOCK + r"ff_conv_"),
    _rule("PixArt", r"(?:^|_)adaln_single_|" + _BLOCK + r"attn[12]_to_q$", 1152),
    _rule("LTX-Video", _BLOCK + r"attn[12]_to_q$", 2048),
    _rule("Sana", _BLOCK + r"attn[12]_to_q$", 2240),
    _rule("CogVideoX", _BLOCK + r"attn1_to_q$", 1920, 3072),
    _rule("Stable Diffusion 3", _BLOCK + r"attn_(?:to_q|add_q_proj)$", 1536, 2432),
    _rule("FLUX.2-dev", r"(?:double|single)_blocks_\d|" + _BLOCK + r"attn_to_q$", 6144),
    _rule("FLUX.2-klein 9B", r"(?:double|single)_blocks_\d|" + _BLOCK + r"attn_to_q$", 4096),
    # FLUX.1 has 19 double blocks and 38 single blocks of the same shapes.
    _rule("HunyuanVideo", r"double_blocks_19_|single_(?:transformer_)?blocks_3[89]_", 3072),
    _rule("Kolors", r"(?:^|_)encoder_hid_proj$", 4096),
    _rule("FLUX.1 with a control image (Canny, Depth)", _INPUT, 128),
    _rule("FLUX.1 Fill", _INPUT, 384),
)
"""Signs in order of precedence. Models that share names are distinguished by their widths."""


def other_family(adapter: Adapter, supported_versions: Iterable[str]) -> str:
    """Return the title of the model that an adapter was made for; "" if it is not recognised.

    Call it only for an adapter that does not fit: supported families share names with some of
    these models.

    Args:
        supported_versions: values of `ss_base_model_version` of the supported families. If the
            metadata names one of them, names of modules are not considered.
    """
    made_for = adapter.metadata.get("ss_base_model_version", "")
    if made_for in _VERSIONS:
        return _VERSIONS[made_for]
    if made_for in supported_versions:
        return ""
    modules = [
        (module.replace(".", "_").removeprefix("base_model_model_"), _width(adapter, module))
        for module in adapter.modules
        if not re.search(_UNET_BLOCK, module.replace(".", "_"))
    ]
    for rule in _RULES:
        for name, width in modules:
            if rule.pattern.search(name) and (not rule.widths or width in rule.widths):
                return rule.title
    return ""


def _width(adapter: Adapter, module: str) -> int:
    """Return the input width of a module; 0 if only its bias changes."""
    delta = adapter.deltas.get(module)
    if delta is None:
        return 0
    shape = delta.shape_for(torch.Size((0, 0)))
    return shape[1] if len(shape) > 1 else 0
