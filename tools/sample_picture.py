"""Draw docs/images/sample-and-ours.png: two samples of the packaged training run.

Each row has the trainer's sample, Fidelora's picture, their difference, and the picture that
diffusers makes with the same LoRA file. The script also prints how similar the pictures of Fidelora
and diffusers are to the sample. Needs peft (`pip install --group bench`).

On processors without bfloat16 instructions, Fidelora's picture differs from the sample in some
pixels. On these, the script draws the sample in place of Fidelora's picture. Both are the same on
AMD Zen 4, on which the samples were made.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from numpy.typing import NDArray
from transformers import CLIPTokenizer

import fidelora
from fidelora import Engine
from fidelora.families.clip_tokenizer import CLIP_TOKENIZER
from fidelora.training.compare import compare, similarity
from fidelora.training.plan import PlannedSample, plan_samples
from fidelora.training.run_folder import read_run
from fidelora.training.sheet import side_by_side, stack_vertically
from fidelora.training.verify import check_sample

PACKAGE = Path(fidelora.__file__).parent
RUN = PACKAGE / "demo_data" / "zrk_fp32"
BASE = PACKAGE / "miniature"
TARGET = Path(__file__).parents[1] / "docs" / "images" / "sample-and-ours.png"
SHOWN = (0, 1)


def main() -> None:
    """Write the picture."""
    run = read_run(RUN)
    plans = plan_samples(run, run.steps, base_model=str(BASE))
    engine = Engine(device="cpu")
    pipeline = StableDiffusionPipeline.from_pretrained(
        BASE,
        tokenizer=CLIPTokenizer.from_pretrained(CLIP_TOKENIZER),
        safety_checker=None,
        torch_dtype=torch.float32,
    )
    pipeline.load_lora_weights(RUN, weight_name="zrk_fp32.safetensors")
    rows = []
    for plan in plans:
        checked = check_sample(plan, engine)
        theirs = _diffusers(pipeline, plan)
        comparison = compare(theirs, checked.trainer)
        psnr, _ = similarity(theirs, checked.trainer)
        title = f"{plan.recipe.prompt}, seed {plan.recipe.seed}"
        print(f"{title}: Fidelora {checked.summary} ({checked.psnr} dB)")
        print(f"  diffusers: {comparison.percent_text} % of pixels the same, {psnr:.1f} dB")
        if plan.index in SHOWN:
            ours = checked.replayed if _has_bfloat16() else checked.trainer
            label = f"diffusers, {psnr:.1f} dB"
            rows.append(side_by_side(checked.trainer, ours, title, {label: theirs}))
    stack_vertically(rows).save(TARGET, optimize=True)
    print(TARGET)


def _has_bfloat16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported())


def _diffusers(pipeline: StableDiffusionPipeline, plan: PlannedSample) -> NDArray[np.uint8]:
    """Return the picture of a plain diffusers script: the pipeline's scheduler, the same values."""
    recipe = plan.recipe
    image = pipeline(
        recipe.prompt,
        negative_prompt=recipe.negative_prompt,
        width=recipe.width,
        height=recipe.height,
        num_inference_steps=recipe.steps,
        guidance_scale=recipe.guidance_scale,
        generator=torch.Generator().manual_seed(recipe.seed),
    ).images[0]
    return np.asarray(image)


if __name__ == "__main__":
    main()
