"""Images of SwarmUI and InvokeAI are read; those of other programs are refused by name."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from PIL import ExifTags, Image, PngImagePlugin

from fidelora.errors import ImageRecordError
from fidelora.images.a1111_prompt import NamedLora
from fidelora.images.parameters import Parameters
from fidelora.images.read import read_origin

SWARM = {
    "prompt": "a creature",
    "negativeprompt": "bad",
    "model": "models/a",
    "seed": 5,
    "steps": 12,
    "cfgscale": 1.5,
    "width": 64,
    "height": 72,
    "sampler": "euler",
    "scheduler": "normal",
    "loras": ["people/sks", "b.safetensors"],
    "loraweights": ["0.8", "-1"],
    "swarm_version": "0.9.4.1",
    "aspectratio": "1:1",
}
INVOKE = {
    "generation_mode": "txt2img",
    "positive_prompt": "a creature",
    "negative_prompt": "bad",
    "width": 64,
    "height": 72,
    "seed": 5,
    "rand_device": "cpu",
    "cfg_scale": 1.5,
    "cfg_rescale_multiplier": 0,
    "steps": 12,
    "scheduler": "euler_k",
    "model": {"key": "x", "name": "a"},
    "loras": [
        {"model": {"name": "people/sks"}, "weight": 0.8},
        {"lora": {"model_name": "b", "base_model": "sd-1"}, "weight": -1},
    ],
    "seamless_x": False,
    "app_version": "6.14.0",
}
LORAS = (NamedLora("people/sks", 0.8), NamedLora("b", -1.0))


def png(**texts: str) -> bytes:
    info = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def read(content: bytes) -> Parameters:
    parameters = read_origin(content).parameters
    assert parameters is not None
    return parameters


def swarm_parameters(**changes: Any) -> Parameters:
    return read(png(parameters=json.dumps({"sui_image_params": SWARM | changes})))


def invoke_parameters(**changes: Any) -> Parameters:
    return read(png(invokeai_metadata=json.dumps(INVOKE | changes)))


@pytest.mark.parametrize(
    ("one", "sampler"), [(swarm_parameters, "euler"), (invoke_parameters, "k_euler")]
)
def test_settings_of_swarmui_and_invokeai_are_read(one, sampler):
    found = one()
    assert (found.prompt, found.negative_prompt, found.loras) == ("a creature", "bad", LORAS)
    assert {name: found.fields[name] for name in ("seed", "steps", "width", "height")} == {
        "seed": 5,
        "steps": 12,
        "width": 64,
        "height": 72,
    }
    assert (found.fields["guidance_scale"], found.fields["sampler"]) == (1.5, sampler)
    assert [one.name for one in found.ignored] == ["model"]


@pytest.mark.parametrize(
    ("sampler", "scheduler", "expected"),
    [
        ("euler_ancestral", "normal", "euler_a"),
        ("dpmpp_2m", "karras", "k_dpmsolver++"),
        ("dpmpp_2m", "normal", "dpmsolver++"),
        ("euler", "", "euler"),
        ("", "", "euler"),  # stored only if the user selects one
        (None, None, "euler"),
        ("", "karras", "k_euler"),
        ("lms", "karras", "k_lms"),
        ("ddim", "normal", "ddim"),
    ],
)
def test_samplers_of_swarmui_have_their_schedules(sampler, scheduler, expected):
    found = swarm_parameters(sampler=sampler, scheduler=scheduler)
    assert (found.fields["sampler"], found.fields["timestep_spacing"]) == (expected, "default")


def test_the_schedule_of_few_step_loras_is_read():
    found = swarm_parameters(sampler="euler", scheduler="sgm_uniform")
    assert found.fields["timestep_spacing"] == "sgm_uniform"


@pytest.mark.parametrize(
    ("found", "named"),
    [
        (lambda: swarm_parameters(sampler="res_multistep"), "sampler"),
        (lambda: swarm_parameters(scheduler="beta"), "sampler"),
        (lambda: invoke_parameters(scheduler="unipc"), "sampler"),
        (lambda: swarm_parameters(seed=-1), "seed"),
        (lambda: invoke_parameters(seed=2**64), "seed"),
        (lambda: swarm_parameters(steps="many"), "steps"),
        (lambda: swarm_parameters(cfgscale=[1]), "cfgscale"),
        (lambda: swarm_parameters(cfgscale=10**400), "cfgscale"),
        (lambda: invoke_parameters(width=True), "width"),
        (lambda: swarm_parameters(prompt=["a"]), "prompt"),
        (lambda: swarm_parameters(steps=0), "steps"),
        (lambda: swarm_parameters(cfgscale=101), "cfgscale"),
        (lambda: swarm_parameters(width=0), "width"),
        (lambda: swarm_parameters(loratencweights=["0.3", "1"]), "loratencweights"),
        (lambda: invoke_parameters(clip_skip=1), "clip_skip"),
        (lambda: invoke_parameters(cfg_scale=[7, 6]), "cfg_scale"),
        (lambda: invoke_parameters(positive_prompt="a cat++ on grass"), "prompt"),
        (lambda: invoke_parameters(negative_prompt="ugly, bad--"), "negative prompt"),
        (lambda: swarm_parameters(loraweights=["heavy", "1"]), "loras"),
        (lambda: invoke_parameters(loras=[{"model": {"name": 5}, "weight": 1}]), "loras"),
        (lambda: invoke_parameters(loras=[{"model": {"name": "a"}, "weight": 6}]), "loras"),
        (lambda: swarm_parameters(initimagecreativity=0.5), "initimagecreativity"),
        (lambda: invoke_parameters(controlnets=[{"a": 1}]), "controlnets"),
        (lambda: swarm_parameters(prompt="a (red:1.2) ball"), "prompt"),
        (lambda: swarm_parameters(prompt="a ball <lora:other:1>"), "prompt"),
    ],
)
def test_values_that_cannot_be_used_are_listed(found, named):
    assert named in [one.name for one in found().ignored]


def test_values_without_a_meaning_are_not_listed():
    assert [one.name for one in swarm_parameters(vae="None").ignored] == ["model"]
    assert [
        one.name for one in invoke_parameters(positive_prompt="a well-lit, C++17 cat").ignored
    ] == ["model"]


def test_old_images_of_swarmui_have_lists_as_text():
    found = swarm_parameters(loras="people/sks,b", loraweights="0.8,-1")
    assert found.loras == LORAS
    assert swarm_parameters(loras=["a"], loraweights=None).loras == (NamedLora("a", 1.0),)


def test_a_jpeg_of_swarmui_is_read():
    exif = Image.Exif()
    text = json.dumps({"sui_image_params": SWARM})
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"UNICODE\0" + text.encode(
        "utf-16-le"
    )
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG", exif=exif.tobytes())
    assert read(buffer.getvalue()).prompt == "a creature"


GRAPH = json.dumps({"3": {"class_type": "KSampler", "inputs": {"seed": 1}}})


@pytest.mark.parametrize(
    ("texts", "program"),
    [
        ({"prompt": GRAPH, "workflow": "{}"}, "ComfyUI"),
        ({"workflow": GRAPH}, "ComfyUI"),
        ({"Software": "NovelAI", "Comment": "{}", "Description": "a ball"}, "NovelAI"),
        ({"parameters": '{"prompt": "a", "performance": "Speed"}'}, "Fooocus"),
        ({"parameters": '{"prompt": "a"}', "fooocus_scheme": "fooocus"}, "Fooocus"),
        ({"sd-metadata": "{}"}, "InvokeAI"),
        ({"Dream": "a ball -s 50 -S 1"}, "InvokeAI"),
        ({"use_stable_diffusion_model": "sd-v1-4"}, "Easy Diffusion"),
        ({"parameters": '{"prompt": "a"}'}, "unknown JSON"),
        ({"prompt": GRAPH.replace("1}", "NaN}"), "workflow": "{}"}, "ComfyUI"),
        ({"parameters": '{"Prompt": "a", "Performance": "Speed"}'}, "Fooocus"),
        ({"parameters": '{"Prompt": "a", "software": "RuinedFooocus"}'}, "RuinedFooocus"),
        ({"parameters": '{"Comment": "{}", "Software": "NovelAI"}'}, "NovelAI"),
        ({"Title": "AI generated image", "Source": "NovelAI Diffusion V4"}, "NovelAI"),
        ({"parameters": '{"1": {}, "extraMetadata": "{}"}'}, "Civitai"),
        ({"parameters": '{"use_stable_diffusion_model": "a"}'}, "Easy Diffusion"),
        ({"invokeai_graph": "{}"}, "workflow of InvokeAI"),
        ({"invokeai_workflow": "{}"}, "workflow of InvokeAI"),
        ({"NMKDiffusion": "{}"}, "NMKD"),
        ({"XML:com.adobe.xmp": "<exif:UserComment>{}</exif:UserComment>"}, "Draw Things"),
    ],
)
def test_images_of_other_programs_are_refused_by_name(texts, program):
    with pytest.raises(ImageRecordError, match=program):
        read_origin(png(**texts))


def test_a_webp_of_comfyui_is_refused_by_name():
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = f"workflow:{GRAPH}"
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "WEBP", exif=exif.tobytes())
    with pytest.raises(ImageRecordError, match="ComfyUI"):
        read_origin(buffer.getvalue())


def test_a_jpeg_of_fooocus_is_refused_by_name():
    exif = Image.Exif()
    exif[ExifTags.Base.UserComment] = '{"performance": "Speed"}'
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG", exif=exif)
    with pytest.raises(ImageRecordError, match="Fooocus"):
        read_origin(buffer.getvalue())


def test_parameters_that_other_programs_add_are_read():
    text = "a ball\nSteps: 12, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 64x64"
    for more in ({"prompt": GRAPH}, {"fooocus_scheme": "a1111"}):
        found = read(png(parameters=text, **more))
        assert (found.prompt, found.fields["sampler"]) == ("a ball", "euler_a")
