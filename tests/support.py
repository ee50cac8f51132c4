"""Helpers of several test files: paths of golden data, small base models and adapters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import fidelora
from fidelora import Recipe
from fidelora.accel.device import processor_name
from fidelora.accel.weight_protocols import ProvidesWeight
from fidelora.adapters.deltas import Delta
from fidelora.adapters.merge import merge_into
from fidelora.engine.model import LoadedModel, ModelKey, expected_bytes, load_model
from fidelora.families import Sampler
from fidelora.families.clip_tokenizer import CLIP_TOKENIZER

DEMO_DATA = Path(fidelora.__file__).parent / "demo_data"
GOLDENS = Path(__file__).parent / "goldens"
GOLDEN_JOBS = GOLDENS / "jobs"
TINY_BASE = GOLDENS / "base" / "tiny-sd15"
TINY_SDXL = GOLDENS / "base" / "tiny-sdxl"
TINY_ZIMAGE = GOLDENS / "base" / "tiny-zimage"
ZIMAGE_TRAINING_ADAPTER = GOLDENS / "base" / "tiny-zimage-adapter.safetensors"
ZIMAGE_LORA = GOLDEN_JOBS / "zimage_lora_f32" / "zimage_lora_f32.safetensors"
LORA = GOLDEN_JOBS / "lora_linear_f32" / "lora_linear_f32.safetensors"
TINY_KLEIN = GOLDENS / "base" / "tiny-flux2-klein"
KLEIN_LORA = GOLDEN_JOBS / "klein_lora_f32" / "klein_lora_f32.safetensors"
TINY_LUMINA2 = GOLDENS / "base" / "tiny-lumina2"
LUMINA2_LORA = GOLDEN_JOBS / "lumina2_lora_f32" / "lumina2_lora_f32.safetensors"
TINY_QWEN_IMAGE = GOLDENS / "base" / "tiny-qwen-image"
QWEN_LORA = GOLDEN_JOBS / "qwen_lora_f32" / "qwen_lora_f32.safetensors"
TINY_FLUX = GOLDENS / "base" / "tiny-flux"
FLUX_LORA = GOLDEN_JOBS / "flux_lora_f32" / "flux_lora_f32.safetensors"
TINY_CHROMA = GOLDENS / "base" / "tiny-chroma"
CHROMA_LORA = GOLDEN_JOBS / "chroma_lora_f32" / "chroma_lora_f32.safetensors"
TINY_WAN21 = GOLDENS / "base" / "tiny-wan21"
TINY_WAN22 = GOLDENS / "base" / "tiny-wan22"
WAN22_HIGH, WAN22_LOW = (
    GOLDEN_JOBS / "wan22_lora_f32" / f"wan22_lora_f32_{stage}_noise.safetensors"
    for stage in ("high", "low")
)
WAN21_LORA = GOLDEN_JOBS / "wan21_lora_f32" / "wan21_lora_f32.safetensors"
MINIATURE_LORA = DEMO_DATA / "sks.safetensors"
LORA_CONV = GOLDEN_JOBS / "lora_conv_f16" / "lora_conv_f16.safetensors"
SDXL_LORA = GOLDEN_JOBS / "xl_lora_linear_f32" / "xl_lora_linear_f32.safetensors"
SDXL_DORA = GOLDEN_JOBS / "xl_dora" / "xl_dora.safetensors"
LOKR = GOLDEN_JOBS / "lokr_full" / "lokr_full.safetensors"

# True on a processor like the one that made the goldens: Intel processors use other matrix kernels.
SAME_PROCESSOR = "AuthenticAMD" in processor_name() and torch.cpu._is_avx512_bf16_supported()


NEEDS_BFLOAT16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="needs a processor with AVX-512, on which oneDNN supports bfloat16",
)

CPU = torch.device("cpu")


def unmerged_model_of(recipe: Recipe) -> LoadedModel:
    """Return the base model of a recipe on the CPU, before the first call of `merged.apply`."""
    key = ModelKey.of(recipe)
    return load_model(key, key.find_files(), CPU)


def load_model_of(recipe: Recipe) -> LoadedModel:
    """Return the base model of a recipe on the CPU, without adapters."""
    model = unmerged_model_of(recipe)
    model.merged.apply([])
    return model


def expected_bytes_of(recipe: Recipe) -> int:
    key = ModelKey.of(recipe)
    return expected_bytes(key, key.find_files())


def copy_base(folder: Path) -> Path:
    """Return a copy of the tiny base model that a test may damage."""
    copy = Path(shutil.copytree(TINY_BASE, folder / "base"))
    shutil.copytree(CLIP_TOKENIZER, copy / "tokenizer")
    return copy


def change_weights(path: Path, change: Any) -> None:
    """Rewrite a .safetensors file with the result of `change(tensors)`."""
    # Not memory-mapped, because the file is replaced.
    tensors = safetensors.torch.load(path.read_bytes())
    safetensors.torch.save_file(change(tensors), path)


def save_adapter(path: Path, tensors: dict[str, Tensor], **metadata: str) -> Path:
    """Write an adapter file and return its path."""
    safetensors.torch.save_file(
        {key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata or None
    )
    return path


def weights_of(part: nn.Module) -> dict[str, Tensor]:
    """Return the state of a part of a base model, with packed weights as plain tensors."""
    plain = {
        f"{path}.weight": one.plain_weight()
        for path, one in part.named_modules()
        if isinstance(one, ProvidesWeight)
    }
    return part.state_dict() | plain


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def sampler_options(sampler: Sampler) -> st.SearchStrategy[dict[str, Any]]:
    """Return a strategy for the recipe fields that only some samplers support."""
    spacings = st.sampled_from(["default", *sorted(sampler.spacings)])
    etas = st.none() if sampler.eta is None else st.none() | st.floats(0, 1)
    return st.fixed_dictionaries({"timestep_spacing": spacings, "eta": etas})


def merged(delta: Delta, weight: Tensor, multiplier: float) -> Tensor:
    """Return a float32 copy of `weight` with one delta merged into it."""
    result = torch.empty_like(weight, dtype=torch.float32)
    merge_into(result, weight, [[(delta, multiplier)]])
    return result
