"""Step 2, text encoder and UNet: `python -m tools.miniature.train_unet --work DIR --minutes 60`.

The text encoder is trained alone first, to predict the properties of a scene from its caption. That
takes minutes, and gives the UNet meaningful conditioning from the start. Then both are trained
together, on latents that are computed once. One caption in ten is empty, for guidance. The loss is
weighted by min-SNR-5 (https://arxiv.org/abs/2303.09556), so that steps with little noise do not
take all the capacity. Run it again to resume.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from tools.miniature import common, judge, world
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from fidelora.families import get_family
from fidelora.families.clip_tokenizer import CLIP_TOKENIZER

SPEC = get_family("sd15")
LATENT = world.SIZE // 8
SEED = 2
SCENES = 32_000
BATCH = 32
PRETRAINING_STEPS, PRETRAINING_BATCH = 500, 64
LEARNING_RATE = 6e-4  # from random weights
FINE_TUNING_RATE = 3e-4  # learning rate with `--start`
EMPTY = 0.1  # share of empty captions, for guidance
GAMMA = 5.0  # limit of the signal-to-noise ratio in the weights of min-SNR
EVALUATE_EVERY = 1500

UNET_CONFIG: dict[str, Any] = {
    "sample_size": LATENT,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    # The finest level takes most of the time and mainly handles edges, so it is narrow and has
    # no attention.
    "block_out_channels": [48, 96, 112],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": 64,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
TEXT_CONFIG: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
    "projection_dim": 64,
    "hidden_act": "quick_gelu",
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 1,
}


def main() -> None:
    parser = common.parser(__doc__, minutes=60)
    parser.add_argument("--start", type=Path, help="a trained miniature to start from")
    options = common.options(parser)
    torch.manual_seed(SEED)
    tokenizer = CLIPTokenizer.from_pretrained(CLIP_TOKENIZER)
    text_encoder = CLIPTextModel(CLIPTextConfig(**TEXT_CONFIG))
    unet = UNet2DConditionModel.from_config(UNET_CONFIG).to(memory_format=torch.channels_last)
    if options.start:
        shutil.copytree(
            options.start / "vae", options.work / "miniature" / "vae", dirs_exist_ok=True
        )
        text_encoder = CLIPTextModel.from_pretrained(options.start / "text_encoder").float()
        unet.load_state_dict(
            UNet2DConditionModel.from_pretrained(options.start / "unet").state_dict()
        )
    both = nn.ModuleDict({"text_encoder": text_encoder, "unet": unet})
    vae = (
        AutoencoderKL.from_pretrained(options.work / "miniature" / "vae")
        .float()
        .eval()
        .requires_grad_(False)
    )
    vae.to(memory_format=torch.channels_last)
    scenes = training_scenes(SCENES, SEED)
    if not options.start and not (options.work / "unet.pt").exists():
        pretrain_text_encoder(tokenizer, text_encoder, scenes)
    latents = latents_of(scenes, vae, options.work / "latents.npy", SEED)
    scheduler = DDPMScheduler.from_config(dict(SPEC.samplers["ddpm"].config))
    kept = scheduler.alphas_cumprod
    snr = kept / (1 - kept)
    weights = snr.clamp(max=GAMMA) / snr
    run = common.Run(options, "unet", both, FINE_TUNING_RATE if options.start else LEARNING_RATE)
    rng = np.random.default_rng([SEED, run.step])
    torch.manual_seed(SEED + run.step)
    while run.keep_going():
        chosen = rng.integers(0, len(scenes), BATCH)
        captions = [
            "" if rng.random() < EMPTY else world.caption(scenes[index], rng) for index in chosen
        ]
        clean = torch.from_numpy(latents[chosen].astype(np.float32))
        noise = torch.randn_like(clean)
        steps = torch.randint(0, len(kept), (BATCH,))
        noisy = scheduler.add_noise(clean, noise, steps)
        with common.autocast():
            text = text_encoder(tokenize(tokenizer, captions))[0]
            predicted = unet(noisy, steps, text).sample
        losses = functional.mse_loss(predicted.float(), noise, reduction="none").mean(dim=(1, 2, 3))
        run.learn((losses * weights[steps]).mean())
        if run.step % EVALUATE_EVERY == 0:
            trained = {key: value.clone() for key, value in both.state_dict().items()}
            both.load_state_dict(run.averaged())
            found = evaluate(
                tokenizer, text_encoder, unet, vae, options.work / f"unet-{run.step:06d}.png"
            )
            both.load_state_dict(trained)
            print(f"step {run.step}: {json.dumps(found)}", flush=True)
    if run.is_finished:
        _save(options.work / "miniature", text_encoder, unet)
        found = evaluate(tokenizer, text_encoder, unet, vae, options.work / "unet.png")
        print(json.dumps({"steps": run.step, "minutes": round(run.seconds / 60, 1), **found}))


def pretrain_text_encoder(
    tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, scenes: list[world.Scene]
) -> None:
    """Train the text encoder to predict every property of the scene from its mean output."""
    known = [facts(scene) for scene in scenes]
    answers = [sorted({one[question] for one in known}) for question in range(len(known[0]))]
    heads = nn.ModuleList(
        nn.Linear(TEXT_CONFIG["hidden_size"], len(possible)) for possible in answers
    )
    optimizer = torch.optim.AdamW(
        [*text_encoder.parameters(), *heads.parameters()], 1e-3, weight_decay=0.01
    )
    rng = np.random.default_rng(SEED)
    for step in range(1, PRETRAINING_STEPS + 1):
        chosen = rng.integers(0, len(scenes), PRETRAINING_BATCH)
        ids = tokenize(tokenizer, [world.caption(scenes[index], rng) for index in chosen])
        read = text_encoder(ids)[0].mean(dim=1)
        loss, right = torch.zeros(()), []
        for question, (head, possible) in enumerate(zip(heads, answers, strict=True)):
            logits, targets = (
                head(read),
                torch.tensor([possible.index(known[index][question]) for index in chosen]),
            )
            loss = loss + functional.cross_entropy(logits, targets)
            right.append((logits.argmax(dim=1) == targets).float().mean().item())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(
                f"text encoder, step {step}: {', '.join(f'{share:.0%}' for share in right)}",
                flush=True,
            )


def facts(scene: world.Scene) -> tuple[str, ...]:
    """Return the properties of a scene; "" for properties that the scene does not have."""
    first = scene.things[0]
    second = scene.things[1] if len(scene.things) == 2 else world.Thing("", "")
    things = (first.shape, first.colour, first.size, first.place, second.shape, second.colour)
    return (*things, scene.background, scene.style, scene.arrangement)


def training_scenes(count: int, seed: int) -> list[world.Scene]:
    """Return training scenes, none of them held out."""
    return _random_scenes(count, seed, is_held_out=False)


def held_out_scenes(count: int, seed: int) -> list[world.Scene]:
    """Return held-out scenes."""
    return _random_scenes(count, seed, is_held_out=True)


def _random_scenes(count: int, seed: int, *, is_held_out: bool) -> list[world.Scene]:
    rng = np.random.default_rng(seed)
    scenes: list[world.Scene] = []
    while len(scenes) < count:
        scene = world.random_scene(rng)
        if scene.is_held_out == is_held_out:
            scenes.append(scene)
    return scenes


@torch.no_grad()
def latents_of(
    scenes: list[world.Scene], vae: AutoencoderKL, path: Path, seed: int
) -> np.ndarray[Any, np.dtype[np.float16]]:
    """Return the scaled latents of scenes, [n, 4, height / 8, width / 8].

    Their standard deviation is about 1. They are computed once and stored in the file at `path`.
    """
    if not path.exists():
        found = np.empty((len(scenes), 4, LATENT, LATENT), np.float16)
        for start in range(0, len(scenes), 32):
            part = range(start, min(start + 32, len(scenes)))
            pixels = np.stack(
                [world.draw(scenes[index], np.random.default_rng([seed, index])) for index in part]
            )
            encoded = vae.encode(common.to_tensor(pixels)).latent_dist.mode()
            found[part.start : part.stop] = (encoded * vae.config.scaling_factor).numpy()
        np.save(path, found)
    latents: np.ndarray[Any, np.dtype[np.float16]] = np.load(path)
    return latents


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Return token ids `[n, 77]`, as the pipeline makes them."""
    ids: Tensor = tokenizer(
        captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids
    return ids


@torch.no_grad()
def evaluate(
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    sheet: Path,
    count: int = 64,
) -> dict[str, float]:
    """Return the fractions of held-out prompts whose pictures have the right properties.

    Makes the pictures with 25 DDPM steps and guidance 6, and writes them to `sheet`.
    """
    scenes = held_out_scenes(count, SEED + 1)
    rng = np.random.default_rng(SEED + 1)
    generator = torch.Generator().manual_seed(SEED)
    captions = [world.caption(scene, rng) for scene in scenes]
    scheduler = DDPMScheduler.from_config(dict(SPEC.samplers["ddpm"].config))
    scheduler.set_timesteps(25)
    with common.autocast():
        text = text_encoder(tokenize(tokenizer, [""] * count + captions))[0]
    latents = torch.randn((count, 4, LATENT, LATENT), generator=generator)
    for step in scheduler.timesteps:
        with common.autocast():
            unconditional, conditional = (
                unet(torch.cat([latents, latents]), step, text).sample.float().chunk(2)
            )
        latents = scheduler.step(
            unconditional + 6.0 * (conditional - unconditional), step, latents, generator=generator
        ).prev_sample
    pixels = np.concatenate(
        [
            common.to_pixels(vae.decode(part / vae.config.scaling_factor).sample)
            for part in latents.split(8)
        ]
    )
    Image.fromarray(
        np.concatenate(
            [np.concatenate(list(row), axis=1) for row in pixels.reshape(-1, 8, *pixels.shape[1:])]
        )
    ).save(sheet)
    scores = [judge.score(image, scene) for image, scene in zip(pixels, scenes, strict=True)]
    return {
        name: sum(getattr(one, name) for one in scores) / count
        for name in ("shape", "colour", "background")
    }


def _save(folder: Path, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
    text_encoder.half().save_pretrained(folder / "text_encoder")
    unet.to(memory_format=torch.contiguous_format).half().save_pretrained(folder / "unet")
    shutil.copytree(CLIP_TOKENIZER, folder / "tokenizer", dirs_exist_ok=True)
    text_encoder.float()
    unet.float()


if __name__ == "__main__":
    main()
