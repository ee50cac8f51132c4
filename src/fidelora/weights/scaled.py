"""Refusal of base models whose weights are quantised with separate scales.

Such a file stores the scales beside its float8, int8 or 4-bit weights. Without them, the weights
have wrong magnitudes, so the scales must not be ignored. Does not import torch. Source of the
names: https://github.com/comfyanonymous/ComfyUI, `QUANTIZATION.md` and `comfy/ops.py`
(`scaled_fp8`, `scale_weight` and `scale_input` until 2025, the others since), and the state dicts
of bitsandbytes.
"""

from __future__ import annotations

import re

from fidelora.errors import BaseModelWeightsError
from fidelora.safetensors_header import Header
from fidelora.texts import listed

_COMFYUI = re.compile(
    r"(.+\.)?(scaled_fp8|scale_weight|scale_input|weight_scale(_\d|_inv)?|input_scale|comfy_quant)"
)
_COMFYUI_METADATA = "_quantization_metadata"
_BITSANDBYTES = re.compile(r".+\.(absmax|quant_map|nested_absmax|quant_state\..+|SCB)")


def refuse_scaled(header: Header, name: str) -> None:
    """Raise if a file of a base model stores scales of quantised weights.

    Args:
        name: name of the file for messages.

    Raises:
        BaseModelWeightsError: it does.
    """
    for program, pattern in (("ComfyUI", _COMFYUI), ("bitsandbytes", _BITSANDBYTES)):
        found = sorted(filter(pattern.fullmatch, header.tensors))
        if program == "ComfyUI" and not found and _COMFYUI_METADATA in header.metadata:
            found = [_COMFYUI_METADATA]
        if found:
            raise BaseModelWeightsError(
                f"{name} is quantised in a format of {program} with scales beside the weights "
                f"({listed(found)}), which is not supported. Use the same model in bfloat16 or "
                "float16."
            )
