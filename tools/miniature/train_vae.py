"""Step 1, the VAE: `python -m tools.miniature.train_vae --work DIR --minutes 30`.

Trains on crops first, because the VAE is convolutional and crops take a fraction of the time. At
the end, the two 1x1 convolutions around the latents are changed so that the latents have mean 0 and
the deviation that Stable Diffusion's scaling factor expects. Run it again to resume.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from tools.miniature import common, world
from torch import Tensor
from torch.nn import functional

CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "sample_size": world.SIZE,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [16, 32, 64, 64],
    "layers_per_block": 1,
    # Few groups: normalising a group of two channels leaves only the sign of a flat colour.
    "norm_num_groups": 2,
    "act_fn": "silu",
    "scaling_factor": 0.18215,
    # No attention: it does not transfer from crops to whole images, unlike convolutions.
    "mid_block_add_attention": False,
}
SEED = 1
IMAGES = 12_000
CROPS = {0.5: 32, 0.75: 64, 1.0: world.SIZE}
"""Side of the crops in pixels; each is used until this fraction (the key) of the training time.

Small crops are the most efficient. Whole images come last, because group normalisation uses the
statistics of the whole picture.
"""
PIXELS = 16 * 32 * 32
"""Number of pixels in a batch."""
LEARNING_RATE = 5e-4
"""With 2e-3, the loss after 240 steps is three times as high."""
KL_WEIGHT = 1e-6


def main() -> None:
    options = common.options(common.parser(__doc__, minutes=30))
    torch.manual_seed(SEED)
    vae = AutoencoderKL.from_config(CONFIG).to(memory_format=torch.channels_last)
    # The encoder starts with a standard deviation of 0.05. With the usual 1, the decoder's input
    # is mostly noise for the first thousand steps.
    with torch.no_grad():
        vae.quant_conv.weight[4:] = 0
        vae.quant_conv.bias[4:] = -6
    images = _images(options.work)
    run = common.Run(options, "vae", vae, LEARNING_RATE)
    rng = np.random.default_rng(SEED + run.step)
    check = images[:64]
    while run.keep_going():
        crop = next(side for until, side in CROPS.items() if run.progress <= until)
        batch = _crops(images[64:], rng, crop)
        with common.autocast():
            latents = vae.encode(batch).latent_dist
            decoded = vae.decode(latents.sample()).sample
        loss = functional.mse_loss(decoded.float(), batch) + KL_WEIGHT * latents.kl().float().mean()
        run.learn(loss)
        if run.step % 500 == 0:
            print(f"step {run.step}, round trip {psnr(vae, check):.2f} dB", flush=True)
    _sheet(vae, check[:8], options.work / "vae.png")
    if run.is_finished:
        _normalise(vae, images[64:1088])
        value = psnr(vae, check)
        vae.to(memory_format=torch.contiguous_format).half().save_pretrained(
            options.work / "miniature" / "vae"
        )
        print(
            json.dumps(
                {"steps": run.step, "minutes": round(run.seconds / 60, 1), "psnr": round(value, 2)}
            )
        )


def _images(work: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the drawings, which are made once and then mapped from a file."""
    path = work / "vae-images.npy"
    if not path.exists():
        rng = np.random.default_rng(SEED)
        drawn = np.stack(
            [
                world.draw(world.random_scene(rng, (*world.SHAPES, world.NEW_SHAPE)), rng)
                for _ in range(IMAGES)
            ]
        )
        np.save(path, drawn)
    images: np.ndarray[Any, np.dtype[np.uint8]] = np.load(path, mmap_mode="r")
    return images


def _crops(
    images: np.ndarray[Any, np.dtype[np.uint8]], rng: np.random.Generator, side: int
) -> Tensor:
    crops = []
    for index in rng.integers(0, len(images), PIXELS // side**2):
        corners = rng.integers(0, world.SIZE - side + 1, (2, 2))
        # Take the more varied of two crops: most show only background, which is learned quickly.
        crop = max(
            (images[index, top : top + side, left : left + side] for top, left in corners),
            key=lambda one: float(one.std()),
        )
        crops.append(crop[:, ::-1] if rng.random() < 0.5 else crop)
    return common.to_tensor(np.stack(crops))


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: np.ndarray[Any, np.dtype[np.uint8]]) -> float:
    """Return the PSNR of the round trip over all pixels, in dB."""
    errors = []
    for start in range(0, len(images), 16):
        batch = common.to_tensor(images[start : start + 16])
        decoded = vae.decode(vae.encode(batch).latent_dist.mode()).sample.clamp(-1, 1)
        errors.append(((decoded - batch) / 2).square().mean(dim=(1, 2, 3)))
    return float(-10 * torch.log10(torch.cat(errors).mean()))


@torch.no_grad()
def _normalise(vae: AutoencoderKL, images: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
    latents = torch.cat(
        [
            vae.encode(common.to_tensor(images[start : start + 32])).latent_dist.mode()
            for start in range(0, len(images), 32)
        ]
    )
    mean, spread = (
        latents.mean(dim=(0, 2, 3)),
        latents.std(dim=(0, 2, 3)) * vae.config.scaling_factor,
    )
    quant, post = vae.quant_conv, vae.post_quant_conv
    # The second half of the encoder's output is the logarithm of the variance.
    quant.weight[:4] /= spread[:, None, None, None]
    quant.bias[:4] = (quant.bias[:4] - mean) / spread
    quant.bias[4:] -= 2 * spread.log()
    post.bias += (post.weight[:, :, 0, 0] * mean).sum(dim=1)
    post.weight *= spread[None, :, None, None]


@torch.no_grad()
def _sheet(vae: AutoencoderKL, images: np.ndarray[Any, np.dtype[np.uint8]], path: Path) -> None:
    decoded = vae.decode(vae.encode(common.to_tensor(images)).latent_dist.mode()).sample
    rows = [
        np.concatenate(list(images), axis=1),
        np.concatenate(list(common.to_pixels(decoded)), axis=1),
    ]
    Image.fromarray(np.concatenate(rows)).save(path)


if __name__ == "__main__":
    main()
