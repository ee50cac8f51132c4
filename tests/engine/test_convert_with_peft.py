"""Files that `convert` writes, loaded by diffusers and PEFT, have the weights of the original.

PEFT is installed only for the benchmarks (`pip install --group bench`); without it, these tests are
skipped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from tests.support import (
    LORA,
    LORA_CONV,
    SDXL_DORA,
    SDXL_LORA,
    TINY_BASE,
    TINY_SDXL,
    load_model_of,
)
from torch import Tensor

from fidelora import Recipe
from fidelora.adapters.read import read_adapter
from fidelora.adapters.write import TargetFormat
from fidelora.engine.convert import convert_adapter

pytest.importorskip("peft")


def fused_weights(base: Path, adapter: Path) -> dict[str, Tensor]:
    """Return the UNet's weights after diffusers has loaded and fused an adapter."""
    unet: Any = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    state, alphas, metadata = StableDiffusionXLPipeline.lora_state_dict(
        str(adapter.parent), weight_name=adapter.name, unet_config=unet.config,
        return_lora_metadata=True,
    )  # fmt: skip
    StableDiffusionXLPipeline.load_lora_into_unet(state, alphas, unet, metadata=metadata)
    unet.fuse_lora()
    unet.unload_lora()
    return dict(unet.state_dict())


def merged_weights(model: str, base: Path, adapter: Path) -> tuple[dict[str, Tensor], int]:
    """Return the UNet's weights with an adapter merged by Fidelora, and its number of modules."""
    loaded = load_model_of(Recipe(prompt="", model=model, base_model=str(base)))
    bound = loaded.targets.bind(read_adapter(adapter))
    loaded.merged.apply([(bound, 1.0)])
    weights = {
        f"{name.removeprefix('unet.')}.weight": target.current_weight()
        for name, target in loaded.targets.by_name.items()
        if name.startswith("unet.")
    }
    return weights, sum(name.startswith("unet.") for name in bound.deltas)


@pytest.mark.parametrize(
    ("model", "source", "base", "to"),
    [
        ("sd15", LORA, TINY_BASE, "peft"),
        ("sd15", LORA, TINY_BASE, "kohya"),
        ("sd15", LORA_CONV, TINY_BASE, "peft"),
        ("sdxl", SDXL_LORA, TINY_SDXL, "peft"),
        ("sdxl", SDXL_LORA, TINY_SDXL, "kohya"),
        ("sdxl", SDXL_DORA, TINY_SDXL, "peft"),  # diffusers ignores the magnitudes of kohya's DoRA
    ],
)
def test_diffusers_computes_the_weights_of_the_original(
    tmp_path, model: str, source: Path, base: Path, to: TargetFormat
):
    path = tmp_path / "made.safetensors"
    path.write_bytes(convert_adapter(source, to).content)
    theirs, without = fused_weights(base, path), merged_weights_of_base(model, base)
    ours, modules = merged_weights(model, base, source)
    assert sum(not torch.equal(ours[key], without[key]) for key in ours) == modules > 0
    for key, weight in ours.items():
        torch.testing.assert_close(theirs[key], weight, rtol=1e-4, atol=1e-5)


def merged_weights_of_base(model: str, base: Path) -> dict[str, Tensor]:
    loaded = load_model_of(Recipe(prompt="", model=model, base_model=str(base)))
    return {
        f"{name.removeprefix('unet.')}.weight": target.current_weight().clone()
        for name, target in loaded.targets.by_name.items()
        if name.startswith("unet.")
    }
