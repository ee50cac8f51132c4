"""Step 4, packaging: `python -m tools.miniature.package --work DIR`.

Writes the trained weights into the package, in the layout of Stable Diffusion 1.5. Makes the
pictures of the model card: the first samples of a seed, without selection, and the loss curves.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import shutil
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load, load_file, save_file
from tools.miniature import world
from tools.miniature.train_unet import SPEC, held_out_scenes

from fidelora import Engine, Recipe
from fidelora.atomic import write_atomically

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "src" / "fidelora" / "miniature"
IMAGES = ROOT / "docs" / "images"
ADAPTER = FOLDER.parent / "demo_data" / "sks.safetensors"
SEED = 5
COLUMNS, ROWS, GAP = 8, 4, 6
TEXT, LINES = 11, 4  # size of the font in pixels, and lines of a caption
CURVES = {"vae": "#3060c0", "unet-start": "#d09080", "unet": "#c04030", "lora": "#309050"}
"""Names of the loss logs in the work folder, and colours of the curves. `unet-start` exists only if
the training of the UNet began with a trained miniature (`--start`)."""
WIDTH, HEIGHT, MARGIN = 720, 240, 40


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    work = parser.parse_args().work
    if FOLDER.exists():
        shutil.rmtree(FOLDER)
    shutil.copytree(work / "miniature", FOLDER)
    _add_text_model_level(FOLDER / "text_encoder" / "model.safetensors")
    shutil.copy(work / ADAPTER.name, ADAPTER)
    _write_json(
        FOLDER / "scheduler" / "scheduler_config.json",
        {"_class_name": "PNDMScheduler", **SPEC.samplers["ddpm"].config},
    )
    _write_json(FOLDER / "model_index.json", _index())
    IMAGES.mkdir(exist_ok=True)
    _samples().save(IMAGES / "miniature-samples.png", optimize=True)
    write_atomically(IMAGES / "miniature-losses.svg", _losses(work).encode())
    for file in [*sorted(FOLDER.rglob("*.safetensors")), ADAPTER]:
        count = sum(tensor.numel() for tensor in load_file(file).values())
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        print(f"| `{file.relative_to(FOLDER.parent)}` | {count:,} | `{digest}` |")
    total = sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file())
    print(f"{total / 1e6:.1f} MB without the adapter")


def _index() -> dict[str, Any]:
    return {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _add_text_model_level(path: Path) -> None:
    """Add the prefix `text_model.` to the names of a text encoder's weights.

    Recent releases of transformers, such as 5.23, omit the prefix when they save. Earlier ones,
    such as 5.5.3, then load random weights without an error. Current releases read both forms.
    """
    weights = load(path.read_bytes())
    named = {f"text_model.{name.removeprefix('text_model.')}": w for name, w in weights.items()}
    save_file(named, path, {"format": "pt"})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _samples() -> Image.Image:
    engine, rng = Engine(device="cpu"), np.random.default_rng(SEED)
    side, text_height = world.SIZE, (TEXT + 2) * LINES
    sheet = Image.new(
        "RGB", (COLUMNS * (side + GAP) + GAP, ROWS * (side + text_height + GAP) + GAP), "white"
    )
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(TEXT)
    for number, scene in enumerate(held_out_scenes(COLUMNS * ROWS, SEED)):
        prompt = world.caption(scene, rng)
        recipe = Recipe(
            prompt=prompt, base_model="fidelora:miniature", width=side, height=side, seed=number
        )
        left, top = (
            GAP + number % COLUMNS * (side + GAP),
            GAP + number // COLUMNS * (side + text_height + GAP),
        )
        sheet.paste(Image.fromarray(engine.generate(recipe).pixels), (left, top))
        draw.multiline_text(
            (left, top + side),
            "\n".join(wrap(prompt, 22)[:LINES]),
            fill="black",
            font=font,
            spacing=1,
        )
    return sheet


def _losses(work: Path) -> str:
    """Return an SVG with each loss over its run, on separate logarithmic scales."""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    existing = {name: colour for name, colour in CURVES.items() if (work / f"{name}.csv").exists()}
    for number, (name, colour) in enumerate(existing.items()):
        with (work / f"{name}.csv").open(encoding="utf-8") as file:
            rows = [
                (int(step), float(seconds), float(loss)) for step, seconds, loss in csv.reader(file)
            ]
        logs = np.log([loss for _, _, loss in rows])
        low, spread = logs.min(), max(float(np.ptp(logs)), 1e-9)
        across = (WIDTH - 2 * MARGIN) * np.array([step for step, _, _ in rows]) / rows[-1][0]
        up = (HEIGHT - 2.5 * MARGIN) * (logs - low) / spread
        points = " ".join(
            f"{MARGIN + x:.1f},{HEIGHT - MARGIN - y:.1f}" for x, y in zip(across, up, strict=True)
        )
        first, last = rows[0][2], rows[-1][2]
        title = (
            f"{name}: {rows[-1][0]} steps, {rows[-1][1] / 60:.0f} minutes, "
            f"{first:.3g} to {last:.3g}"
        )
        lines.append(f'<text x="{MARGIN}" y="{18 + 16 * number}" fill="{colour}">{title}</text>')
        lines.append(
            f'<polyline fill="none" stroke="{colour}" stroke-width="1.2" points="{points}"/>'
        )
    lines.append(
        f'<text x="{WIDTH - MARGIN}" y="{HEIGHT - 12}" text-anchor="end">part of the run</text>'
        "</svg>"
    )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
