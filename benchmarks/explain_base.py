"""Base model and training run for pictures of ComfyUI and A1111, with seeded random weights.

    python -m benchmarks.explain_base FOLDER

writes:

* `base` (0.6 GB), Stable Diffusion 1.5 in float16 in the diffusers layout. The text encoder and the
  VAE have their full size, because both programs fix it. The UNet has the usual blocks, but 320
  channels in each, which makes it eight times smaller.
* `narrow.safetensors` and `narrow.yaml`, the same model as a checkpoint in the layout of the
  original code. A1111 needs the configuration, ComfyUI reads the sizes from the weights.
* `sks/sks.safetensors`, a LoRA under kohya's names for the attention of the UNet and for the text
  encoder.
* `sks/config.yaml` and `sks/samples`, as AI Toolkit's trainer writes them. The samples are made by
  Fidelora in float32 on the CPU.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from tests.families.ldm import as_ldm_vae
from torch import Tensor, nn

from fidelora import Engine
from fidelora.families import get_family
from fidelora.families.clip_tokenizer import CLIP_TOKENIZER
from fidelora.families.sd.names import original_names
from fidelora.training.plan import plan_samples
from fidelora.training.run_folder import read_run
from fidelora.weights.configs import read_config
from fidelora.weights.strict import empty_part

SPEC = get_family("sd15")
CHANNELS = 320
RANK = 4
STEPS = 10
TEXT_GAIN = 3.0
"""Factor of the values of cross-attention: without it, a prompt hardly changes the image, because
attention averages the random values of 77 tokens."""
LORA_GAIN = 0.3
"""Size of the LoRA's changes, relative to the weights."""
TEXT_MEAN = 0.05
"""Mean of the prompt embeddings."""
BRACKETS = "a (detailed) photo of [trigger] with ((bright colours:1.3)), [foggy]"
LONG = (
    "a photo of [trigger] in a wide garden behind an old stone house with a red door and two green "
    "windows, tall trees along a narrow path, a small pond with water lilies, a wooden bench under "
    "an apple tree, white clouds in a blue sky, birds on the roof, a cat that sleeps in the sun, "
    "flowers in many colours, warm light of a late afternoon in summer, sharp, high quality"
)
"""Prompt of more than 77 tokens."""


def base(folder: Path) -> Path:
    """Return the base model in the diffusers layout; write it and the checkpoint if necessary."""
    target = folder / "base"
    if (target / "model_index.json").exists():
        return target
    generator = torch.Generator().manual_seed(15)
    tensors: dict[str, Tensor] = {}
    for part in SPEC.parts:
        module = _part(part.name)
        weights = {
            name: _initial_values(name, weight.shape, generator).half()
            for name, weight in module.named_parameters()
        }
        place = target / part.name
        place.mkdir(parents=True, exist_ok=True)
        (place / "config.json").write_text(json.dumps(_config_of(part.name)))
        save_file(weights, place / f"{part.weights}.safetensors")
        tensors |= _checkpoint_weights(part.name, module, weights)
    save_file(tensors, folder / "narrow.safetensors")
    (folder / "narrow.yaml").write_text(yaml.safe_dump(_original_config(), sort_keys=False))
    shutil.copytree(CLIP_TOKENIZER, target / "tokenizer", dirs_exist_ok=True)
    (target / "scheduler").mkdir(exist_ok=True)
    scheduler = {"_class_name": "DDIMScheduler", **SPEC.samplers["ddim"].config}
    (target / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    index = {part.name: [part.library, part.class_name] for part in SPEC.parts} | {
        "_class_name": "StableDiffusionPipeline",
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "feature_extractor": [None, None],
        "safety_checker": [None, None],
        "requires_safety_checker": False,
    }
    # Written last, because this file marks the model as complete.
    (target / "model_index.json").write_text(json.dumps(index))
    return target


def _checkpoint_weights(
    part: str, module: nn.Module, weights: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return the weights of a part under the names of the original code."""
    if part == "unet":
        names = original_names(path for path, _ in module.named_modules())
        return {
            f"model.diffusion_model.{_renamed(name, names)}": weight
            for name, weight in weights.items()
        }
    if part == "vae":
        return {f"first_stage_model.{name}": one for name, one in as_ldm_vae(weights).items()}
    prefix = "cond_stage_model.transformer.text_model."
    return {prefix + name.removeprefix("text_model."): one for name, one in weights.items()}


def lora(target: Path) -> Path:
    """Write a LoRA of rank `RANK` for the attention of the UNet and for the text encoder."""
    generator = torch.Generator().manual_seed(16)
    tensors: dict[str, Tensor] = {}
    for prefix, part, marks in (
        ("lora_unet_", "unet", (".to_q", ".to_k", ".to_v", ".to_out.0")),
        ("lora_te_text_model_", "text_encoder", ("self_attn", "mlp")),
    ):
        for path, module in _part(part).named_modules():
            if not isinstance(module, nn.Linear) or not any(mark in path for mark in marks):
                continue
            outputs, inputs = module.weight.shape
            name = prefix + path.removeprefix("text_model.").replace(".", "_")
            down = torch.randn(RANK, inputs, generator=generator) / math.sqrt(inputs)
            up = torch.randn(outputs, RANK, generator=generator) * (LORA_GAIN / math.sqrt(RANK))
            tensors |= {
                f"{name}.lora_down.weight": down.half(),
                f"{name}.lora_up.weight": up.half(),
                f"{name}.alpha": torch.tensor(float(RANK)),
            }
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target, {"ss_base_model_version": "sd_1.5"})
    return target


def training_run(folder: Path) -> Path:
    """Return the run folder; write it with its samples if it does not exist."""
    target = folder / "sks"
    if (target / "samples").exists():
        return target
    model = base(folder)
    lora(target / "sks.safetensors")
    (target / "config.yaml").write_text(yaml.safe_dump(_config(), sort_keys=False))
    run = read_run(target)
    engine = Engine(device="cpu")
    (target / "samples").mkdir()
    for index, planned in enumerate(plan_samples(run, run.steps, base_model=str(model))):
        image = engine.generate(planned.recipe)
        image.save(target / "samples" / f"1700000000000__{run.steps:09d}_{index}.png")
    return target


def _config() -> dict[str, object]:
    return {
        "job": "extension",
        "config": {
            "name": "sks",
            "process": [
                {
                    "type": "sd_trainer",
                    "device": "cpu",
                    "trigger_word": "sks",
                    "network": {"type": "lora", "linear": RANK, "linear_alpha": RANK},
                    "save": {"dtype": "float32"},
                    "train": {
                        "steps": 100,
                        "train_unet": True,
                        "train_text_encoder": True,
                        "noise_scheduler": "ddpm",
                        "dtype": "float32",
                    },
                    "model": {"name_or_path": "narrow.safetensors", "arch": "sd15"},
                    "sample": {
                        "sampler": "ddim",
                        "width": 64,
                        "height": 64,
                        "samples": [
                            {"prompt": "a photo of [trigger] in a garden"},
                            {"prompt": "[trigger] as an oil painting", "width": 96},
                            {"prompt": BRACKETS},
                            {"prompt": LONG},
                        ],
                        "neg": "blurry, dark",
                        "seed": 42,
                        "walk_seed": True,
                        "guidance_scale": 5,
                        "sample_steps": STEPS,
                        "format": "png",
                    },
                }
            ],
        },
        "meta": {"name": "sks", "version": "1.0"},
    }


def _config_of(name: str) -> dict[str, Any]:
    config = dict(read_config(SPEC.layout / name / "config.json"))
    if name == "unet":
        config["block_out_channels"] = [CHANNELS] * 4
    return config


def _part(name: str) -> nn.Module:
    part = next(one for one in SPEC.parts if one.name == name)
    return empty_part(part, _config_of(name))


def _original_config() -> dict[str, Any]:
    """Return the model's configuration in the format of the original code, which A1111 reads."""
    resolution = {"in_channels": 3, "out_ch": 3, "resolution": 256, "z_channels": 4}
    vae = {
        **resolution, "ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2,
        "attn_resolutions": [], "dropout": 0.0, "double_z": True,
    }  # fmt: skip
    unet = {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": CHANNELS,
        "attention_resolutions": [4, 2, 1], "num_res_blocks": 2, "channel_mult": [1, 1, 1, 1],
        "num_heads": 8, "use_spatial_transformer": True, "transformer_depth": 1,
        "context_dim": 768, "use_checkpoint": False, "legacy": False,
    }  # fmt: skip
    schedule = {"linear_start": 0.00085, "linear_end": 0.012, "timesteps": 1000}
    return {
        "model": {
            "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
            "params": {
                **schedule,
                "num_timesteps_cond": 1,
                "log_every_t": 200,
                "first_stage_key": "jpg",
                "cond_stage_key": "txt",
                "image_size": 64,
                "channels": 4,
                "cond_stage_trainable": False,
                "conditioning_key": "crossattn",
                "scale_factor": 0.18215,
                "use_ema": False,
                "unet_config": {
                    "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
                    "params": unet,
                },
                "first_stage_config": {
                    "target": "ldm.models.autoencoder.AutoencoderKL",
                    "params": {
                        "embed_dim": 4,
                        "ddconfig": vae,
                        "lossconfig": {"target": "torch.nn.Identity"},
                    },
                },
                "cond_stage_config": {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"},
            },
        }
    }


def _renamed(name: str, names: dict[str, str]) -> str:
    path, _, parameter = name.rpartition(".")
    return f"{names[path]}.{parameter}"


def _initial_values(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Return ones for norms, zeros for biases, and otherwise values that keep the variance."""
    if name.endswith("final_layer_norm.bias"):
        # A1111's emphasis divides by the mean of the prompt embeddings, so it must not be 0.
        return torch.full(shape, TEXT_MEAN)
    if len(shape) == 1:
        return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
    values = torch.randn(shape, generator=generator)
    if "embedding" in name and "time" not in name:
        return values * 0.02
    gain = TEXT_GAIN if re.search(r"attn2\.to_v", name) else 1.0
    return values * (gain / math.sqrt(math.prod(shape[1:])))


if __name__ == "__main__":
    print(training_run(Path(sys.argv[1])))
