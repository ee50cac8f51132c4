"""Settings of another program as a file: ComfyUI's workflow, A1111's text, a diffusers script."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from fidelora.explain.nearest import NearestPicture, Target
from fidelora.explain.programs import Sampling, a1111_names
from fidelora.explain.reading import stem
from fidelora.families import NoiseSampler, get_family
from fidelora.recipe import AdapterRef, Recipe

SUFFIXES: Mapping[Target, str] = {"A1111": ".txt", "ComfyUI": ".json", "diffusers": ".py"}
"""Suffix of the written file by program."""

_MAX_OWN_NAME = 100  # characters of a model's name in a written file


def written(nearest: NearestPicture) -> str:
    """Return the content of the file with the settings of a picture."""
    if nearest.program == "ComfyUI":
        return json.dumps(comfyui_workflow(nearest), indent=2, ensure_ascii=False) + "\n"
    if nearest.program == "A1111":
        return infotext(nearest) + "\n"
    return diffusers_script(nearest)


def lora_of(recipe: Recipe) -> AdapterRef | None:
    """Return the LoRA of a recipe that `check_is_supported` accepts; None if it has none."""
    return recipe.adapters[0] if recipe.adapters else None


def lora_name(ref: AdapterRef) -> str:
    """Return the name of a LoRA's file without its suffix."""
    return stem(ref.path.name) if ref.path is not None else ref.name


# --- ComfyUI --------------------------------------------------------------------------------------


def comfyui_workflow(
    nearest: NearestPicture, *, checkpoint: str = "", lora: str = ""
) -> dict[str, Any]:
    """Return a workflow of ComfyUI's own nodes in the API format.

    ComfyUI opens it with Workflow > Open, and runs it as `prompt` of `POST /prompt`.

    Args:
        checkpoint, lora: names of the files in ComfyUI; by default those on this machine.
    """
    one, recipe = nearest.simulation, nearest.plan.recipe
    checkpoint = checkpoint or _checkpoint_name(recipe)
    nodes = {"4": _node("CheckpointLoaderSimple", ckpt_name=checkpoint)}
    model, clip, vae = ["4", 0], ["4", 1], ["4", 2]
    if ref := lora_of(recipe):
        nodes["10"] = _node(
            "LoraLoader",
            lora_name=lora or f"{lora_name(ref)}.safetensors",
            strength_model=one.strength,
            strength_clip=one.text_strength,
            model=model,
            clip=clip,
        )
        model, clip = ["10", 0], ["10", 1]
    if recipe.prediction == "v_prediction":
        nodes["11"] = _node(
            "ModelSamplingDiscrete", sampling="v_prediction", zsnr=False, model=model
        )
        model = ["11", 0]
    if recipe.vae:
        nodes["12"] = _node("VAELoader", vae_name=f"{stem(recipe.vae)}.safetensors")
        vae = ["12", 0]
    return nodes | {
        "5": _node("EmptyLatentImage", width=one.width, height=one.height, batch_size=1),
        "6": _node("CLIPTextEncode", text=one.prompt, clip=clip),
        "7": _node("CLIPTextEncode", text=one.negative_prompt, clip=clip),
        "3": _node(
            "KSampler",
            seed=one.seed,
            steps=one.steps,
            cfg=one.guidance_scale,
            sampler_name=one.sampler,
            scheduler=one.schedule,
            denoise=1.0,
            model=model,
            positive=["6", 0],
            negative=["7", 0],
            latent_image=["5", 0],
        ),
        "8": _node("VAEDecode", samples=["3", 0], vae=vae),
        "9": _node("SaveImage", filename_prefix="fidelora", images=["8", 0]),
    }


def _node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def _checkpoint_name(recipe: Recipe) -> str:
    return f"{stem(recipe.base_model)[:_MAX_OWN_NAME]}.safetensors"


# --- AUTOMATIC1111's web UI -----------------------------------------------------------------------


def infotext(nearest: NearestPicture) -> str:
    """Return the text that A1111 reads into its fields: paste it as the prompt, then click ↙."""
    one, recipe = nearest.simulation, nearest.plan.recipe
    sampler, schedule = a1111_names(_sampling_of(nearest))
    lines = [a1111_prompt(nearest)]
    if one.negative_prompt:
        lines.append(f"Negative prompt: {one.negative_prompt}")
    fields = {
        "Steps": one.steps,
        "Sampler": sampler,
        "Schedule type": schedule,
        "CFG scale": f"{one.guidance_scale:g}",
        "Seed": one.seed,
        "Size": f"{one.width}x{one.height}",
        "Model": _quoted(stem(recipe.base_model)),
        "RNG": "CPU",
    }
    lines.append(", ".join(f"{name}: {value}" for name, value in fields.items()))
    return "\n".join(lines)


def _quoted(text: str) -> str:
    """Return a value as A1111 writes it: in quotes if it contains a separator."""
    is_plain = not any(character in text for character in ',:"\n')
    return text if is_plain else json.dumps(text, ensure_ascii=False)


def a1111_prompt(nearest: NearestPicture, *, lora: str = "") -> str:
    """Return the prompt with the tag of the LoRA.

    Args:
        lora: name of the LoRA in A1111; by default that of its file.
    """
    one, ref = nearest.simulation, lora_of(nearest.plan.recipe)
    if ref is None:
        return one.prompt
    return f"{one.prompt} <lora:{lora or lora_name(ref)}:{one.strength:g}>"


def txt2img_body(nearest: NearestPicture, *, lora: str = "") -> dict[str, Any]:
    """Return the body of `POST /sdapi/v1/txt2img`, without the checkpoint."""
    one = nearest.simulation
    sampler, schedule = a1111_names(_sampling_of(nearest))
    is_emptied = nearest.plan.recipe.model == "sdxl" and not one.negative_prompt
    return {
        "prompt": a1111_prompt(nearest, lora=lora),
        # A1111 replaces an empty negative prompt of SDXL by zeros.
        "negative_prompt": " " if is_emptied else one.negative_prompt,
        "steps": one.steps,
        "sampler_name": sampler,
        "scheduler": schedule,
        "cfg_scale": one.guidance_scale,
        "seed": one.seed,
        "width": one.width,
        "height": one.height,
        "override_settings": {
            "randn_source": "CPU",
            "CLIP_stop_at_last_layers": 1,
            "emphasis": "Original",
            "eta_noise_seed_delta": 0,
        },
    }


def _sampling_of(nearest: NearestPicture) -> Sampling:
    one = nearest.simulation
    return Sampling(one.library, one.sampler, one.schedule)


# --- diffusers ------------------------------------------------------------------------------------


def diffusers_script(nearest: NearestPicture) -> str:
    """Return a Python script that makes the sample with diffusers and writes it to a file."""
    one, recipe = nearest.simulation, nearest.plan.recipe
    sampler = cast(NoiseSampler, get_family(recipe.model).samplers[recipe.sampler])
    config = {**sampler.config, "prediction_type": recipe.prediction}
    if recipe.timestep_spacing != "default":
        config["timestep_spacing"] = recipe.timestep_spacing
    is_xl = recipe.model == "sdxl"
    pipeline = "StableDiffusionXLPipeline" if is_xl else "StableDiffusionPipeline"
    is_file = Path(recipe.base_model).suffix == ".safetensors"
    load = "from_single_file" if is_file else "from_pretrained"
    names = {pipeline, sampler.scheduler} | ({"AutoencoderKL"} if recipe.vae else set())
    options = "" if is_xl else ", safety_checker=None"
    if recipe.variant and not is_file:
        options += f", variant={recipe.variant!r}"
    lines = [
        f'"""Sample {nearest.plan.index} of step {nearest.plan.round}, made with diffusers.',
        "",
        f"Mean difference from the trainer's sample, simulated: {nearest.there.distance:.2f} "
        "levels.",
        '"""',
        "",
        "import sys",
        "",
        "import torch",
        f"from diffusers import {', '.join(sorted(names))}",
        "",
        f"BASE_MODEL = {_absolute(recipe.base_model)!r}",
    ]
    ref = lora_of(recipe)
    if ref is not None:
        lines.append(f"LORA = {_absolute(str(ref.path))!r}")
    lines += [
        'OUTPUT = sys.argv[1] if len(sys.argv) > 1 else "sample.png"',
        "",
        f"pipe = {pipeline}.{load}(",
        f"    BASE_MODEL, torch_dtype=torch.{one.dtype}{options}",
        ")",
        "# Set after the pipeline is made, because its constructor changes the configuration.",
        f"pipe.scheduler = {sampler.scheduler}.from_config(",
        "    {",
        *(f"        {name!r}: {value!r}," for name, value in config.items()),
        "    }",
        ")",
    ]
    if recipe.vae:
        vae_load = "from_single_file" if Path(recipe.vae).suffix else "from_pretrained"
        lines += [
            f"VAE = {_absolute(recipe.vae)!r}",
            f"pipe.vae = AutoencoderKL.{vae_load}(VAE, torch_dtype=pipe.dtype)",
        ]
    if is_xl:
        lines += [
            "# Training encodes an empty negative prompt instead of replacing it by zeros.",
            "pipe.register_to_config(force_zeros_for_empty_prompt=False)",
        ]
    if ref is not None:
        lines += [
            'pipe.load_lora_weights(LORA, adapter_name="lora")',
            f'pipe.set_adapters(["lora"], [{one.strength!r}])',
        ]
    call = {
        "prompt": one.prompt,
        "negative_prompt": one.negative_prompt,
        "width": one.width,
        "height": one.height,
        "num_inference_steps": one.steps,
        "guidance_scale": one.guidance_scale,
        "clip_skip": None,  # None: the usual layer, as in training
    }
    if one.guidance_rescale:
        call["guidance_rescale"] = one.guidance_rescale
    if recipe.eta is not None:
        call["eta"] = recipe.eta
    lines += [
        'pipe.to("cuda" if torch.cuda.is_available() else "cpu")',
        "image = pipe(",
        *(f"    {name}={value!r}," for name, value in call.items()),
        f'    generator=torch.Generator("cpu").manual_seed({one.seed}),',
        ").images[0]",
        "image.save(OUTPUT)",
    ]
    return "\n".join(lines) + "\n"


def _absolute(location: str) -> str:
    """Return the absolute path of a file or folder; other locations are unchanged."""
    path = Path(location).expanduser()
    return str(path.resolve()) if path.exists() else location
