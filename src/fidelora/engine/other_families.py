"""Recognition of adapters for model families that are not supported, to name them in errors.

The metadata of AI Toolkit and kohya names the base model. Without it, the names of modules and the
widths of their inputs are compared with those of known models. Sources: `models/transformers` of
https://github.com/huggingface/diffusers, and `get_base_model_version` of AI Toolkit.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_VERSIONS: Mapping[str, str] = {
    "sd_2.1": "Stable Diffusion 2",
    "sd_v2": "Stable Diffusion 2",
    "sd_v2_v": "Stable Diffusion 2",
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
        pattern: searched in the names of modules.
        widths: input widths of a module that matches; empty if any width does.
    """

    title: str
    pattern: re.Pattern[str]
    widths: frozenset[int] = frozenset()

    def matches(self, module: str, width: int) -> bool:
        """Return True if a module with this input width has the sign."""
        return bool(self.pattern.search(module)) and (not self.widths or width in self.widths)


def _rule(title: str, pattern: str, *widths: int) -> _Rule:
    """Return a rule; `/` in the pattern stands for the separator in names of modules, `.` or `_`.

    Write `_` where it is part of a name: `transformer_blocks` and `transformer.blocks` are
    different modules. (In files that use `_` as the separator, they look the same.)
    """
    return _Rule(title, re.compile(pattern.replace("/", "[._]")), frozenset(widths))


_BLOCK = r"(?:^|/)transformer_blocks/\d+/"  # not `attentions.0.transformer_blocks.0` of a UNet
_INPUT = r"(?:^|/)(?:img_in|x_embedder)$"
_UNET_BLOCK = re.compile(
    r"(?:attentions|(?:in|out)put_blocks[._]\d+|middle_block)[._]\d+[._]transformer_blocks[._]"
)

_RULES = (
    _rule("Stable Diffusion 3", r"(?:^|/)joint_blocks/\d"),
    _rule("AuraFlow", r"(?:^|/)joint_transformer_blocks/\d"),
    _rule("HiDream", r"(?:double|single)_stream_blocks/\d"),
    _rule("LTX-2", r"/audio_(?:attn\d?|ff)/|audio_to_video_attn"),
    _rule("HunyuanVideo", r"token_refiner|double_blocks/\d+/(?:img|txt)_mlp/fc[12]$"),
    _rule("HunyuanDiT", r"attn\d/Wqkv$"),
    _rule("HunyuanDiT", r"(?:^|/)blocks/\d+/attn[12]/to_q$", 1408),
    _rule("Stable Cascade", r"^lora_prior_unet_|/attention/attn/(?:in|out)_proj"),
    _rule("Kandinsky", r"visual_transformer_blocks/\d|attentions/\d+/add_[kv]_proj$"),
    _rule("a language model", r"(?:^|/)model/layers/\d+/self_attn/[qkvo]_proj$"),
    _rule("OmniGen", r"layers/\d+/self_attn/(?:qkv|o)_proj$"),
    _rule("OmniGen2", r"(?:layers|refiner)/\d+/attn/to_q$", 2520),
    _rule("Cosmos or Anima", r"(?:^|/)blocks/\d+/(?:self|cross)_attn/(?:[qkv]|output)_proj$"),
    _rule("Cosmos or Anima", _BLOCK + r"norm1/linear_1$"),
    _rule("Wan image-to-video", r"blocks/\d+/cross_attn/[kv]_img$|attn2/add_[kv]_proj$"),
    _rule("Wan VACE", r"(?:^|/)vace_(?:blocks|layers)/\d"),
    _rule("Wan 2.2 5B", r"(?:^|/)blocks/\d+/self_attn/q$", 3072),
    _rule("Wan 2.2 5B", r"(?:^|\.)blocks\.\d+\.attn1\.to_q$", 3072),
    _rule("Mochi", _BLOCK + r"attn1/add_[qkv]_proj$"),
    _rule("Sana", _BLOCK + r"ff/conv_"),
    _rule("PixArt", r"(?:^|/)adaln_single/|" + _BLOCK + r"attn[12]/to_q$", 1152),
    _rule("LTX-Video", _BLOCK + r"attn[12]/to_q$", 2048),
    _rule("LTX-2", _BLOCK + r"attn[12]/to_q$", 4096),
    _rule("Sana", _BLOCK + r"attn[12]/to_q$", 2240),
    _rule("CogVideoX", _BLOCK + r"attn1/to_q$", 1920, 3072),
    _rule("Stable Diffusion 3", _BLOCK + r"attn/(?:to_q|add_q_proj)$", 1536, 2432),
    _rule("FLUX.2-dev", r"(?:double|single)_blocks/\d|" + _BLOCK + r"attn/to_q$", 6144),
    _rule("FLUX.2-klein 9B", r"(?:double|single)_blocks/\d|" + _BLOCK + r"attn/to_q$", 4096),
    # FLUX.1 has 19 double blocks and 38 single blocks of the same shapes.
    _rule("HunyuanVideo", r"double_blocks/19/|single_(?:transformer_)?blocks/3[89]/", 3072),
    _rule("Kolors", r"(?:^|/)encoder_hid_proj$", 4096),
    _rule("FLUX.1 with a control image (Canny, Depth)", _INPUT, 128),
    _rule("FLUX.1 Fill", _INPUT, 384),
)
"""Signs in order of precedence. Models that share names are distinguished by their widths."""

_UNET_RULES = (
    _rule("Stable Diffusion 2", r"transformer_blocks/\d+/attn2/to_[kv]$", 1024),
    _rule("the refiner of Stable Diffusion XL", r"/\d+/attn1/to_q$", 384, 768, 1536),
)
"""Signs of models with a UNet, in which the names are those of Stable Diffusion 1.5 and XL."""


def other_family(
    made_for: str, widths: Mapping[str, int], supported_versions: Iterable[str]
) -> str:
    """Return the title of the model that an adapter was made for; "" if it is not recognised.

    Call it only for an adapter that does not fit: supported families share names with some of
    these models.

    Args:
        made_for: `ss_base_model_version` in the adapter's metadata; empty if there is none.
        widths: input width of each module of the adapter; 0 if only its bias changes.
        supported_versions: values of `ss_base_model_version` of the supported families. If the
            metadata names one of them, names of modules are not considered.
    """
    if made_for in _VERSIONS:
        return _VERSIONS[made_for]
    if made_for in supported_versions:
        return ""
    for module, width in widths.items():
        for rule in _UNET_RULES if _UNET_BLOCK.search(module) else ():
            if rule.matches(module, width):
                return rule.title
    others = [module for module in widths if not _UNET_BLOCK.search(module)]
    for rule in _RULES:
        if any(rule.matches(module, widths[module]) for module in others):
            return rule.title
    return ""


def made_for_other(title: str) -> str:
    """Return the predicate of an error message about an adapter for a model that is not supported.

    The subject, such as the file's name, goes before it.
    """
    return (
        f"is an adapter for {title}, which is not supported. Use an adapter for one of the models "
        "that `fidelora models` lists."
    )
