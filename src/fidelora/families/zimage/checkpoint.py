"""Single-file checkpoints of Z-Image, which contain only the transformer, as ComfyUI uses them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from fidelora.families.spec import Family
from fidelora.families.transformer_file import convert_decoder as convert_decoder
from fidelora.families.transformer_file import split_rows, transformer_weights

_FUSED = ".attention.qkv."
_RENAMED = {
    ".attention.out.": ".attention.to_out.0.",
    ".attention.q_norm.": ".attention.norm_q.",
    ".attention.k_norm.": ".attention.norm_k.",
}
_UNUSED = "norm_final.weight"  # left over from Lumina-Image 2.0, whose class ComfyUI uses


def split(
    weights: Mapping[str, Tensor],
    configs: Mapping[str, Mapping[str, Any]],
    family: Family,
    others: Iterable[Family],
    name: str,
) -> dict[str, dict[str, Tensor]]:
    """Return the checkpoint's weights by part: all belong to the transformer.

    Args:
        weights: all tensors of the file, with the names of ComfyUI or of diffusers.
        configs, others: not used.
        name: name of the file for messages.

    Raises:
        BaseModelFilesError: the file is not a checkpoint of Z-Image, or contains other parts.
    """
    blocks = ("layers.", "noise_refiner.", "cap_pad_token")
    found: dict[str, Tensor] = {}
    for key, value in transformer_weights(weights, family, name, blocks=blocks).items():
        if key == _UNUSED:
            continue
        if key.endswith((f"{_FUSED}weight", f"{_FUSED}bias")):
            block, kind = key.split(_FUSED)
            pieces = split_rows(value, [len(value) // 3] * 3, key, name)
            for one, piece in zip("qkv", pieces, strict=True):
                found[f"{block}.attention.to_{one}.{kind}"] = piece
        else:
            found[_renamed(key)] = value
    return {family.part("denoiser").name: found}


def _renamed(key: str) -> str:
    if key.startswith(("x_embedder.", "final_layer.")):
        module, _, rest = key.partition(".")
        return f"all_{module}.2-1.{rest}"
    for old, new in _RENAMED.items():
        key = key.replace(old, new)
    return key
