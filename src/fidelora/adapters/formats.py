"""Names of tensors in adapter files, by format. Does not import torch.

A key is `<module>.<suffix>`. `split_key` maps the suffixes of all formats to the names of parts,
and `kind_of` derives the kind of a module from its parts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_PARTS = {
    "alpha": "alpha",
    # LyCORIS with `use_scalar`: a factor of the whole change.
    "scalar": "scalar",
    # LoRA of AI Toolkit and kohya, of PEFT, and of diffusers in 2023.
    "lora_down.weight": "down", "lora_A": "down", "lora_A.weight": "down",
    "lora.down.weight": "down", "lora_linear_layer.down.weight": "down",
    "lora_up.weight": "up", "lora_B": "up", "lora_B.weight": "up",
    "lora.up.weight": "up", "lora_linear_layer.up.weight": "up",
    "lora_B.bias": "up_bias", "lora_up.bias": "up_bias", "lora.up.bias": "up_bias",
    # DoRA of AI Toolkit, and of LyCORIS, OneTrainer and kohya; for PEFT see `_MAGNITUDE`.
    "magnitude": "magnitude",
    "dora_scale": "dora_scale",
    # LyCORIS: LoCon with the Tucker decomposition, LoKr, LoHa, GLoRA, OFT and BOFT, full, norm.
    "lora_mid.weight": "mid",
    "lokr_w1": "lokr_w1", "lokr_w1_a": "lokr_w1_a", "lokr_w1_b": "lokr_w1_b",
    "lokr_w2": "lokr_w2", "lokr_w2_a": "lokr_w2_a", "lokr_w2_b": "lokr_w2_b", "lokr_t2": "lokr_t2",
    "hada_w1_a": "hada_w1_a", "hada_w1_b": "hada_w1_b", "hada_t1": "hada_t1",
    "hada_w2_a": "hada_w2_a", "hada_w2_b": "hada_w2_b", "hada_t2": "hada_t2",
    "a1.weight": "a1", "a2.weight": "a2", "b1.weight": "b1", "b2.weight": "b2",
    "oft_blocks": "oft_blocks", "rescale": "rescale",
    "diff": "diff", "diff_b": "diff_b",
    "w_norm": "w_norm", "b_norm": "b_norm",
    "on_input": "on_input",
}  # fmt: skip
_LONGEST_SUFFIX = 3  # number of components of the longest suffix above

_MAGNITUDE = "lora_magnitude_vector"
"""Part of PEFT's DoRA. The name of the adapter, `weight` or both may follow it in a key."""

_EXPORT_ADVICE = "; load it together with its base model in its training program and export a LoRA"
_PEFT_FORMAT = "in the format of PEFT, which is not supported" + _EXPORT_ADVICE
_QUANTISED = "is quantised with separate scales, which is not supported; export it as F16 or BF16"
_PEFT_METHODS = {
    "adamss": "an AdaMSS", "beft": "a BEFT", "boft": "a BOFT", "bone": "a Bone", "c3a": "a C3A",
    "deft": "a DEFT", "delora": "a DeLoRA", "fourierft": "a FourierFT", "frod": "a FRoD",
    "glora": "a GLoRA", "gralora": "a GraLoRA", "hira": "a HiRA", "hra": "an HRA",
    "ia3": "an (IA)^3", "lily": "a Lily", "ln": "an LN tuning", "miss": "a MiSS", "oft": "an OFT",
    "osf": "an OSF", "peanut": "a PEANuT", "poly": "a Poly", "psoft": "a PSOFT",
    "pvera": "a PVeRA", "randlora": "a RandLora", "road": "a RoAd", "shira": "a SHiRA",
    "supertuning": "a SuperTuning", "tinylora": "a TinyLoRA", "trainable": "a set of tokens",
    "unilora": "a UniLoRA", "vblora": "a VB-LoRA", "vera": "a VeRA", "waveft": "a WaveFT",
}  # fmt: skip
"""Methods of PEFT that are not supported, by the first word of their parameters' names."""
_PEFT_PARAMETER = re.compile(
    r"(?:adamss_[AB]|beft_bias|boft_[Rs]|bone_block|c3a_kernel|deft_[PR]|delora_(?:[AB]|lambda)"
    r"|fourierft_spectrum|frod_lambda_\w+|glora_[A-E]|gralora_[AB]\w*|hira_\w+|hra_u|ia3_l"
    r"|lily_\w+|ln_tuning_layers|miss_block|oft_(?:[Rrs]|embedding_R)|osf_\w+|peanut_\w+|poly_\w+"
    r"|psoft_\w+|pvera_\w+|randlora_\w+|road_(?:theta|alpha)|shira_\w+|supertuning_\w+"
    r"|tinylora_\w+|trainable_tokens_\w+|unilora_\w+|vblora_\w+|vera_(?:lambda_[bd]|[AB])"
    r"|waveft_\w+)"
)
_PACKED = (
    "is a LoRA in the format of Nunchaku (SVDQuant), whose factors are packed for its GPU kernels "
    "and not supported; use the original LoRA"
)
_CONTROL = (
    "is a control LoRA of FLUX.1 (Canny, Depth), which needs a control image and is not supported; "
    "use a LoRA without one"
)
_BITS = (
    "has quantised weights (SVDQuant, GPTQ, AWQ or bitsandbytes), which are not supported; use the "
    "unquantised file"
)
_ABBA = (
    "is an ABBA, the product of two LoRAs. Programs scale it differently, and it is not supported; "
    "load it together with its base model in its training program and export a LoRA"
)
_REFUSED = {
    "lora_E": f"is an AdaLoRA {_PEFT_FORMAT}",
    "ranknum": f"is an AdaLoRA {_PEFT_FORMAT}",
    "lora_down": _PACKED,
    "lora_up": _PACKED,
    **dict.fromkeys(("lora_down1.weight", "lora_up1.weight"), _ABBA),
    **dict.fromkeys(("lora_down2.weight", "lora_up2.weight"), _ABBA),
    **dict.fromkeys(("lora_A1.weight", "lora_B1.weight"), _ABBA),
    **dict.fromkeys(("lora_A2.weight", "lora_B2.weight"), _ABBA),
    "base_layer.weight": "contains weights of its base model (base_layer), which is not supported; "
    "save only the adapter",
    "lora_embedding_A": f"trains token embeddings {_PEFT_FORMAT}",
    "lora_embedding_B": f"trains token embeddings {_PEFT_FORMAT}",
    "oft_diag": "is an OFT in a format that LyCORIS has replaced (oft_diag), which is not "
    "supported; export it with LyCORIS 2 or later",
    "bm.weight": "is a GLoRA with the Tucker decomposition, which is not supported; train it "
    "without use_tucker",
    "set_weight": "replaces weights (set_weight), which is only used for FLUX and is not "
    "supported; use the model that it was made for",
    "reshape_weight": "reshapes weights (reshape_weight), which is only used for FLUX and is not "
    "supported; use the model that it was made for",
    "bias_indices": "has sparse biases of LyCORIS 0.1, which are not supported" + _EXPORT_ADVICE,
    **dict.fromkeys(("key_norm.scale", "query_norm.scale"), _CONTROL),
    "scale": "stores a scale per module (scale), which is not supported; export it with alpha",
    "scale_weight": _QUANTISED,
    "weight_scale": _QUANTISED,
    "scale_input": _QUANTISED,
    "scaled_fp8": _QUANTISED,
    **dict.fromkeys(("qweight", "wscales", "wzeros", "smooth_factor", "qzeros", "g_idx"), _BITS),
    **dict.fromkeys(("absmax", "quant_map", "nested_absmax", "nested_quant_map"), _BITS),
}
"""Ends of error messages, by key suffix of known formats that are not supported."""

_REFUSED_PATTERNS = {
    re.compile(r"\.(?:lora_(?:up|down|[AB])_?[12ab]|abba_\w+)(?:\.weight)?$"): _ABBA,
    re.compile(r"\.(?:lambda_layer|base_lambda|(?:base_[pq]|[pq]_layer)\.weight)$"): (
        "is a T-LoRA, whose rank depends on the timestep, which is not supported; load it in its "
        "training program, or train a LoRA"
    ),
    re.compile(r"\.(?:(?:up|down)_list|lora_[AB])\.\d+$"): (
        "is a DyLoRA whose ranks are stored one by one, which is not supported; save it with its "
        "training program as one lora_up.weight and one lora_down.weight per module"
    ),
    re.compile(r"\.(?:lora_A|lora_down|lora\.down)(?:\.\w+)?\.bias$"): (
        "has a bias in the first factor of its modules, which no format defines; train it without "
        "this bias (lora_bias of PEFT adds one to the second factor only)"
    ),
}
"""The same, by patterns for the ends of keys."""

_OTHER_FILES = {
    re.compile(r"(image_proj|ip_adapter)\."): "is an IP-Adapter",
    re.compile(r"\d+\.to_(q|k|v|out)_lora\."): "is the LoRA of an IP-Adapter (FaceID)",
    re.compile(r"(control_model|controlnet_\w+)\."): "is a ControlNet",
    re.compile(r"(base_model\.model\.)?(lora_)?controlnet[._]"): "is a LoRA of a ControlNet",
    re.compile(r"lllite_"): "is a ControlNet-LLLite",
    re.compile(r"id_encoder\."): "is a PhotoMaker",
    re.compile(r"(adapter\.)?body\.\d+\.(in_conv|body|resnets)\."): "is a T2I-Adapter",
    re.compile(r"(first_stage_model\.)?(decoder|encoder)\.(conv_in|conv_out|down|mid|up)"):
        "is a VAE",
    re.compile(r"(vision_model|visual_projection)\."): "is an image encoder (CLIP vision)",
    re.compile(r"(conv_first\.|model\.1\.sub\.)"): "is an upscaler",
    re.compile(r"\d+\.\d\.linear\."): "is a hypernetwork",
    re.compile(r"lora_controlnet$"): "is a Control-LoRA",
}  # fmt: skip
"""Names of other kinds of files and tensors, by a pattern for the start of their keys."""

_OTHER_PARTS = {
    re.compile(r"motion_modules[._]\d"): "is a motion module of AnimateDiff, or its LoRA",
    re.compile(r"\.[qkv]_loras\.\d+\."): "is an EasyControl LoRA",
    re.compile(r"\.modules_to_save\."): "contains whole modules of the base model "
    "(modules_to_save)",
}  # fmt: skip
"""The same, by a pattern for any part of their keys."""

_CLONEOFSIMO = re.compile(r"(unet|text_encoder):\d+:(down|up)")

_KINDS = {
    frozenset({"down", "up"}): "lora",
    frozenset({"down", "up", "mid"}): "lora",
    frozenset({"lokr_w1", "lokr_w2"}): "lokr",
    frozenset({"lokr_w1", "lokr_w2_a", "lokr_w2_b"}): "lokr",
    frozenset({"lokr_w1_a", "lokr_w1_b", "lokr_w2"}): "lokr",
    frozenset({"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"}): "lokr",
    frozenset({"lokr_w1", "lokr_w2_a", "lokr_w2_b", "lokr_t2"}): "lokr",
    frozenset({"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_t2"}): "lokr",
    frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}): "loha",
    frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"}): "loha",
    frozenset({"a1", "a2", "b1", "b2"}): "glora",
    frozenset({"oft_blocks"}): "oft",
    frozenset({"oft_blocks", "rescale"}): "oft",
    frozenset({"ia3", "on_input"}): "ia3",
    frozenset({"diff"}): "full",
    frozenset({"w_norm"}): "norm",
    frozenset({"b_norm"}): "norm",
    frozenset({"w_norm", "b_norm"}): "norm",
}
"""Kind of a module by its parts, without those in `_EXTRA`."""

KINDS = ("lora", "dora", *dict.fromkeys(kind for kind in _KINDS.values() if kind != "lora"))
"""All kinds of modules; see `find_kind`."""

_DECOMPOSABLE = {
    "magnitude": frozenset({"lora"}),
    "peft_magnitude": frozenset({"lora"}),
    "dora_scale": frozenset({"lora", "lokr", "loha", "glora"}),
}
"""Kinds that each part of a DoRA can be combined with."""

_EXTRA = frozenset({"alpha", "scalar", "diff_b", "up_bias", *_DECOMPOSABLE})

_XLABS = {
    "qkv_lora1": "img_attn.qkv", "proj_lora1": "img_attn.proj",
    "qkv_lora2": "txt_attn.qkv", "proj_lora2": "txt_attn.proj",
    "qkv_lora": "qkv", "proj_lora": "linear2",
}  # fmt: skip
"""Modules of FLUX.1's original code by XLabs' names. Keys have the form
`<block>.processor.<name>.<down or up>.weight`.
Source: https://github.com/XLabs-AI/x-flux, `DoubleStreamBlockLoraProcessor` and
`SingleStreamBlockLoraProcessor`. `qkv` is the first part of `linear1`."""

SCALED_KINDS = frozenset({"lora", "dora", "lokr", "loha", "glora"})
"""Kinds whose change is multiplied by alpha / rank."""


def split_key(key: str, is_ia3: bool = False) -> tuple[str, str] | None:
    """Return the module and the name of the part; None if no supported format has such a key.

    Args:
        is_ia3: True if the module has the part `on_input`; the key of its factors then ends in
            `weight`.
    """
    pieces = key.split(".")
    for count in range(1, min(_LONGEST_SUFFIX, len(pieces) - 1) + 1):
        part = _PARTS.get(".".join(pieces[-count:]))
        if part is not None:
            return ".".join(pieces[:-count]), part
    if is_ia3 and len(pieces) > 1 and pieces[-1] == "weight":
        return ".".join(pieces[:-1]), "ia3"
    if _MAGNITUDE in pieces[-3:] and pieces[0] != _MAGNITUDE:
        at = len(pieces) - 1 - pieces[::-1].index(_MAGNITUDE)
        return ".".join(pieces[:at]), "peft_magnitude"
    if len(pieces) > 3 and pieces[-3] == "lora_B" and pieces[-1] == "bias":
        return ".".join(pieces[:-3]), "up_bias"
    if len(pieces) > 3 and pieces[-1] == "weight":
        # `lora_A.<name of the adapter>.weight`, from a state dict of PEFT.
        if pieces[-3] in ("lora_A", "lora_B"):
            return ".".join(pieces[:-3]), _PARTS[pieces[-3]]
        if len(pieces) > 4 and pieces[-4] == "processor" and pieces[-3] in _XLABS:
            return ".".join([*pieces[:-4], _XLABS[pieces[-3]]]), pieces[-2]
        # `attn1.processor.to_q_lora.down.weight` of diffusers before 0.23.
        if pieces[-3].endswith("_lora") and pieces[-2] in ("down", "up"):
            return ".".join([*pieces[:-3], pieces[-3].removesuffix("_lora")]), pieces[-2]
    return None


def name_of_other_file(key: str) -> str:
    """Return a phrase for the kind of file that has `key` and is not an adapter, or ""."""
    for start, what in _OTHER_FILES.items():
        if start.match(key):
            return what
    return next((what for part, what in _OTHER_PARTS.items() if part.search(key)), "")


def refusal(key: str) -> str | None:
    """Return why a format with `key` is not supported, as the end of a sentence; else None."""
    if _CLONEOFSIMO.fullmatch(key):
        return (
            "is a LoRA in the format of cloneofsimo's trainer, which numbers the modules instead "
            "of naming them and is not supported; convert it to the format of diffusers or kohya"
        )
    if what := name_of_other_file(key):
        return f"{what}, which is not supported; use a LoRA"
    pieces = key.split(".")
    for piece in pieces[-3:]:
        if _PEFT_PARAMETER.fullmatch(piece):
            return f"is {_PEFT_METHODS[piece.partition('_')[0]]} {_PEFT_FORMAT}"
    if reason := _REFUSED.get(".".join(pieces[-2:])) or _REFUSED.get(pieces[-1]):
        return reason
    return next((why for end, why in _REFUSED_PATTERNS.items() if end.search(key)), None)


def find_kind(parts: Iterable[str]) -> str | None:
    """Return the kind of a module with these parts; None if it is incomplete, or of two kinds.

    The kinds are `lora`, `dora` (a LoRA with a magnitude), `lokr`, `loha`, `glora`, `oft` (also
    BOFT), `ia3`, `full` (differences of weights or biases) and `norm`.
    """
    names = frozenset(parts)
    kind = _KINDS.get(names - _EXTRA)
    if kind is None:
        return "full" if names - {"alpha"} == {"diff_b"} else None
    magnitudes = names & _DECOMPOSABLE.keys()
    if len(magnitudes) > 1 or any(kind not in _DECOMPOSABLE[part] for part in magnitudes):
        return None
    if "mid" in names and magnitudes - {"dora_scale"}:
        return None
    if "scalar" in names and (kind not in SCALED_KINDS or magnitudes - {"dora_scale"}):
        return None
    if ("up_bias" in names and kind != "lora") or ("diff_b" in names and kind == "norm"):
        return None
    return "dora" if magnitudes and kind == "lora" else kind


def kind_of(parts: Iterable[str]) -> str:
    """Return `find_kind` for a complete module."""
    kind = find_kind(parts)
    assert kind is not None, "`modules_of` returns only complete modules"
    return kind
