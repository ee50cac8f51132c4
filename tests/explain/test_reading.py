"""Settings in pictures of other programs."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.explain.other_programs import graph, infotext, png

from fidelora import Recipe
from fidelora.errors import ImageRecordError
from fidelora.explain.picture import Picture
from fidelora.explain.prompts import comfyui_spans
from fidelora.explain.read_picture import read_picture, reading_of_recipe
from fidelora.explain.reading import Reading, UsedLora, stem
from fidelora.images.read import RECORD_KEY

PIXELS = np.zeros((8, 8, 3), np.uint8)
SETTINGS: dict[str, Any] = {
    "prompt": "a sks ball",
    "seed": 7,
    "steps": 20,
    "cfg": 6.5,
    "width": 64,
    "height": 72,
}


def read(**texts: str) -> Reading:
    return read_picture(png(PIXELS, **texts))


def of_graph(nodes: dict[str, Any]) -> Reading:
    return read(prompt=json.dumps(nodes))


def standard() -> dict[str, Any]:
    """Return ComfyUI's standard graph with a LoRA."""
    nodes: dict[str, Any] = json.loads(
        graph(
            **SETTINGS, negative="bad", sampler="euler", scheduler="karras",
            lora=("people\\sks.safetensors", 0.8, 0.5), skip=2,
        )
    )  # fmt: skip
    return nodes


def test_settings_of_a_comfyui_graph_are_read():
    found = of_graph(standard())
    assert (found.program, found.prompt, found.negative_prompt) == ("ComfyUI", "a sks ball", "bad")
    assert (found.seed, found.steps, found.guidance_scale) == (7, 20, 6.5)
    assert (found.width, found.height, found.batch) == (64, 72, 1)
    assert (found.sampler, found.scheduler, found.clip_skip) == ("euler", "karras", 2)
    assert found.loras == (UsedLora("sks", 0.8, 0.5),)
    assert found.base_model.name == "mini"
    assert found.unsupported == ()


def test_a_lora_on_the_model_only_has_no_strength_in_the_text_encoder():
    nodes = standard()
    nodes["10"]["class_type"] = "LoraLoaderModelOnly"
    del nodes["10"]["inputs"]["clip"], nodes["10"]["inputs"]["strength_clip"]
    nodes["11"]["inputs"]["clip"] = ["4", 1]
    assert of_graph(nodes).loras == (UsedLora("sks", 0.8, 0.0),)


def test_a_lora_on_the_text_encoder_only_has_no_strength_in_the_model():
    nodes = standard()
    nodes["3"]["inputs"]["model"] = ["4", 0]
    assert of_graph(nodes).loras == (UsedLora("sks", 0.0, 0.5),)


CUSTOM_LORA_NODES = [
    ("Power Lora Loader (rgthree)", {
        "PowerLoraLoaderHeaderWidget": {"type": "PowerLoraLoaderHeaderWidget"},
        "lora_1": {"on": True, "lora": "sks.safetensors", "strength": 0.8, "strengthTwo": 0.5},
        "lora_2": {"on": False, "lora": "off.safetensors", "strength": 1},
    }),
    ("Lora Loader Stack (rgthree)", {
        "lora_01": "sks.safetensors", "strength_01": 0.8, "lora_02": "None", "strength_02": 1,
    }),
    ("CR LoRA Stack", {
        "switch_1": "On", "lora_name_1": "sks.safetensors", "model_weight_1": 0.8,
        "clip_weight_1": 0.5, "switch_2": "Off", "lora_name_2": "off.safetensors",
    }),
    ("LoRA Stacker", {
        "input_mode": "advanced", "lora_count": 1, "lora_name_1": "sks.safetensors",
        "model_str_1": 0.8, "clip_str_1": 0.5, "lora_wt_1": 1, "lora_name_2": "unused.safetensors",
    }),
    ("LoraLoader|pysssss", {
        "lora_name": {"content": "sks.safetensors", "image": None}, "strength_model": 0.8,
        "strength_clip": 0.5,
    }),
    ("Lora Loader (LoraManager)", {
        "loras": {"__value__": [
            {"name": "sks", "strength": "0.8", "clipStrength": "0.5", "active": True},
            {"name": "off", "strength": 1, "active": False},
        ]},
    }),
]  # fmt: skip


@pytest.mark.parametrize(
    ("node_class", "inputs"), CUSTOM_LORA_NODES, ids=[one[0] for one in CUSTOM_LORA_NODES]
)
def test_loras_of_custom_nodes_are_read(node_class, inputs):
    nodes = standard()
    nodes["10"] = {
        "class_type": node_class,
        "inputs": {"model": ["4", 0], "clip": ["4", 1], **inputs},
    }
    text = 0.8 if "strength_01" in inputs else 0.5
    assert of_graph(nodes).loras == (UsedLora("sks", 0.8, text),)


def test_a_stack_of_loras_is_followed():
    nodes = standard()
    nodes["10"] = {
        "class_type": "CR Apply LoRA Stack",
        "inputs": {"model": ["4", 0], "clip": ["4", 1], "lora_stack": ["20", 0]},
    }
    nodes["20"] = {"class_type": "CR LoRA Stack", "inputs": CUSTOM_LORA_NODES[2][1]}
    assert of_graph(nodes).loras == (UsedLora("sks", 0.8, 0.5),)


def test_values_of_linked_nodes_are_read():
    nodes = standard()
    nodes["3"]["inputs"]["seed"] = ["30", 0]
    nodes["30"] = {"class_type": "Seed (rgthree)", "inputs": {"seed": 123}}
    nodes["6"]["inputs"]["text"] = ["31", 0]
    nodes["31"] = {
        "class_type": "Text Concatenate",
        "inputs": {"delimiter": ", ", "text_a": ["32", 0], "text_b": "on grass"},
    }
    nodes["32"] = {"class_type": "PrimitiveString", "inputs": {"value": "a ball"}}
    found = of_graph(nodes)
    assert (found.seed, found.prompt) == (123, "a ball, on grass")


def test_the_custom_sampling_nodes_are_read():
    nodes = standard()
    nodes["3"] = {
        "class_type": "SamplerCustomAdvanced",
        "inputs": {
            "noise": ["40", 0], "guider": ["41", 0], "sampler": ["42", 0], "sigmas": ["43", 0],
            "latent_image": ["5", 0],
        },
    }  # fmt: skip
    nodes |= {
        "40": {"class_type": "RandomNoise", "inputs": {"noise_seed": 11}},
        "41": {
            "class_type": "CFGGuider",
            "inputs": {"model": ["10", 0], "positive": ["6", 0], "negative": ["7", 0], "cfg": 3.0},
        },
        "42": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "heun"}},
        "43": {
            "class_type": "BasicScheduler",
            "inputs": {"model": ["10", 0], "scheduler": "beta", "steps": 9, "denoise": 1.0},
        },
    }
    found = of_graph(nodes)
    assert (found.seed, found.steps, found.guidance_scale) == (11, 9, 3.0)
    assert (found.sampler, found.scheduler) == ("heun", "beta")
    assert found.loras == (UsedLora("sks", 0.8, 0.5),)
    assert found.prompt == "a sks ball"


def test_the_efficient_loader_is_read():
    nodes = {
        "1": {
            "class_type": "Efficient Loader",
            "inputs": {
                "ckpt_name": "mini.safetensors", "vae_name": "Baked VAE", "clip_skip": -2,
                "lora_name": "sks.safetensors", "lora_model_strength": 0.8,
                "lora_clip_strength": 0.5, "positive": "a ball", "negative": "bad",
                "empty_latent_width": 64, "empty_latent_height": 72, "batch_size": 2,
            },
        },
        "2": {
            "class_type": "KSampler (Efficient)",
            "inputs": {
                "seed": 5, "steps": 9, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal",
                "denoise": 1.0, "model": ["1", 0], "positive": ["1", 1], "negative": ["1", 2],
                "latent_image": ["1", 3], "optional_vae": ["1", 4],
            },
        },
        "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 5]}},
    }  # fmt: skip
    found = of_graph(nodes)
    assert (found.prompt, found.negative_prompt, found.clip_skip) == ("a ball", "bad", 2)
    assert (found.width, found.height, found.batch) == (64, 72, 2)
    assert found.loras == (UsedLora("sks", 0.8, 0.5),)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda nodes: nodes["3"]["inputs"].update(denoise=0.5), "denoising strength"),
        (lambda nodes: nodes["5"].update(class_type="VAEEncode"), "img2img"),
        (
            lambda nodes: nodes.update(
                {
                    "50": {"class_type": "FreeU_V2", "inputs": {"model": ["10", 0]}},
                    "3": {**nodes["3"], "inputs": {**nodes["3"]["inputs"], "model": ["50", 0]}},
                }
            ),
            "FreeU",
        ),
    ],
)
def test_features_that_are_not_simulated_are_named(change, named):
    nodes = standard()
    change(nodes)
    (sentence,) = of_graph(nodes).unsupported
    assert named in sentence


def test_a_graph_with_a_cycle_is_read():
    nodes = standard()
    nodes["10"]["inputs"]["model"] = ["10", 0]
    nodes["6"] = {"class_type": "ConditioningCombine", "inputs": {"conditioning_1": ["6", 0]}}
    nodes["3"]["inputs"]["seed"] = ["3", 0]
    assert of_graph(nodes).steps == 20


def test_settings_of_a1111_are_read():
    found = read(
        parameters=infotext(
            **SETTINGS, sampler="DPM++ 2M", scheduler="Karras", lora=" <lora:sks:0.5:0.8>",
            negative="bad", RNG="CPU", Clip_skip="2", ENSD="31337", Model_hash="0123456789",
        )
    )  # fmt: skip
    assert (found.program, found.prompt, found.negative_prompt) == ("A1111", "a sks ball", "bad")
    assert found.loras == (UsedLora("sks", 0.8, 0.5),)
    assert (found.noise_source, found.clip_skip, found.seed_delta) == ("cpu", 2, 31337)
    assert (found.sampler, found.scheduler, found.emphasis) == ("DPM++ 2M", "Karras", "original")
    assert found.base_model.hash == "0123456789"


@pytest.mark.parametrize(
    ("end", "program"),
    [
        ("Version: f2.0.1v1.10.1-previous-659", "Forge"),
        ("App: SD.Next, Version: 1a2b3c4", "SD.Next"),
        ("Version: v1.10.1", "A1111"),
        ("Version: ComfyUI", "ComfyUI"),
    ],
)
def test_programs_with_a1111s_text_are_told_apart(end, program):
    text = f"a ball\nSteps: 9, Sampler: Euler, CFG scale: 5, Seed: 1, Size: 64x64, {end}"
    assert read(parameters=text).program == program


def test_numbers_with_decimal_commas_are_read():
    line = "Steps: 9, Sampler: Euler, CFG scale: 5,5, Seed: 1, Size: 64x64, Version: v1.10.1"
    found = read(parameters=f"a ball <lora:sks:0,8>\n{line}")
    assert (found.guidance_scale, found.loras) == (5.5, (UsedLora("sks", 0.8, 0.8),))


def test_settings_of_fooocus_are_read():
    settings = {
        "prompt": "a ball", "full_prompt": ["a ball", "cinematic"], "negative_prompt": "",
        "full_negative_prompt": ["bad"], "performance": "Speed", "steps": 30,
        "resolution": "(1024, 896)", "guidance_scale": 4, "sampler": "dpmpp_2m_sde_gpu",
        "scheduler": "karras", "seed": "12", "base_model": "jugger", "base_model_hash": "ab12",
        "lora_combined_1": "sks.safetensors : 0.8", "lora_combined_2": "True : b.safetensors : 0.5",
        "lora_combined_3": "False : c.safetensors : 1.0", "version": "Fooocus v2.5.5",
    }  # fmt: skip
    found = read(parameters=json.dumps(settings), fooocus_scheme="fooocus")
    assert (found.program, found.prompt, found.seed) == ("Fooocus", "a ball, cinematic", 12)
    assert (found.width, found.height) == (1024, 896)
    assert found.loras == (UsedLora("sks", 0.8, 0.8), UsedLora("b", 0.5, 0.5))


FOOOCUS_TEXT = (
    "a ball\nNegative prompt: bad\nSteps: 30, Sampler: dpmpp_2m_sde_gpu, Seed: 5, Size: 64x72, "
    "CFG scale: 4, Base model: mini, Base model hash: AEB7E9E689, Performance: Speed, "
    "Scheduler: karras, VAE: Default (model), Lora hashes: sks: aaaaaaaaaa, Lora weights: sks: 0.4"
)


@pytest.mark.parametrize("end", ["", ", Version: Fooocus v2.5.5"])
@pytest.mark.parametrize("texts", [{}, {"fooocus_scheme": "a1111"}])
def test_settings_of_fooocus_in_a1111s_form_are_read(texts, end):
    found = read(parameters=FOOOCUS_TEXT + end, **texts)
    assert (found.program, found.sampler, found.scheduler) == (
        "Fooocus",
        "dpmpp_2m_sde_gpu",
        "karras",
    )
    assert (found.loras, found.noise_source) == ((UsedLora("sks", 0.4, 0.4, "aaaaaaaaaa"),), "cpu")
    assert (found.base_model.name, found.base_model.hash) == ("mini", "aeb7e9e689")
    assert "Fooocus changes the guidance by its own rules" in found.unsupported[0]


@pytest.mark.parametrize(
    ("end", "program"),
    [
        ("Seed Mode: Scale Alike", "Draw Things"),
        ("RNG: cuda, Version: stable-diffusion.cpp", "stable-diffusion.cpp"),
        ("Created Date: 2026-01-01T00:00:00.0Z", "the generator of Civitai"),
    ],
)
def test_programs_that_only_share_a1111s_text_are_named(end, program):
    text = f"a ball\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 5, Size: 64x72, {end}"
    found = read(parameters=text)
    assert (found.program, found.steps, found.seed) == ("unknown", 20, 5)
    assert (found.noise_source, found.clip_skip, found.emphasis) == (None, None, None)
    assert f"The picture was made with {program}, which is not simulated." in found.unsupported


def test_loras_among_the_resources_of_civitai_are_read():
    resources = [
        {"type": "checkpoint", "modelVersionId": 1, "modelName": "A"},
        {"type": "lora", "weight": 0.8, "modelVersionId": 2, "modelName": "B, C"},
        {"type": "lora", "modelVersionId": 3},
    ]
    found = read(parameters=infotext_with(f"Civitai resources: {json.dumps(resources)}"))
    assert found.loras == (UsedLora("B, C", 0.8, 0.8), UsedLora("modelVersionId 3"))


def infotext_with(end: str) -> str:
    return f"a ball\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 5, Size: 64x72, {end}"


@pytest.mark.parametrize(
    ("end", "named"),
    [
        ("Noise Schedule: Zero Terminal SNR", "noise schedule Zero Terminal SNR"),
        ("Beta schedule alpha: 0.6", "another beta schedule"),
        ("Script: X/Y/Z plot", "a grid of several pictures"),
        ("RP Active: True", "prompts for regions"),
        ("kohya_hrfix_enabled: True", "deep shrink"),
        ("Detailer: face, App: SD.Next", "a detailer"),
    ],
)
def test_more_features_of_web_uis_are_named(end, named):
    assert named in " ".join(read(parameters=infotext_with(end)).unsupported)
    assert read(parameters=infotext_with("Noise Schedule: Default")).unsupported == ()


def test_upscaling_after_sampling_is_named():
    extras = "Postprocess upscale by: 2, Postprocess upscaler: ESRGAN"
    found = read(parameters=infotext_with("Version: v1.10.1"), postprocessing=extras)
    assert "upscaling after sampling" in found.unsupported[0]
    nodes = standard() | {"90": {"class_type": "ImageUpscaleWithModel", "inputs": {}}}
    assert "resized after sampling" in of_graph(nodes).unsupported[0]


@pytest.mark.parametrize(
    ("texts", "program"),
    [
        ({"use_stable_diffusion_model": "a"}, "Easy Diffusion"),
        ({"sd-metadata": "{}"}, "an old version of InvokeAI"),
        ({"XML:com.adobe.xmp": "<exif:UserComment/>"}, "Draw Things"),
    ],
)
def test_programs_whose_settings_are_not_read_are_named(texts, program):
    found = read(**texts)
    assert found.is_empty
    assert f"was made with {program}" in found.unsupported[0].replace(
        "a program that stores XMP, such as ", ""
    )


def test_a_webp_of_novelai_is_read():
    comment = json.dumps({"prompt": "a ball", "uc": "bad", "seed": 5, "sampler": "k_euler"})
    text = json.dumps({"Software": "NovelAI", "Source": "NovelAI Diffusion V4", "Comment": comment})
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = text.encode()
    content = io.BytesIO()
    Image.new("RGB", (8, 8)).save(content, "WEBP", exif=exif.tobytes())
    found = read_picture(content.getvalue())
    assert (found.program, found.seed, found.sampler) == ("NovelAI", 5, "euler")


@pytest.mark.parametrize(
    ("key", "feature"), [("refinerupscale", "upscaling by the refiner"), ("initimage", "img2img")]
)
def test_features_of_swarmui_are_named(key, feature):
    settings = {"prompt": "a <lora:sks:1>", "seed": 5, "steps": 2, key: 2}
    found = read(parameters=json.dumps({"sui_image_params": settings}))
    assert found.unsupported == (f"The picture was made with {feature}, which is not simulated.",)


@pytest.mark.parametrize(
    ("key", "feature"), [("controlnets", "ControlNet"), ("hrf_enabled", "hires. fix")]
)
def test_features_of_invokeai_are_named(key, feature):
    settings = {"positive_prompt": "a", "seed": 5, "controlnets": [], key: [1]}
    found = read(invokeai_metadata=json.dumps(settings))
    assert found.unsupported == (f"The picture was made with {feature}, which is not simulated.",)


def test_settings_of_novelai_are_read():
    comment = {
        "prompt": "a ball", "uc": "bad", "steps": 28, "scale": 5.0, "seed": 3, "width": 832,
        "height": 1216, "sampler": "k_euler_ancestral", "noise_schedule": "karras",
    }  # fmt: skip
    found = read(Software="NovelAI", Source="NovelAI Diffusion V3", Comment=json.dumps(comment))
    assert (found.program, found.sampler, found.scheduler) == (
        "NovelAI", "euler_ancestral", "karras",
    )  # fmt: skip
    assert found.unsupported


def test_settings_of_swarmui_and_invokeai_are_read():
    swarm = {"prompt": "a ball", "seed": 5, "steps": 12, "cfgscale": 1.5, "loras": ["x/sks"],
             "loraweights": ["0.8"]}  # fmt: skip
    found = read(parameters=json.dumps({"sui_image_params": swarm}))
    assert (found.program, found.loras) == ("SwarmUI", (UsedLora("sks", 0.8, 0.8),))
    invoke = {
        "positive_prompt": "a ball", "seed": 5, "steps": 12, "scheduler": "euler_k",
        "loras": [{"model": {"name": "sks"}, "weight": 0.8}], "rand_device": "cpu",
    }  # fmt: skip
    found = read(invokeai_metadata=json.dumps(invoke))
    assert (found.program, found.sampler) == ("InvokeAI", "euler_k")
    assert found.loras == (UsedLora("sks", 0.8, 0.8),)


def test_the_own_recipe_is_read():
    recipe = Recipe(prompt="a ball", seed=4)
    record = json.dumps({"recipe": recipe.to_dict(), "digest": recipe.digest, "environment": {}})
    found = read(**{RECORD_KEY: record})
    assert (found.program, found.prompt, found.seed) == ("Fidelora", "a ball", 4)


@pytest.mark.parametrize(
    "texts", [{}, {"prompt": "{"}, {"prompt": '{"1": 5}'}, {"parameters": "a picture of a cat"}]
)
def test_a_picture_without_settings_gives_an_empty_reading(texts):
    found = read(**texts)
    assert (found.program, found.is_empty) == ("unknown", True)


def test_names_of_files_are_shortened():
    assert stem("people\\sks.safetensors") == stem("people/sks") == "sks"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a cat", [("a cat", 1.0)]),
        ("a (red) cat", [("a ", 1.0), ("red", 1.1), (" cat", 1.0)]),
        ("((red))", [("red", 1.1 * 1.1)]),
        ("(red:1.3)", [("red", 1.3)]),
        ("((red:1.3) hat)", [("red", 1.3), (" hat", 1.1)]),
        (r"a \(red\) cat", [("a (red) cat", 1.0)]),
        ("[red] BREAK", [("[red] BREAK", 1.0)]),
        ("(a: b)", [("a: b", 1.1)]),
        ("(open", [("(open", 1.0)]),
    ],
)
def test_comfyui_weights_round_brackets_only(prompt, expected):
    found = comfyui_spans(prompt)
    assert [text for text, _ in found] == [text for text, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected])


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"base_model": "base.safetensors"}, "ab" * 32),
        ({"base_model": "owner/name"}, ""),
        ({"base_model": "base.safetensors", "vae": "vae.safetensors"}, ""),
        ({"base_model": "base.safetensors", "config": "folder"}, ""),
    ],
)
def test_only_the_hash_of_a_single_file_is_that_of_the_base_model(fields, expected):
    """Other base models have a hash of several hashes, which never equals that of a file."""
    recipe = Recipe(prompt="a cat", base_sha256="ab" * 32, **fields)
    base = reading_of_recipe(recipe).base_model
    assert base is not None
    assert base.hash == expected


def test_an_animation_is_refused():
    frames = [Image.new("RGB", (8, 8), (level, 0, 0)) for level in (0, 99, 200)]
    file = io.BytesIO()
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:])
    with pytest.raises(ImageRecordError, match=r"clip\.webp is an animation of 3 frames"):
        Picture.read(file.getvalue(), "clip.webp")
