"""Run folders, and the recipes of their samples."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from fidelora.errors import RecipeError, TrainingRunError, UnknownSamplerError
from fidelora.training.plan import plan_samples
from fidelora.training.run_folder import read_run
from fidelora.training.sample_block import SampleItem


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "style"
    path.mkdir()
    return path


def document(
    *, name="style", meta: Any = None, model=None, train=None, sample=None, **process
) -> dict[str, Any]:
    """Return a minimal AI Toolkit configuration."""
    blocks = {
        "model": {"name_or_path": "own/base", **(model or {})},
        "train": train or {},
        "sample": sample or {},
        "network": {"type": "lora"},
    }
    config = {
        "job": "extension",
        "config": {"name": name, "process": [{"type": "sd_trainer", **blocks, **process}]},
    }
    return config if meta is None else {**config, "meta": meta}


def run_of(folder, **blocks):
    (folder / "config.yaml").write_text(yaml.safe_dump(document(**blocks)), encoding="utf-8")
    return read_run(folder)


def samples_of(folder, *items, step=0, **sample):
    """Return the planned samples of a run; an item is a prompt, or a mapping of its fields."""
    entries = [{"prompt": item} if isinstance(item, str) else item for item in items]
    return plan_samples(run_of(folder, sample={"samples": entries, **sample}), step)


def seeds(planned):
    return [sample.recipe.seed for sample in planned]


# --- malicious configurations ---------------------------------------------------------------------

_BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (_BOMB, "expanded aliases are too long"),
        (
            "a: &a {x: 1, y: 2}\n" + _BOMB.replace("[", "{<<: [").replace("]", "]}"),
            "cannot be read",
        ),
        ("b: &x [*x]\n", "is recursive"),
        ("b: &x {c: *x}\n", "is recursive"),
        ("a: " + "[" * 5000, "cannot be read"),
        ("a: 1" + ":1" * 60 + "\n", "too long"),
        ("a: !!int ''\n", "cannot be read"),
        ("a: !!bool x\n", "cannot be read"),
        ("a: !!timestamp x\n", "cannot be read"),
        ("a:\n" + "- x\n" * 200_000, "more than 20,000 values"),
        ("#" * 2**20 + "\n", "more than 1,048,576 bytes"),
    ],
)
def test_a_malicious_configuration_is_rejected(folder, text, message):
    (folder / "config.yaml").write_text(text + yaml.safe_dump(document()))
    with pytest.raises(TrainingRunError, match=message):
        read_run(folder)


@pytest.mark.parametrize("key", [1, 2.5, None, True])
@pytest.mark.parametrize("block", ["model", "train", "sample"])
def test_keys_that_are_not_text_are_like_unknown_keys(folder, block, key):
    assert run_of(folder, **{block: {key: "x"}}).name == "style"
    assert run_of(folder, **{str(key): "x"}).name == "style"


def test_the_name_has_a_maximum_length(folder):
    with pytest.raises(TrainingRunError, match="more than 200 characters"):
        run_of(folder, name="x" * 201, model={"name_or_path": "[name]" * 1000})


def test_aliases_of_a_valid_configuration_are_expanded(folder):
    """yaml.safe_dump writes an alias for an object that occurs twice."""
    item = {"prompt": "a ball", "seed": 3}
    run = run_of(folder, sample={"samples": [item, item]})
    assert "&id001" in (folder / "config.yaml").read_text()
    assert [sample.seed for sample in run.samples] == [3, 3]


# --- the configuration ----------------------------------------------------------------------------


def test_missing_settings_have_the_defaults_of_the_trainer(folder):
    run = run_of(folder, sample={"samples": [{"prompt": "a ball"}]})
    assert (run.name, run.base_model, run.trigger_word) == ("style", "own/base", "")
    assert (run.dtype, run.vae_dtype, run.text_encoder_dtype) == ("float32", "float32", "float32")
    assert (run.sampler, run.seed, run.walk_seed, run.image_format) == ("ddpm", 0, False, "jpg")
    assert (run.steps, run.prediction) == (1000, "epsilon")
    assert run.samples == (
        SampleItem(
            prompt="a ball",
            neg="",
            width=512,
            height=512,
            seed=None,
            guidance_scale=7.0,
            sample_steps=20,
            network_multiplier=1.0,
        ),
    )


def test_settings_are_read(folder):
    run = run_of(
        folder,
        trigger_word="sks",
        model={"is_v_pred": True, "vae_dtype": "fp32", "te_dtype": "fp16"},
        train={"dtype": "bf16", "steps": 250},
        sample={"sampler": "euler_a", "seed": 5, "walk_seed": True, "format": "png"},
    )
    assert run.trigger_word == "sks"
    assert run.prediction == "v_prediction"
    assert (run.dtype, run.vae_dtype, run.text_encoder_dtype) == ("bfloat16", "float32", "float16")
    assert run.steps == 250
    assert (run.sampler, run.seed, run.walk_seed, run.image_format) == ("euler_a", 5, True, "png")
    assert run.samples == ()


def test_items_inherit_the_settings_of_the_sample_block(folder):
    block = {
        "width": 640,
        "height": 384,
        "neg": "blurry",
        "guidance_scale": 5,
        "sample_steps": 9,
        "network_multiplier": 0.5,
    }
    own = {
        "prompt": "own",
        "width": 64,
        "height": 72,
        "neg": "",
        "guidance_scale": 3.5,
        "sample_steps": 4,
        "network_multiplier": 1,
        "seed": 3,
    }
    run = run_of(folder, sample={**block, "samples": [{"prompt": "of the block"}, own]})
    assert run.samples == (
        SampleItem("of the block", "blurry", 640, 384, None, 5.0, 9, 0.5),
        SampleItem("own", "", 64, 72, 3, 3.5, 4, 1.0),
    )


def test_the_older_list_of_prompts_is_read(folder):
    run = run_of(
        folder, sample={"prompts": ["a ball", "a cube --w 64"], "width": 256, "neg": "blurry"}
    )
    assert [(item.prompt, item.width, item.neg) for item in run.samples] == [
        ("a ball", 256, "blurry"),
        ("a cube --w 64", 256, "blurry"),
    ]


def test_samples_take_precedence_over_prompts(folder):
    run = run_of(folder, sample={"prompts": ["old"], "samples": [{"prompt": "new"}]})
    assert [item.prompt for item in run.samples] == ["new"]


def test_the_configuration_of_the_user_interface_is_read(folder):
    config = document(sample={"samples": [{"prompt": "süß 🙂"}]})
    (folder / ".job_config.json").write_text(
        json.dumps(config, ensure_ascii=False, indent=2), encoding="utf-8"
    )
    assert read_run(folder).samples[0].prompt == "süß 🙂"


def test_config_yaml_takes_precedence_over_the_user_interface(folder):
    (folder / ".job_config.json").write_text(
        json.dumps(document(model={"name_or_path": "planned"}))
    )
    assert run_of(folder, model={"name_or_path": "run"}).base_model == "run"


@pytest.mark.parametrize(
    ("name", "meta", "expected"),
    [
        ("style", None, "style"),
        ("style", {"name": "other"}, "style"),
        ("style", {"name": "[name]"}, "style"),
        (2024, None, "2024"),
    ],
)
def test_the_metadata_does_not_change_the_name(folder, name, meta, expected):
    assert run_of(folder, name=name, meta=meta).name == expected


def test_the_name_replaces_its_placeholder_everywhere(folder):
    """Configurations of the user interface still contain the placeholder."""
    sample = {"samples": [{"prompt": "a [name] [trigger]", "neg": "[name]"}]}
    run = run_of(
        folder,
        name="style",
        trigger_word="sks [name]",
        sample=sample,
        model={"name_or_path": "bases/[name]"},
    )
    (planned,) = plan_samples(run, 0)
    assert (planned.recipe.prompt, planned.recipe.negative_prompt) == ("a style sks style", "style")
    assert run.base_model == "bases/style"


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *[(name, "float32") for name in ("float32", "float", "fp32", "single")],
        *[(name, "bfloat16") for name in ("bfloat16", "bf16")],
        *[(name, "float16") for name in ("float16", "fp16", "half")],
    ],
)
def test_all_dtype_names_of_the_trainer_are_supported(folder, name, dtype):
    run = run_of(folder, train={"dtype": name})
    assert (run.dtype, run.vae_dtype, run.text_encoder_dtype) == (dtype, dtype, dtype)


@pytest.mark.parametrize(
    ("blocks", "where"),
    [
        ({"train": {"dtype": "fp8"}}, "train.dtype 'fp8'"),
        ({"model": {"vae_dtype": "int8"}}, "model.vae_dtype 'int8'"),
        ({"model": {"te_dtype": 16}}, "model.te_dtype 16"),
    ],
)
def test_an_unknown_dtype_is_rejected(folder, blocks, where):
    with pytest.raises(TrainingRunError, match="not supported; use float32") as raised:
        run_of(folder, **blocks)
    assert f"The configuration has {where}" in str(raised.value)


# --- invalid folders ------------------------------------------------------------------------------


def test_a_missing_folder_is_rejected(tmp_path):
    with pytest.raises(TrainingRunError, match=r"The folder .*nowhere does not exist"):
        read_run(tmp_path / "nowhere")


def test_a_file_is_rejected(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(TrainingRunError, match=r"config\.yaml is a file; give the output folder"):
        read_run(tmp_path / "config.yaml")


def test_a_folder_without_configuration_is_rejected(folder):
    with pytest.raises(TrainingRunError, match=r"has no config\.yaml; give the output folder"):
        read_run(folder)


@pytest.mark.parametrize(
    "content", [b"config: [", b"a: b: c", b"\tx: 1", b"name: \xff\xfe", b"x: \x07"]
)
def test_invalid_yaml_is_rejected(folder, content):
    (folder / "config.yaml").write_bytes(content)
    with pytest.raises(TrainingRunError, match=r"config\.yaml cannot be read: \S"):
        read_run(folder)


def test_yaml_tags_that_run_code_are_rejected(folder):
    (folder / "config.yaml").write_text("config: !!python/object/apply:os.getcwd []")
    with pytest.raises(TrainingRunError, match="cannot be read: could not determine a constructor"):
        read_run(folder)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "just text",
        "- a\n- list",
        "config:",
        "config: {name: x}",
        "config: {process: [{}]}",
        "config: {name: x, process: []}",
        "config: {name: x, process: {type: a}}",
    ],
)
def test_yaml_without_a_configuration_is_rejected(folder, content):
    (folder / "config.yaml").write_text(content)
    with pytest.raises(
        TrainingRunError,
        match=r"is not an AI Toolkit configuration: config\.name or config\.process is missing",
    ):
        read_run(folder)


def test_a_process_without_settings_is_rejected(folder):
    (folder / "config.yaml").write_text("config: {name: x, process: [sd_trainer]}")
    with pytest.raises(TrainingRunError, match=r"config\.process is invalid"):
        read_run(folder)


@pytest.mark.parametrize("key", ["train", "model", "sample"])
def test_a_block_that_is_not_a_mapping_is_rejected(folder, key):
    (folder / "config.yaml").write_text(
        f"config: {{name: x, process: [{{model: {{name_or_path: b}}, {key}: [1]}}]}}"
    )
    with pytest.raises(
        TrainingRunError, match=f"The {key} block of the configuration must be a mapping"
    ):
        read_run(folder)


@pytest.mark.parametrize("base", [None, 5, ["a"]])
def test_a_configuration_without_base_model_is_rejected(folder, base):
    with pytest.raises(TrainingRunError, match=r"has no base model; set model\.name_or_path"):
        run_of(folder, model={"name_or_path": base})


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ({"prompt": "x", "width": "wide"}, "width 'wide'"),
        ({"prompt": "x", "width": float("inf")}, "width inf"),
        ({"prompt": "x", "height": None}, "height None"),
        ({"prompt": "x", "seed": "lucky"}, "seed 'lucky'"),
        ({"prompt": "x", "guidance_scale": [7]}, "guidance_scale [7]"),
    ],
)
def test_an_invalid_field_of_a_sample_item_is_named(folder, item, reason):
    with pytest.raises(
        TrainingRunError, match=r"sample\.samples\[1\]\..* not a usable number"
    ) as raised:
        run_of(folder, sample={"samples": [{"prompt": "sound"}, item]})
    assert reason in str(raised.value)


# --- checkpoints and samples ----------------------------------------------------------------------


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        # A valid file without tensors; the name gives each file different bytes.
        header = json.dumps({"__metadata__": {"name": name.encode().hex()}}).encode()
        (folder / name).write_bytes(len(header).to_bytes(8, "little") + header)


def test_checkpoints_are_found_by_step(folder):
    touch(folder, "style_000000100.safetensors", "style_000000200.safetensors", "style.safetensors")
    assert run_of(folder, train={"steps": 250}).checkpoints == {
        100: folder / "style_000000100.safetensors",
        200: folder / "style_000000200.safetensors",
        250: folder / "style.safetensors",
    }


def test_the_last_checkpoint_replaces_one_of_the_same_step(folder):
    touch(folder, "style_000000250.safetensors", "style.safetensors")
    assert run_of(folder, train={"steps": 250}).checkpoints == {250: folder / "style.safetensors"}


@pytest.mark.parametrize(
    "name",
    [
        "other.safetensors",
        "style_00000100.safetensors",
        "style_0000000100.safetensors",
        "style_000000100_unet.safetensors",
        "my_style_000000100.safetensors",
        "style_000000100.pt",
        "sub/style_000000100.safetensors",
    ],
)
def test_other_files_are_not_checkpoints(folder, name):
    touch(folder, name)
    assert run_of(folder).checkpoints == {}


def test_special_characters_in_the_name_match_literally(folder):
    touch(folder, "a+b (v1.0)_000000100.safetensors", "aab (v1x0)_000000200.safetensors")
    assert list(run_of(folder, name="a+b (v1.0)").checkpoints) == [100]


def test_a_run_can_lack_checkpoints_and_images(folder):
    run = run_of(folder)
    assert (run.checkpoints, run.images, run.sampled_steps) == ({}, {}, ())


def test_images_are_found_by_step_and_index(folder):
    names = [
        "1795380522243__000000006_0.png",
        "1795380522244__000000006_11.jpg",
        "1795380522245__000000000_0.webp",
        "1__000000100_1.jpeg",
    ]
    touch(folder, *(f"samples/{name}" for name in names))
    run = run_of(folder)
    assert {key: path.name for key, path in run.images.items()} == dict(
        zip([(6, 0), (6, 11), (0, 0), (100, 1)], names, strict=True)
    )
    assert run.sampled_steps == (0, 6, 100)


@pytest.mark.parametrize(
    "name",
    [
        "__000000006_0.png",
        "1795380522243_000000006_0.png",
        "1795380522243__00000006_0.png",
        "1795380522243__0000000006_0.png",
        "1795380522243__000000006_.png",
        "1795380522243__000000006_0.gif",
        "1795380522243__000000006_0.png.txt",
        "1795380522243__000000006_0_copy.png",
        "thumbnail.png",
    ],
)
def test_other_files_are_not_samples(folder, name):
    touch(folder, f"samples/{name}")
    assert run_of(folder).images == {}


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_the_last_image_of_a_sample_is_used(folder, suffix):
    last = f"1795380522300__000000006_0.{suffix}"
    touch(
        folder,
        "samples/1795380522250__000000006_0.jpg",
        f"samples/{last}",
        "samples/1795380522200__000000006_0.png",
    )
    assert run_of(folder).images[6, 0].name == last


# --- planning: seeds, sizes, flags ----------------------------------------------------------------


def test_without_walk_seed_all_samples_have_the_same_seed(folder):
    assert seeds(samples_of(folder, "a", "b", "c", seed=42)) == [42, 42, 42]


def test_walk_seed_increments_the_seed(folder):
    assert seeds(samples_of(folder, "a", "b", "c", seed=42, walk_seed=True)) == [42, 43, 44]


def test_without_walk_seed_an_items_seed_applies_to_later_items(folder):
    items = ["a", {"prompt": "b", "seed": 7}, "c", {"prompt": "d", "seed": 0}, "e"]
    assert seeds(samples_of(folder, *items, seed=42)) == [42, 7, 7, 0, 0]


def test_with_walk_seed_an_items_seed_applies_only_to_it(folder):
    items = ["a", {"prompt": "b", "seed": 7}, "c"]
    assert seeds(samples_of(folder, *items, seed=42, walk_seed=True)) == [42, 7, 44]


@pytest.mark.parametrize(("walk", "expected"), [(False, [42, 9, 42]), (True, [42, 9, 44])])
def test_a_seed_in_the_prompt_applies_only_to_its_item(folder, walk, expected):
    assert seeds(samples_of(folder, "a", "b --seed 9", "c", seed=42, walk_seed=walk)) == expected


def test_a_seed_in_the_prompt_overrides_the_items_seed(folder):
    planned = samples_of(folder, {"prompt": "a --d 9", "seed": 7}, "b", seed=42)
    assert seeds(planned) == [9, 7]


@pytest.mark.parametrize(
    ("requested", "planned_size"),
    [(512, 512), (519, 512), (4103, 4096), (64, 64), (63, 64), (8, 64), (0, 64), (-5, 64)],
)
def test_sizes_are_multiples_of_8_and_at_least_64(folder, requested, planned_size):
    (by_field,) = samples_of(folder, "a", width=requested, height=512)
    (by_flag,) = samples_of(folder, f"a --h {requested}")
    assert (by_field.recipe.width, by_field.recipe.height) == (planned_size, 512)
    assert (by_flag.recipe.width, by_flag.recipe.height) == (512, planned_size)


def test_flags_override_fields_and_are_removed_from_the_prompt(folder):
    item = {
        "prompt": "a ball --w 64 --h 72 --n ugly --cfg 3 --s 4",
        "neg": "blurry",
        "guidance_scale": 9,
        "sample_steps": 30,
    }
    (planned,) = samples_of(folder, item, width=640)
    recipe = planned.recipe
    assert (recipe.prompt, recipe.negative_prompt) == ("a ball", "ugly")
    assert (recipe.width, recipe.height, recipe.guidance_scale, recipe.steps) == (64, 72, 3.0, 4)


def test_an_invalid_flag_is_rejected(folder):
    with pytest.raises(TrainingRunError, match="value 'wide', which is not a number"):
        samples_of(folder, "a --w wide")


def test_the_trigger_word_is_inserted_before_flags_are_parsed(folder):
    run = run_of(
        folder,
        trigger_word="sks --w 64",
        sample={"samples": [{"prompt": "[trigger]"}, {"prompt": "a [trigger] --h 72"}]},
    )
    first, second = (planned.recipe for planned in plan_samples(run, 0))
    assert (first.prompt, first.width) == ("sks", 64)
    assert (second.prompt, second.width, second.height) == ("a sks", 64, 72)


def test_without_a_trigger_word_the_placeholder_stays(folder):
    assert samples_of(folder, "a [trigger] ball")[0].recipe.prompt == "a [trigger] ball"


def test_the_recipe_has_the_settings_of_the_run(folder):
    run = run_of(
        folder,
        model={"is_v_pred": True, "vae_dtype": "fp32", "te_dtype": "fp16"},
        train={"dtype": "bf16"},
        sample={
            "samples": [{"prompt": "a"}],
            "sampler": "euler_a",
            "neg": "blurry",
            "guidance_scale": 5,
            "sample_steps": 9,
        },
    )
    recipe = plan_samples(run, 0)[0].recipe
    assert (recipe.base_model, recipe.sampler, recipe.prediction) == (
        "own/base",
        "euler_a",
        "v_prediction",
    )
    assert (recipe.dtype, recipe.vae_dtype, recipe.text_encoder_dtype) == (
        "bfloat16",
        "float32",
        "float16",
    )
    assert (recipe.negative_prompt, recipe.guidance_scale, recipe.steps) == ("blurry", 5.0, 9)


def test_the_trainers_defaults_override_those_of_the_model(folder):
    recipe = samples_of(folder, "a")[0].recipe
    assert (recipe.guidance_scale, recipe.steps, recipe.seed, recipe.negative_prompt) == (
        7.0,
        20,
        0,
        "",
    )


def test_the_base_model_can_be_replaced(folder):
    run = run_of(folder, sample={"samples": [{"prompt": "a"}]})
    assert plan_samples(run, 0, base_model="/here/base")[0].recipe.base_model == "/here/base"


def test_an_unknown_sampler_is_rejected(folder):
    with pytest.raises(UnknownSamplerError, match="sampler 'flowmatch' is not supported"):
        samples_of(folder, "a", sampler="flowmatch")


def test_a_multiplier_out_of_range_is_rejected(folder):
    touch(folder, "style.safetensors")
    with pytest.raises(RecipeError, match=r"multiplier is 5\.1"):
        samples_of(folder, "a --m 5.1", step=1000)


# --- planning: adapters ---------------------------------------------------------------------------


def modes(planned):
    return [sample.recipe.adapter_mode for sample in planned]


def test_a_single_multiplier_is_merged(folder):
    touch(folder, "style.safetensors")
    planned = samples_of(
        folder,
        "a",
        "b --m 0.5",
        {"prompt": "c", "network_multiplier": 0.5},
        step=1000,
        network_multiplier=0.5,
    )
    assert modes(planned) == ["merged"] * 3
    assert [sample.recipe.adapters[0].multiplier for sample in planned] == [0.5, 0.5, 0.5]


def test_several_multipliers_stay_unmerged(folder):
    touch(folder, "style.safetensors")
    planned = samples_of(folder, "a", {"prompt": "b", "network_multiplier": 0.0}, step=1000)
    assert modes(planned) == ["live", "live"]
    assert [sample.recipe.adapters[0].multiplier for sample in planned] == [1.0, 0.0]


def test_a_multiplier_in_one_prompt_leaves_all_unmerged(folder):
    touch(folder, "style.safetensors")
    planned = samples_of(folder, "a", "b --m -0.75", step=1000)
    assert modes(planned) == ["live", "live"]
    assert [sample.recipe.adapters[0].multiplier for sample in planned] == [1.0, -0.75]


def test_flags_that_set_equal_multipliers_are_merged(folder):
    planned = samples_of(folder, {"prompt": "a --m 0.5", "network_multiplier": 2}, "b --m 0.5")
    assert modes(planned) == ["merged", "merged"]


def test_each_step_has_its_own_checkpoint_and_samples(folder):
    touch(folder, "style_000000100.safetensors", "style.safetensors")
    touch(
        folder,
        "samples/1__000000100_0.jpg",
        "samples/2__000000100_1.jpg",
        "samples/3__000001000_1.jpg",
    )
    run = run_of(folder, sample={"samples": [{"prompt": "a"}, {"prompt": "b"}]})
    for step, file_name, images in (
        (100, "style_000000100.safetensors", ["1__000000100_0.jpg", "2__000000100_1.jpg"]),
        (1000, "style.safetensors", [None, "3__000001000_1.jpg"]),
    ):
        planned = plan_samples(run, step)
        assert [(sample.step, sample.index) for sample in planned] == [(step, 0), (step, 1)]
        assert [sample.trainer_image and sample.trainer_image.name for sample in planned] == images
        for sample in planned:
            (ref,) = sample.recipe.adapters
            assert ref.path == (folder / file_name).resolve()
            assert ref.sha256 == hashlib.sha256((folder / file_name).read_bytes()).hexdigest()
            assert ref.name == Path(file_name).stem


def test_step_0_is_the_base_model_without_adapter(folder):
    touch(folder, "style.safetensors", "samples/1__000000000_0.jpg")
    (planned,) = samples_of(folder, "a", step=0)
    assert planned.recipe.adapters == ()
    assert planned.trainer_image == folder / "samples" / "1__000000000_0.jpg"


def test_a_step_without_checkpoint_is_rejected_with_a_list(folder):
    touch(folder, "style_000000200.safetensors", "style_000000100.safetensors")
    with pytest.raises(
        TrainingRunError,
        match="The training run style has no checkpoint of step 150; available steps: 100, 200",
    ):
        plan_samples(run_of(folder), 150)


def test_a_run_without_checkpoints_cannot_be_planned(folder):
    with pytest.raises(TrainingRunError, match="no checkpoint of step 100; available steps: none"):
        plan_samples(run_of(folder), 100)


@pytest.mark.parametrize(
    "sample",
    [
        {"samples": ["text"]},
        {"samples": {"a": 1}},
        {"samples": 5},
        {"prompts": 5},
        {"prompts": "a red ball"},
        {"samples": [{"prompt": None}]},
    ],
)
def test_samples_that_are_not_a_list_of_prompts_are_rejected(folder, sample):
    with pytest.raises(TrainingRunError, match="not a list of items with a prompt each"):
        run_of(folder, sample=sample)


@pytest.mark.parametrize(
    ("blocks", "where"),
    [
        ({"train": {"steps": None}}, "train.steps"),
        ({"train": {"steps": "abc"}}, "train.steps"),
        ({"sample": {"seed": None}}, "sample.seed"),
    ],
)
def test_a_setting_that_is_not_a_number_is_named(folder, blocks, where):
    with pytest.raises(TrainingRunError, match=re.escape(f"The configuration has {where} ")):
        run_of(folder, **blocks)


@pytest.mark.parametrize("content", ["[" * 5000, "a: 2024-13-45"])
def test_yaml_that_breaks_the_parser_is_rejected(folder, content):
    (folder / "config.yaml").write_text(content)
    with pytest.raises(TrainingRunError, match="cannot be read"):
        read_run(folder)


def test_configurations_of_the_user_interface_are_read_as_json(folder):
    """YAML reads escaped emoji and tabs differently than JSON."""
    text = json.dumps(
        document(sample={"samples": [{"prompt": "a \U0001f600"}]}), ensure_ascii=True, indent="\t"
    )
    assert "\\ud83d" in text
    (folder / ".job_config.json").write_text(text)
    assert read_run(folder).samples[0].prompt == "a \U0001f600"


@pytest.mark.parametrize(
    "model",
    [
        {"is_v3": True},
        {"arch": "hidream"},
        {"is_v2": True},
        {"arch": "sdxl", "is_flux": True},
        {"arch": "sd1", "is_xl": True},
    ],
    ids=lambda value: str(value),
)
def test_an_unsupported_family_is_rejected(folder, model):
    with pytest.raises(
        TrainingRunError,
        match="the supported models are: Stable Diffusion 1.5, Stable Diffusion XL".replace(
            ".", r"\."
        ),
    ):
        run_of(folder, model={"name_or_path": "base"} | model)


@pytest.mark.parametrize(
    "model", [{"arch": "sd15"}, {"arch": "sd1"}, {}, {"is_xl": False}, {"is_v_pred": True}]
)
def test_sd15_runs_are_recognized(folder, model):
    run = run_of(folder, model={"name_or_path": "base"} | model)
    assert (run.base_model, run.model) == ("base", "sd15")


@pytest.mark.parametrize(
    "model", [{"arch": "sdxl"}, {"is_xl": True}, {"arch": "sdxl", "is_xl": True, "is_v_pred": True}]
)
def test_sdxl_runs_are_recognized(folder, model):
    assert run_of(folder, model={"name_or_path": "base"} | model).model == "sdxl"


def test_a_refiner_is_rejected(folder):
    with pytest.raises(TrainingRunError, match="with a refiner"):
        run_of(folder, model={"arch": "sdxl", "refiner_name_or_path": "r"})


@pytest.mark.parametrize("key", ["use_text_encoder_1", "use_text_encoder_2"])
def test_settings_that_do_not_change_sdxl_samples_are_accepted(folder, key):
    """The trainer encodes prompts with both text encoders, whatever these settings are."""
    assert run_of(folder, model={"arch": "sdxl", key: False}).notes == ()


def test_the_guidance_rescale_of_items_is_ignored(folder):
    samples = [{"prompt": "a ball", "guidance_rescale": 0.3}, {"prompt": "a ball --gr 0.7"}]
    run = run_of(
        folder,
        model={"name_or_path": "base", "arch": "sdxl"},
        sample={"samples": samples, "guidance_rescale": 0.5},
    )
    assert [plan.recipe.guidance_rescale for plan in plan_samples(run, 0)] == [0.5, 0.7]


def test_the_vae_of_the_run_is_used(folder):
    (sample,) = samples_of(folder, "a ball")
    assert sample.recipe.vae == ""
    run = run_of(
        folder,
        model={"name_or_path": "base", "vae_path": "own/vae"},
        sample={"samples": [{"prompt": "a ball"}]},
    )
    assert [plan.recipe.vae for plan in plan_samples(run, 0)] == ["own/vae"]


@pytest.mark.parametrize(
    ("network", "alpha"),
    [
        ({"type": "dora", "linear": 8, "linear_alpha": 4}, 4.0),
        ({"type": "dora", "linear": 8}, 1.0),
        ({"type": "dora", "linear": 8, "linear_alpha": None}, None),
        ({"type": "lora", "linear": 8, "linear_alpha": 4}, None),
        ({}, None),
    ],
)
def test_the_alpha_of_a_dora_is_read_from_the_configuration(folder, network, alpha):
    assert run_of(folder, network=network).dora_alpha == alpha


def test_prompts_are_used_if_samples_are_empty(folder):
    assert [
        item.prompt
        for item in run_of(folder, sample={"samples": None, "prompts": ["a", "b"]}).samples
    ] == ["a", "b"]


@pytest.mark.parametrize(
    ("version", "noise"),
    [("0.9.5", "legacy"), ("0.11.1", "legacy"), ("0.11.2", "modern"), ("0.12.26", "modern")],
)
@pytest.mark.parametrize("step", [0, 100])
def test_the_noise_depends_on_the_version_of_the_trainer(folder, version, noise, step):
    metadata = {"software": json.dumps({"name": "ai-toolkit", "version": version})}
    header = json.dumps({"__metadata__": metadata}).encode()
    (folder / "style_000000100.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    run = run_of(folder, sample={"samples": [{"prompt": "a"}]})
    assert plan_samples(run, step)[0].recipe.noise == noise
