"""Full-size Stable Diffusion 1.5 with random weights, and adapters for it, for the benchmarks.

    python benchmarks/full_size.py FOLDER

writes them once (4.3 GB), in the diffusers layout. The weights are small enough that activations
stay finite. The images are noise, but take the same time as those of a trained model.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fidelora.families import Family, get_family
from fidelora.families.clip_tokenizer import CLIP_TOKENIZER
from fidelora.weights.configs import read_config
from fidelora.weights.strict import empty_part

SPEC = get_family("sd15")
RANK, CONV_RANK, SMALL_RANK = 32, 16, 8
"""Ranks of the adapters: the trainer's defaults for linear and convolutional modules, and the rank
of the small adapters."""


def default_folder() -> Path:
    """Return the folder that keeps the files between runs."""
    return (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fidelora" / "benchmarks"
    )


def base(folder: Path) -> Path:
    """Return the float32 base model in the diffusers layout; write it if it does not exist."""
    return _base(
        folder / "sd15", SPEC, torch.float32, "StableDiffusionPipeline", safety_checker=[None, None]
    )


def sdxl_base(folder: Path) -> Path:
    """Return a bfloat16 SDXL model (6.9 GB) in the diffusers layout; write it if it is missing."""
    return _base(
        folder / "sdxl",
        get_family("sdxl"),
        torch.bfloat16,
        "StableDiffusionXLPipeline",
        image_encoder=[None, None],
    )


def _base(
    target: Path, spec: Family, dtype: torch.dtype, pipeline: str, **absent: list[None]
) -> Path:
    """Write a base model of this family, if it does not exist, and return its folder.

    Args:
        absent: optional components of the pipeline that the model does not have.
    """
    if (target / "model_index.json").exists():
        return target
    generator = torch.Generator().manual_seed(1)
    for component in spec.parts:
        config = spec.layout / component.name / "config.json"
        module = empty_part(component, read_config(config))
        weights = {
            name: _initial_values(name, weight.shape, generator).to(dtype)
            for name, weight in module.named_parameters()
        }
        (target / component.name).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(config, target / component.name / "config.json")
        save_file(weights, target / component.name / f"{component.weights}.safetensors")
    tokenizers = [part.tokenizer.folder for part in spec.text_encoders if part.tokenizer]
    for name in tokenizers:
        shutil.copytree(CLIP_TOKENIZER, target / name, dirs_exist_ok=True)
    (target / "scheduler").mkdir(exist_ok=True)
    scheduler = {"_class_name": "DDPMScheduler", **spec.samplers[spec.default_sampler].config}
    (target / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    index = {component.name: [component.library, component.class_name] for component in spec.parts}
    whole = {
        "_class_name": pipeline,
        **index,
        **{name: ["transformers", "CLIPTokenizer"] for name in tokenizers},
        "scheduler": ["diffusers", "DDPMScheduler"],
        "feature_extractor": [None, None],
        **absent,
    } | ({"requires_safety_checker": False} if "safety_checker" in absent else {})
    # Written last, because this file marks the model as complete.
    (target / "model_index.json").write_text(json.dumps(whole))
    return target


def adapter(folder: Path, number: int = 0) -> Path:
    """Write a LoRA for every linear and convolutional weight that the trainer trains by default.

    Its ranks are 32, and 16 for convolutions.
    """
    return _lora(
        folder / f"lora_{number}.safetensors",
        100 + number,
        ("attentions", "resnets", "samplers"),
        RANK,
        CONV_RANK,
    )


def small_adapter(folder: Path, number: int) -> Path:
    """Write a LoRA of rank 8 for the attention of the UNet only, as most trainers do."""
    return _lora(
        folder / "small" / f"lora_{number}.safetensors",
        1000 + number,
        (".to_",),
        SMALL_RANK,
        SMALL_RANK,
    )


def tiny_adapter(folder: Path, number: int) -> Path:
    """Write a LoRA of rank 8 for the keys and values of the UNet's cross-attention.

    It changes a fiftieth of the UNet's weights.
    """
    target = folder / "tiny" / f"lora_{number}.safetensors"
    return _lora(target, 2000 + number, (".attn2.to_k", ".attn2.to_v"), SMALL_RANK, SMALL_RANK)


def _lora(target: Path, seed: int, marks: Sequence[str], rank: int, conv_rank: int) -> Path:
    """Write a LoRA for the UNet modules with any of `marks` in their path, if it does not exist."""
    if target.exists():
        return target
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for path, (outputs, inputs, *kernel) in _unet_shapes().items():
        if not any(mark in path for mark in marks):
            continue
        name = f"lora_unet_{path.replace('.', '_')}"
        own_rank = conv_rank if kernel == [3, 3] else rank
        ones = [1] * len(kernel)
        down = torch.randn(own_rank, inputs, *kernel, generator=generator) / math.sqrt(
            inputs * math.prod(kernel)
        )
        up = torch.randn(outputs, own_rank, *ones, generator=generator) * 0.02
        tensors |= {
            f"{name}.lora_down.weight": down,
            f"{name}.lora_up.weight": up,
            f"{name}.alpha": torch.tensor(float(own_rank)),
        }
    target.parent.mkdir(parents=True, exist_ok=True)
    writing = target.with_suffix(".part")
    save_file(
        {name: tensor.to(torch.float16) for name, tensor in tensors.items()},
        writing,
        {"ss_base_model_version": "sd_1.5"},
    )
    writing.rename(target)
    return target


@cache
def _unet_shapes() -> dict[str, tuple[int, ...]]:
    """Return the weights' shapes of all linear and convolutional modules, by path."""
    unet = next(component for component in SPEC.parts if component.name == "unet")
    module = empty_part(unet, read_config(SPEC.layout / "unet" / "config.json"))
    return {
        path: tuple(part.weight.shape)
        for path, part in module.named_modules()
        if isinstance(part, nn.Linear | nn.Conv2d)
    }


def with_older_names(folder: Path) -> Path:
    """Return a copy of the base model with the text encoder's tensor names of transformers < 5.

    stable-diffusion.cpp requires these names.
    """
    source, target = base(folder), folder / "sd15-older-names"
    weights = target / "text_encoder" / "model.safetensors"
    if not weights.exists():
        weights.parent.mkdir(parents=True, exist_ok=True)
        for part in ("unet", "vae"):
            (target / part).unlink(missing_ok=True)
            (target / part).symlink_to(source / part)
        loaded = load_file(source / "text_encoder" / "model.safetensors")
        writing = weights.with_suffix(".part")
        save_file(
            {
                f"text_model.{name.removeprefix('text_model.')}": tensor
                for name, tensor in loaded.items()
            },
            writing,
        )
        writing.rename(weights)
    return target


def _initial_values(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Return initial values: ones for norms, zeros for biases, otherwise random.

    The random values preserve the variance of activations.
    """
    if len(shape) == 1:
        return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
    if "embedding" in name and "time" not in name:
        return torch.randn(shape, generator=generator) * 0.02
    return torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))


if __name__ == "__main__":
    where = Path(sys.argv[1]) if len(sys.argv) > 1 else default_folder()
    print(base(where))
    print(adapter(where))
