"""A Stable Diffusion 1.5 of full size with random weights, and adapters for it: what benchmarks measure with.

    python benchmarks/full_size.py FOLDER

writes them once (4.3 GB), in the layout of diffusers. The numbers are small enough that activations stay finite; what is painted
means nothing, but costs what a trained model costs.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fidelora.engine.weights import empty_component, read_config
from fidelora.models import model_spec

SPEC = model_spec("sd15")
RANK, CONV_RANK = 32, 16
"""Of the adapters: the trainer's default shape."""


def default_folder() -> Path:
    """Where the files are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fidelora" / "benchmarks"


def base(folder: Path) -> Path:
    """The base model, float32, in the layout of diffusers; written if it is not there."""
    target = folder / "sd15"
    if (target / "model_index.json").exists():
        return target
    generator = torch.Generator().manual_seed(1)
    for component in SPEC.components:
        config = SPEC.layout / component.name / "config.json"
        module = empty_component(component, read_config(config))
        weights = {name: _numbers(name, weight.shape, generator) for name, weight in module.named_parameters()}
        (target / component.name).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(config, target / component.name / "config.json")
        save_file(weights, target / component.name / f"{component.weights}.safetensors")
    shutil.copytree(SPEC.layout / "tokenizer", target / "tokenizer", dirs_exist_ok=True)
    (target / "scheduler").mkdir(exist_ok=True)
    scheduler = {"_class_name": "DDPMScheduler", **SPEC.scheduler_config}
    (target / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    index = {component.name: [component.library, component.class_name] for component in SPEC.components}
    whole = {
        "_class_name": "StableDiffusionPipeline",
        **index,
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDPMScheduler"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    }
    (target / "model_index.json").write_text(json.dumps(whole))  # last: it says that the rest is whole
    return target


def adapter(folder: Path, number: int = 0) -> Path:
    """A LoRA for every linear and convolutional weight that the trainer trains by default (rank 32, convolutions 16)."""
    target = folder / f"lora_{number}.safetensors"
    if target.exists():
        return target
    generator = torch.Generator().manual_seed(100 + number)
    unet = next(component for component in SPEC.components if component.name == "unet")
    module = empty_component(unet, read_config(SPEC.layout / "unet" / "config.json"))
    tensors: dict[str, Tensor] = {}
    for path, part in module.named_modules():
        if not isinstance(part, nn.Linear | nn.Conv2d) or not any(mark in path for mark in ("attentions", "resnets", "samplers")):
            continue
        name = f"lora_unet_{path.replace('.', '_')}"
        outputs, inputs, *kernel = part.weight.shape
        rank = CONV_RANK if kernel == [3, 3] else RANK
        ones = [1] * len(kernel)
        down = torch.randn(rank, inputs, *kernel, generator=generator) / math.sqrt(inputs * math.prod(kernel))
        up = torch.randn(outputs, rank, *ones, generator=generator) * 0.02
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(float(rank))}
    folder.mkdir(parents=True, exist_ok=True)
    writing = target.with_suffix(".part")
    save_file({name: tensor.to(torch.float16) for name, tensor in tensors.items()}, writing, {"ss_base_model_version": "sd_1.5"})
    writing.rename(target)
    return target


def _numbers(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Norms start as the identity, biases at zero, and the rest keeps the size of what goes through it."""
    if len(shape) == 1:
        return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
    if "embedding" in name and "time" not in name:
        return torch.randn(shape, generator=generator) * 0.02
    return torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))


if __name__ == "__main__":
    where = Path(sys.argv[1]) if len(sys.argv) > 1 else default_folder()
    print(base(where))
    print(adapter(where))
