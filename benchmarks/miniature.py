"""Test whether the miniature follows prompts: `python benchmarks/miniature.py [--prompts 200]`.

A judge that uses geometry and colours, not a learned model, examines images that the engine makes
from held-out prompts. Prints one JSON object: PSNR of the VAE round trip, fractions of pictures
with the right shape, colour and background at guidance 6 and 1 and with the adapter, the fraction
of pictures with the adapter's new shape, at multipliers 1 and 0, and seconds per image.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import AutoencoderKL

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tools.miniature import train_vae, world  # noqa: E402
from tools.miniature.exam import new_shape_scenes, scores  # noqa: E402
from tools.miniature.train_unet import held_out_scenes  # noqa: E402

from fidelora import AdapterRef, Engine, Recipe  # noqa: E402

SEED = 2026
BASE = "fidelora:miniature"
FOLDER = ROOT / "src" / "fidelora" / "miniature"
ADAPTER = FOLDER.parent / "demo_data" / "sks.safetensors"
SETTINGS: dict[str, Any] = {
    "base_model": BASE,
    "width": world.SIZE,
    "height": world.SIZE,
    "steps": 25,
    "guidance_scale": 6.0,
}


def round_trip() -> float:
    """Return the PSNR of encoding and decoding, in dB."""
    rng = np.random.default_rng(SEED)
    images = np.stack([world.draw(world.random_scene(rng), rng) for _ in range(64)])
    return train_vae.psnr(AutoencoderKL.from_pretrained(FOLDER / "vae").float(), images)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=int, default=200)
    count = parser.parse_args().prompts
    engine = Engine(device="cpu")
    base = Recipe(prompt="", **SETTINGS)
    scenes, moons = held_out_scenes(count, SEED), new_shape_scenes(count, SEED)
    result: dict[str, Any] = {"prompts": count, "vae_psnr": round(round_trip(), 2)}
    result["guidance 6"] = scores(engine, scenes, base, SEED)
    result["guidance 1"] = scores(engine, scenes, replace(base, guidance_scale=1.0), SEED)
    adapter = AdapterRef.from_file(ADAPTER)
    with_adapter, at_zero = (
        replace(base, adapters=(adapter,)),
        replace(base, adapters=(replace(adapter, multiplier=0.0),)),
    )
    result["guidance 6, with the adapter"] = scores(engine, scenes, with_adapter, SEED)
    result["the new shape, with the adapter"] = scores(engine, moons, with_adapter, SEED)["shape"]
    result["the new shape, at multiplier 0"] = scores(engine, moons, at_zero, SEED)["shape"]
    seconds = []
    for seed in range(9):
        start = time.perf_counter()
        engine.generate(replace(base, prompt="a red star on a blue background", seed=seed))
        seconds.append(time.perf_counter() - start)
    result["seconds for one image"] = round(statistics.median(seconds), 2)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
