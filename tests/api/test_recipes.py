"""Tests of the HTTP API's bodies: ranges, conversion to recipes, and responses."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tests.support import sampler_options

from fidelora.api import (
    InferenceRequest,
    accepted,
    check_request,
    model_list,
    notes_on,
    recipes_of,
    request_for,
    result_of,
    status_of,
)
from fidelora.errors import RequestError, RequestFieldError
from fidelora.families import all_families, get_family
from fidelora.jobs.job import (
    Failure,
    JobProgress,
    Output,
    Status,
    claimed,
    failed,
    new_job,
    renewed,
    succeeded,
)
from fidelora.recipe import AdapterRef, Recipe

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
A, B = AdapterRef("a" * 64, name="sks"), AdapterRef("b" * 64, name="style")
BASE = {"base_model": "base", "dtype": "bfloat16"}


def request(**changes: Any) -> InferenceRequest:
    body: dict[str, Any] = {
        "model": "sd15",
        "loras": [{"path": "sks.safetensors"}],
        "prompts": [{"prompt": "a ball"}],
    }
    return InferenceRequest.model_validate(body | changes)


def recipes(adapters: tuple[AdapterRef, ...] = (A,), **changes: Any) -> tuple[Recipe, ...]:
    asked = request(**changes)
    check_request(asked)
    return recipes_of(asked, adapters, BASE, draw_seed=lambda: 777)


def test_omitted_fields_have_the_documented_defaults():
    (recipe,) = recipes()
    assert recipe == Recipe(
        prompt="a ball",
        base_model="base",
        width=1024,
        height=1024,
        steps=25,
        guidance_scale=6.0,
        seed=42,
        sampler="ddpm",
        adapters=(A,),
        dtype="bfloat16",
    )


def test_every_field_reaches_its_recipe():
    item = {
        "prompt": "[trigger] on grass",
        "trigger_word": "own",
        "width": 101,
        "height": 640,
        "guidance_scale": 0,
        "sample_steps": 7,
        "neg": "blurry",
        "seed": 5,
        "sampler": "euler_a",
        "network_multiplier": 0,
        "num_frames": 1,
    }
    (recipe,) = recipes(
        prompts=[item], trigger_word="request's", loras=[{"path": "x", "network_multiplier": 2}]
    )
    assert recipe == Recipe(
        prompt="own on grass",
        negative_prompt="blurry",
        base_model="base",
        width=96,
        height=640,
        steps=7,
        guidance_scale=0,
        seed=5,
        sampler="euler_a",
        adapters=(AdapterRef("a" * 64, 0.0),),
        dtype="bfloat16",
    )


SIDES = st.integers(64 // 8, 4096 // 8).map(lambda number: number * 8)
RECIPES = st.lists(
    st.builds(
        Recipe,
        prompt=st.text(max_size=30),
        negative_prompt=st.text(max_size=10),
        base_model=st.just("base"),
        width=SIDES,
        height=SIDES,
        steps=st.integers(1, 50),
        guidance_scale=st.floats(0, 20),
        seed=st.integers(0, 2**63 - 1),
        sampler=st.sampled_from(["ddpm", "euler_a", "lcm", "tcd", "euler"]),
        guidance_rescale=st.just(0.0) | st.floats(0, 1),
        adapters=st.floats(-5, 5).map(lambda multiplier: (AdapterRef("a" * 64, multiplier),)),
        dtype=st.just("bfloat16"),
    ),
    min_size=1,
    max_size=4,
)
SDXL_RECIPES = st.tuples(
    RECIPES, st.none() | st.text(max_size=10), st.none() | st.floats(0.5, 64)
).map(
    lambda drawn: [
        replace(
            recipe,
            model="sdxl",
            negative_prompt_2=drawn[1],
            adapters=(replace(recipe.adapters[0], alpha=drawn[2]),),
        )
        for recipe in drawn[0]
    ]
)


@given(
    RECIPES | SDXL_RECIPES,
    st.sampled_from(["exact", "fast"]),
    st.sampled_from([{}, {"fidelity": "exact"}, {"fidelity": "fast"}]),
    st.data(),
)
def test_request_for_is_the_inverse_of_recipes_of(made, fidelity, server, options):
    made = [
        replace(recipe, fidelity=fidelity, **options.draw(sampler_options(sampler)))
        for recipe in made
        for sampler in (get_family(recipe.model).samplers[recipe.sampler],)
    ]
    body = InferenceRequest.model_validate(
        json.loads(json.dumps(request_for(made, ["sks.safetensors"])))
    )
    check_request(body)
    mode = (
        "merged" if fidelity == "fast" or len({recipe.adapters for recipe in made}) == 1 else "live"
    )
    assert recipes_of(body, (A,), {**BASE, **server}, draw_seed=lambda: 0) == tuple(
        replace(recipe, adapter_mode=mode) for recipe in made
    )


@pytest.mark.parametrize(
    ("item", "says", "field"),
    [
        (
            {"sampler": "lms", "timestep_spacing": "sgm_uniform"},
            "does not support timestep_spacing",
            "timestep_spacing",
        ),
        ({"eta": 0.5}, "The eta of the sampler ddpm cannot be set", "eta"),
    ],
)
def test_options_of_other_samplers_are_refused(item, says, field):
    with pytest.raises(RequestFieldError, match=says) as raised:
        recipes(prompts=[{"prompt": "a", **item}])
    assert raised.value.loc == ("prompts", 0, field)


def test_options_of_the_sampler_are_fields_of_the_recipe():
    item = {"prompt": "a", "sampler": "tcd", "timestep_spacing": "trailing", "eta": 0.75}
    (recipe,) = recipes(prompts=[item])
    assert (recipe.sampler, recipe.timestep_spacing, recipe.eta) == ("tcd", "trailing", 0.75)


def test_neg_2_is_refused_for_models_with_one_text_encoder():
    with pytest.raises(RequestFieldError, match="does not use negative_prompt_2") as raised:
        recipes(prompts=[{"prompt": "a", "neg_2": "ugly"}])
    assert raised.value.loc == ("prompts", 0, "neg_2")
    (recipe,) = recipes(
        model="sdxl", prompts=[{"prompt": "a", "neg_2": "ugly", "guidance_rescale": 0.5}]
    )
    assert (recipe.model, recipe.negative_prompt_2, recipe.guidance_rescale) == (
        "sdxl",
        "ugly",
        0.5,
    )


def test_the_server_sets_an_omitted_fidelity():
    asked = request()
    assert [
        recipe.fidelity
        for recipe in recipes_of(asked, (A,), {**BASE, "fidelity": "fast"}, draw_seed=lambda: 0)
    ] == ["fast"]
    assert [recipe.fidelity for recipe in recipes(fidelity="fast")] == ["fast"]
    assert [recipe.fidelity for recipe in recipes()] == ["exact"]


def test_request_for_refuses_values_out_of_the_range_of_the_api():
    with pytest.raises(RequestFieldError, match=r"prompts.0.guidance_scale 30"):
        request_for([Recipe(prompt="a", guidance_scale=30, adapters=(A,))], ["x"])


def test_seeds_are_the_default_the_given_one_or_random():
    asked = [
        {"prompt": "a"},
        {"prompt": "b"},
        {"prompt": "c", "seed": 0},
        {"prompt": "d", "seed": -1},
    ]
    assert [recipe.seed for recipe in recipes(prompts=asked)] == [42, 43, 0, 777]


@pytest.fixture
def sks(tmp_path) -> AdapterRef:
    """Return a LoRA with the trigger word `sks` in its metadata."""
    header: dict[str, Any] = {"__metadata__": {"ss_trigger_word": "sks"}}
    header |= {
        f"lora_unet_x.lora_{name}.weight": {
            "dtype": "F16", "shape": [1, 1], "data_offsets": [2 * index, 2 * index + 2]
        }
        for index, name in enumerate(("down", "up"))
    }  # fmt: skip
    text = json.dumps(header).encode()
    path = tmp_path / "sks.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    return AdapterRef.from_file(path)


def notes_of(adapters: list[AdapterRef], **body: Any) -> tuple[str, ...]:
    return notes_on(request(**body), adapters, recipes(tuple(adapters), **body))


def test_the_default_size_is_reported_for_a_small_base(sks):
    def notes(size: dict[str, int], **base: str) -> tuple[str, ...]:
        body = request(prompts=[{"prompt": "a ball"} | size])
        return notes_on(body, [sks], recipes_of(body, [sks], base, draw_seed=lambda: 0))

    assert notes({}) == ()  # the documented default, although sd15 was trained at 512
    assert notes({"width": 128}, base_model="fidelora:miniature") == ()
    assert notes({}, base_model="fidelora:miniature") == (
        "The prompt has no size, so the image has the API's default, 1024 x 1024; the base model "
        "was trained at 128 x 128.",
    )


def test_a_negative_prompt_without_effect_is_reported_once(sks):
    prompts = [{"prompt": "a", "neg": "ugly"}, {"prompt": "b", "neg": "dull"}]
    made = recipes((sks,), model="flux", prompts=prompts)
    assert [one.negative_prompt for one in made] == ["", ""]
    note = "The negative prompt has no effect: FLUX.1 does not use one."
    assert notes_of([sks], model="flux", prompts=prompts) == (note,)
    assert notes_of([sks], model="flux", prompts=[{"prompt": "a"}]) == ()
    assert recipes((sks,), model="flux_cfg", prompts=prompts)[0].negative_prompt == "ugly"
    assert notes_of([sks], model="flux_cfg", prompts=prompts) == ()


def test_the_trigger_word_of_the_lora_is_used_and_reported_once(sks):
    prompts = [{"prompt": "a [trigger]"}, {"prompt": "[name]!"}, {"prompt": "a ball"}]
    assert [one.prompt for one in recipes((sks,), prompts=prompts)] == ["a sks", "sks!", "a ball"]
    assert notes_of([sks], prompts=prompts) == (
        "[trigger] is 'sks', the trigger word in the metadata of the LoRA sks.",
    )
    assert notes_of([sks]) == ()


@pytest.mark.parametrize(
    ("of_request", "of_prompt", "expected"),
    [
        ("own", None, "own"),
        (None, "own", "own"),
        ("own", "", "own"),
        ("", "own", "own"),
        ("", None, "[trigger]"),
        (None, "", "[trigger]"),
        ("", "", "[trigger]"),
    ],
)
def test_a_given_trigger_word_precedes_that_of_the_lora(sks, of_request, of_prompt, expected):
    prompts = [{"prompt": "[trigger]", "trigger_word": of_prompt}]
    (recipe,) = recipes((sks,), prompts=prompts, trigger_word=of_request)
    assert recipe.prompt == expected
    assert notes_of([sks], prompts=prompts, trigger_word=of_request) == ()


def test_a_placeholder_without_a_trigger_word_is_reported():
    prompts = [{"prompt": "a [trigger]"}, {"prompt": "a ball"}]
    (note,) = notes_of([A], prompts=prompts)
    assert note.startswith("[trigger] stays in the prompt as it is")
    assert notes_of([A], prompts=prompts[1:]) == ()


@pytest.mark.parametrize(
    ("size", "note"),
    [
        ((100, 64), ("100 x 64 was rounded down to 96 x 64",)),
        ((64, 103), ("64 x 103 was rounded down to 64 x 96",)),
        ((64, 96), ()),
    ],
)
def test_a_rounded_size_is_reported(size, note):
    prompts = [{"prompt": "a ball", "width": size[0], "height": size[1]}] * 2
    notes = notes_of([A], prompts=prompts)
    assert len(notes) == len(note)
    for found, expected in zip(notes, note, strict=True):
        assert expected in found
        assert "multiples of 8" in found


def test_sizes_have_the_divisor_of_the_documented_api():
    """The divisor can be larger than that of the trainer and of recipes."""
    prompts = [{"prompt": "a ball", "width": 720, "height": 1360}]
    (made,) = recipes((A,), model="lumina2", prompts=prompts)
    assert (made.width, made.height) == (704, 1344)
    (note,) = notes_of([A], model="lumina2", prompts=prompts)
    assert "720 x 1360 was rounded down to 704 x 1344" in note
    assert "multiples of 32" in note
    assert Recipe(prompt="a ball", model="lumina2", width=720, height=1360).width == 720


def test_a_request_can_ask_for_the_sizes_and_steps_of_the_trainer():
    prompts = [{"prompt": "a ball", "width": 720, "height": 1360}]
    own = {"steps": 12}
    for model, steps in (("zimage_turbo", 9), ("lumina2", 30)):
        (made,) = recipes((A,), model=model, prompts=prompts, match="trainer")
        assert (made.width, made.height, made.steps) == (720, 1360, steps)
        assert notes_of([A], model=model, prompts=prompts, match="trainer") == ()
        chosen = [prompts[0] | {"sample_steps": own["steps"]}]
        (made,) = recipes((A,), model=model, prompts=chosen, match="trainer")
        assert made.steps == own["steps"]


def test_a_recipe_with_a_size_of_the_trainer_is_requested_with_match():
    recipe = Recipe(prompt="a ball", model="zimage", width=720, height=1024, adapters=(A,))
    body = request_for([recipe], ["a.safetensors"])
    assert body["match"] == "trainer"
    (made,) = recipes_of(InferenceRequest.model_validate(body), [A], {}, lambda: 1)
    assert (made.width, made.height) == (720, 1024)
    plain = request_for([replace(recipe, width=704)], ["a.safetensors"])
    assert "match" not in plain


@pytest.mark.parametrize("prompt", ["a [trigger]", "[name]", "a ball"])
def test_a_placeholder_in_a_recipe_is_plain_text(sks, prompt):
    recipe = Recipe(prompt=prompt, adapters=(sks,), dtype="bfloat16", base_model="base")
    asked = InferenceRequest.model_validate(request_for([recipe], ["x"]))
    assert recipes_of(asked, [sks], BASE, draw_seed=lambda: 777) == (recipe,)


def test_prompts_without_a_trigger_word_use_that_of_the_request():
    asked = [{"prompt": "[trigger]"}, {"prompt": "[trigger]", "trigger_word": "own"}]
    assert [recipe.prompt for recipe in recipes(prompts=asked, trigger_word="sks")] == [
        "sks",
        "own",
    ]
    assert recipes(prompts=asked[:1])[0].prompt == "[trigger]"


def test_several_loras_keep_their_order_and_multipliers():
    loras = [{"path": "x", "network_multiplier": -0.5}, {"path": "y"}]
    (recipe,) = recipes((A, B), loras=loras)
    assert [(ref.name, ref.multiplier) for ref in recipe.adapters] == [
        ("sks", -0.5),
        ("style", 1.0),
    ]
    assert recipe.adapter_mode == "merged"


def test_different_multipliers_run_live_as_in_the_trainer():
    loras = [{"path": "x", "network_multiplier": 0.5}, {"path": "y"}]
    asked = [
        {"prompt": "a"},
        {"prompt": "b", "network_multiplier": 2},
        {"prompt": "c", "network_multiplier": [0.1, 0.2]},
    ]
    made = recipes((A, B), loras=loras, prompts=asked)
    assert [tuple(ref.multiplier for ref in recipe.adapters) for recipe in made] == [
        (0.5, 1.0),
        (2.0, 2.0),
        (0.1, 0.2),
    ]
    assert {recipe.adapter_mode for recipe in made} == {"live"}
    same = recipes(
        (A, B),
        loras=loras,
        prompts=[{"prompt": "a"}, {"prompt": "b", "network_multiplier": [0.5, 1]}],
    )
    assert {recipe.adapter_mode for recipe in same} == {"merged"}


@pytest.mark.parametrize(
    ("changes", "code", "details"),
    [
        ({"model": "gpt"}, "MODEL_NOT_FOUND", {"supported_models": list(all_families())}),
        ({"loras": []}, "LORA_FILE_REQUIRED", {}),
        (
            {"loras": [{"path": "x", "transformer": "low"}]},
            "MOE_FORMAT_NOT_SUPPORTED",
            {"field": "transformer"},
        ),
        (
            {"model": "wan22_14b_t2v", "loras": [{"path": "x_high_noise"}]},
            "MOE_FORMAT_REQUIRED",
            {"field": "transformer"},
        ),
        ({"kv_cache": True}, "FIELD_NOT_SUPPORTED", {"field": "kv_cache"}),
        (
            {"loras": [{"path": "x", "scale": 1}]},
            "FIELD_NOT_SUPPORTED",
            {"field": "loras[0].scale"},
        ),
        (
            {"prompts": [{"prompt": "a"}, {"prompt": "b", "steps": 3}]},
            "FIELD_NOT_SUPPORTED",
            {"field": "prompts[1].steps"},
        ),
        (
            {"prompts": [{"prompt": "a", "ctrl_img": "x"}]},
            "FIELD_NOT_SUPPORTED",
            {"field": "prompts[0].ctrl_img"},
        ),
        (
            {"prompts": [{"prompt": "a", "ctrl_img_3": "x"}]},
            "FIELD_NOT_SUPPORTED",
            {"field": "prompts[0].ctrl_img_3"},
        ),
        (
            {"prompts": [{"prompt": "a", "num_frames": 16}]},
            "FIELD_NOT_SUPPORTED",
            {"field": "prompts[0].num_frames"},
        ),
        (
            {"prompts": [{"prompt": "a", "fps": 16}]},
            "FIELD_NOT_SUPPORTED",
            {"field": "prompts[0].fps"},
        ),
        (
            {"prompts": [{"prompt": "a", "resolution": "High"}]},
            "FIELD_NOT_SUPPORTED",
            {"field": "prompts[0].resolution"},
        ),
        (
            {"prompts": [{"prompt": "a", "network_multiplier": [1, 1]}]},
            "MULTIPLIERS_DO_NOT_MATCH",
            {"field": "prompts[0].network_multiplier"},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unsupported_fields_are_refused_by_name(changes, code, details):
    with pytest.raises(RequestError) as raised:
        check_request(request(**changes))
    assert (raised.value.code, raised.value.details) == (code, details)


def test_an_unknown_sampler_is_refused_with_the_list():
    with pytest.raises(RequestFieldError, match="use one of ddpm, ddim") as caught:
        recipes(prompts=[{"prompt": "b"}, {"prompt": "a", "sampler": "euler_b"}])
    assert caught.value.loc == ("prompts", 1, "sampler")


@pytest.mark.parametrize(
    "item",
    [
        {"width": 63},
        {"width": 4097},
        {"height": 63},
        {"guidance_scale": 20.1},
        {"guidance_scale": -1},
        {"sample_steps": 0},
        {"sample_steps": 151},
        {"seed": -2},
        {"seed": 2**63},
        {"network_multiplier": 5.1},
        {"network_multiplier": [6]},
        {"num_frames": 0},
        {"resolution": "Low"},
        {"prompt": None},
        {"guidance_scale": float("nan")},
    ],
    ids=str,
)
def test_a_value_out_of_range_is_refused(item):
    with pytest.raises(ValidationError):
        request(prompts=[{"prompt": "a"} | item])


@pytest.mark.parametrize(
    "changes",
    [
        {"prompts": []},
        {"prompts": [{}]},
        {"prompts": [{"prompt": "a"}] * 65},
        {"loras": [{}]},
        {"loras": [{"path": ""}]},
        {"loras": [{"path": "x", "network_multiplier": -5.1}]},
        {"model": None},
        {"output_format": "gif"},
        {"loras": [{"path": "x", "transformer": "middle"}]},
    ],
    ids=str,
)
def test_a_malformed_request_is_refused(changes):
    with pytest.raises(ValidationError):
        request(**changes)


def test_the_token_is_not_in_repr_or_json():
    asked = request(hf_token="hf_secret")
    assert "hf_secret" not in repr(asked) + str(asked) + asked.model_dump_json()
    assert asked.hf_token is not None
    assert asked.hf_token.get_secret_value() == "hf_secret"


@given(
    width=st.integers(64, 4096),
    seed=st.integers(-1, 2**63 - 1),
    guidance=st.floats(0, 20),
    steps=st.integers(1, 150),
    multiplier=st.floats(-2, 2),
    prompt=st.text(st.characters(exclude_categories=["Cs"]), max_size=50),
)
@settings(max_examples=60, deadline=None)
def test_every_request_in_range_converts_to_a_recipe(
    width, seed, guidance, steps, multiplier, prompt
):
    item = {
        "prompt": prompt,
        "width": width,
        "seed": seed,
        "guidance_scale": guidance,
        "sample_steps": steps,
    }
    (recipe,) = recipes(prompts=[item | {"network_multiplier": multiplier}])
    assert recipe.width == width - width % 8
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_the_answer_to_a_request_has_its_urls():
    job = new_job(recipes(), NOW)
    body = json.loads(accepted(job, "http://localhost:8000/").model_dump_json())
    assert body == {
        "request_id": job.id,
        "status": "queued",
        "status_url": f"http://localhost:8000/v1/requests/{job.id}/status",
        "result_url": f"http://localhost:8000/v1/requests/{job.id}/result",
        "created_at": "2026-11-22T12:00:00Z",
    }


def test_status_and_result_follow_the_life_cycle_of_a_job():
    job = new_job(recipes(prompts=[{"prompt": "a"}, {"prompt": "b"}]), NOW)
    waiting = json.loads(status_of(job, 3).model_dump_json())
    assert (
        waiting["status"],
        waiting["queue_position"],
        waiting["progress"],
        waiting["error"],
    ) == ("in_queue", 3, None, None)
    assert result_of(job, "http://x").outputs is None

    job = claimed(job, "worker", NOW + timedelta(seconds=1), 30)
    job = renewed(job, 1, JobProgress(image=1, images=2, step=5, steps=25, eta_s=4.0), NOW, 30)
    running = json.loads(status_of(job, None).model_dump_json())
    assert running["status"] == "in_progress"
    assert running["progress"] == {
        "image": 1,
        "images": 2,
        "step": 5,
        "steps": 25,
        "fraction": 0.6,
        "eta_s": 4.0,
    }

    outputs = tuple(
        Output(f"out/{job.id}_output_{i}.png", "png", 1024, 1024, 42 + i, "c" * 64, 9)
        for i in range(2)
    )
    done = succeeded(job, 1, outputs, {"denoise": 2.5}, NOW + timedelta(seconds=4))
    result = json.loads(result_of(done, "http://x").model_dump_json())
    assert (result["status"], result["error"], result["finished_at"]) == (
        "succeeded",
        None,
        "2026-11-22T12:00:04Z",
    )
    assert result["metadata"] == {
        "model": "sd15",
        "inference_time": 3.0,
        "timings": {"denoise": 2.5},
    }
    assert result["outputs"]["videos"] == []
    image = result["outputs"]["images"][1]
    assert image.pop("recipe") == done.recipes[1].to_dict()
    assert image == {
        "format": "png",
        "width": 1024,
        "height": 1024,
        "file_path": f"out/{job.id}_output_1.png",
        "seed": 43,
        "url": f"http://x/v1/requests/{job.id}/images/1",
        "sha256": "c" * 64,
    }

    broken = status_of(failed(job, 1, Failure("LORA_MISMATCH", "It does not fit."), NOW), None)
    assert (broken.status, broken.error, broken.error_code) == (
        Status.FAILED,
        "It does not fit.",
        "LORA_MISMATCH",
    )


@pytest.mark.parametrize(
    ("model", "base_model", "divisor", "steps", "guidance"),
    [
        ("sd15", "stable-diffusion-v1-5/stable-diffusion-v1-5", 8, 25, 6.0),
        ("sdxl", "stabilityai/stable-diffusion-xl-base-1.0", 8, 25, 6.0),
        ("zimage", "Tongyi-MAI/Z-Image", 32, 30, 4.0),
        ("flux", "black-forest-labs/FLUX.1-dev", 16, 25, 4.0),
        ("flex1", "ostris/Flex.1-alpha", 16, 25, 4.0),
        ("chroma", "lodestones/Chroma1-Base", 32, 25, 4.0),
        ("lumina2", "Alpha-VLLM/Lumina-Image-2.0", 32, 25, 4.0),
    ],
)
def test_the_models_are_listed_as_documented(model, base_model, divisor, steps, guidance):
    by_id = {body.id: body.model_dump() for body in model_list([model]).models}
    assert list(by_id) == list(all_families())
    assert by_id[model] == {
        "id": model,
        "base_model": base_model,
        "resolution_divisor": divisor,
        "default_steps": steps,
        "default_guidance_scale": guidance,
        "requires_control_image": False,
        "is_video_model": False,
        "default_num_frames": None,
        "default_fps": None,
        "configured": True,
    }
