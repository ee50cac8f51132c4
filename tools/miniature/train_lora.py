"""Step 3, the adapter: `python -m tools.miniature.train_lora --work DIR --minutes 15`.

Teaches the trigger word a shape that is not in the base model's training data. The file has the
format of the trainer's LoRAs: kohya's tensor names, an alpha for each module, and metadata. Half of
the training data are the base model's own scenes, so that everything else stays the same. Run it
again to resume.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from tools.miniature import common, world
from tools.miniature.train_unet import GAMMA, SPEC, tokenize
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTokenizer

import fidelora

TRIGGER = "sks"
SEED = 3
SCENES = 3000
BATCH = 32
LEARNING_RATE = 1e-3
RANK, CONV_RANK = 16, 8


class Lora(nn.Module):
    """LoRA branch of one module: `up(down(x))`, with alpha = rank, so that the scale is 1."""

    lora_down: nn.Linear | nn.Conv2d
    lora_up: nn.Linear | nn.Conv2d

    def __init__(self, module: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        if isinstance(module, nn.Linear):
            self.lora_down = nn.Linear(module.in_features, RANK, bias=False)
            self.lora_up = nn.Linear(RANK, module.out_features, bias=False)
        else:
            form = {"stride": module.stride, "padding": module.padding, "bias": False}
            size: Any = module.kernel_size
            self.lora_down = nn.Conv2d(
                module.in_channels,
                CONV_RANK,
                size,
                **form,  # type: ignore[arg-type]
            )
            self.lora_up = nn.Conv2d(CONV_RANK, module.out_channels, 1, bias=False)
        nn.init.zeros_(self.lora_up.weight)

    def add_to_output(
        self, _module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
    ) -> Tensor:
        """Add the branch to the module's output (a forward hook)."""
        result: Tensor = output + self.lora_up(self.lora_down(inputs[0]))
        return result


def main() -> None:
    options = common.options(common.parser(__doc__, minutes=15))
    torch.manual_seed(SEED)
    base = options.work / "miniature"
    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
    text_encoder = (
        CLIPTextModel.from_pretrained(base / "text_encoder").float().eval().requires_grad_(False)
    )
    unet = UNet2DConditionModel.from_pretrained(base / "unet").float().eval().requires_grad_(False)
    vae = AutoencoderKL.from_pretrained(base / "vae").float().eval().requires_grad_(False)
    added: dict[str, Lora] = {}
    for path, module in unet.named_modules():
        is_linear = isinstance(module, nn.Linear) and ".attentions." in path
        is_conv = isinstance(module, nn.Conv2d) and (".attentions." in path or ".resnets." in path)
        if is_linear or is_conv:
            assert isinstance(module, nn.Linear | nn.Conv2d)
            lora = added["lora_unet_" + path.replace(".", "_")] = Lora(module)
            module.register_forward_hook(lora.add_to_output)
    rng = np.random.default_rng(SEED)
    scenes = _scenes(rng)
    latents = _latents(vae, scenes, rng)
    scheduler = DDPMScheduler.from_config(dict(SPEC.samplers["ddpm"].config))
    kept = scheduler.alphas_cumprod
    snr = kept / (1 - kept)
    weights = snr.clamp(max=GAMMA) / snr
    run = common.Run(options, "lora", nn.ModuleDict(added), LEARNING_RATE)
    rng = np.random.default_rng([SEED, run.step])
    torch.manual_seed(SEED + run.step)
    while run.keep_going():
        chosen = rng.integers(0, len(scenes), BATCH)
        captions = [caption(scenes[index], rng) for index in chosen]
        clean = latents[torch.from_numpy(chosen)]
        noise = torch.randn_like(clean)
        steps = torch.randint(0, len(kept), (BATCH,))
        with common.autocast():
            text = text_encoder(tokenize(tokenizer, captions))[0]
            predicted = unet(scheduler.add_noise(clean, noise, steps), steps, text).sample
        losses = functional.mse_loss(predicted.float(), noise, reduction="none").mean(dim=(1, 2, 3))
        run.learn((losses * weights[steps]).mean())
    if run.is_finished:
        _save(added, run.step, options.work)
        print(
            json.dumps(
                {"steps": run.step, "minutes": round(run.seconds / 60, 1), "modules": len(added)}
            )
        )


def _scenes(rng: np.random.Generator) -> list[world.Scene]:
    """Return scenes that alternate between known shapes and the new one, none of them held out."""
    scenes: list[world.Scene] = []
    while len(scenes) < SCENES:
        scene = world.random_scene(rng, (world.NEW_SHAPE,) if len(scenes) % 2 else world.SHAPES)
        if not scene.is_held_out:
            scenes.append(scene)
    return scenes


def caption(scene: world.Scene, rng: np.random.Generator) -> str:
    """Return a caption in which the trigger word stands for the new shape."""
    things = tuple(
        replace(thing, shape=TRIGGER if thing.shape == world.NEW_SHAPE else thing.shape)
        for thing in scene.things
    )
    return world.caption(replace(scene, things=things), rng)


@torch.no_grad()
def _latents(vae: AutoencoderKL, scenes: list[world.Scene], rng: np.random.Generator) -> Tensor:
    parts = []
    for start in range(0, len(scenes), 32):
        pixels = np.stack([world.draw(scene, rng) for scene in scenes[start : start + 32]])
        parts.append(
            vae.encode(common.to_tensor(pixels)).latent_dist.mode() * vae.config.scaling_factor
        )
    return torch.cat(parts)


def _save(loras: dict[str, Lora], steps: int, work: Path) -> None:
    tensors: dict[str, Tensor] = {}
    for name, lora in loras.items():
        down, up = lora.lora_down.weight, lora.lora_up.weight
        tensors |= {f"{name}.lora_down.weight": down.half(), f"{name}.lora_up.weight": up.half()}
        tensors[f"{name}.alpha"] = torch.tensor(float(down.shape[0])).half()
    metadata = {
        "format": "pt",
        "ss_base_model_version": "sd_1.5",
        "ss_output_name": "sks",
        "ss_tag_frequency": json.dumps({"1_sks": {TRIGGER: 1}}),
        "training_info": json.dumps({"step": steps, "epoch": 0}),
        "software": json.dumps({"name": "fidelora-miniature", "version": fidelora.__version__}),
    }
    save_file(
        {key: tensor.contiguous() for key, tensor in tensors.items()},
        work / "sks.safetensors",
        metadata,
    )


if __name__ == "__main__":
    main()
