"""Run folders as users have them: first samples, random seeds, fine-tunes, several processes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from tests.support import GOLDEN_JOBS, LORA, SAME_PROCESSOR, TINY_BASE, TINY_SDXL, change_weights

from fidelora import Engine
from fidelora.errors import NothingToCheckError, TrainingRunError
from fidelora.training.compare import compare_with_sample
from fidelora.training.evidence import Verdict
from fidelora.training.grid import Column, iterate_cells, make_columns, make_rows
from fidelora.training.notes import checkable_steps, notes_on
from fidelora.training.plan import PlannedSample, plan_samples
from fidelora.training.rounding import perturbed_model
from fidelora.training.run_folder import TrainingRun, read_run
from fidelora.training.selection import incomplete_parts, steps_to_check
from fidelora.training.verify import verify

BASE = str(TINY_BASE)
SMALL = {"width": 64, "height": 64, "sample_steps": 2, "format": "png"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "style"
    path.mkdir()
    return path


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(device="cpu")


def process(**blocks: Any) -> dict[str, Any]:
    """Return a training process with small samples."""
    return {
        "type": "sd_trainer",
        "model": {"name_or_path": "own/base"},
        "train": {"steps": 6},
        "network": {"type": "lora"},
        "sample": SMALL | {"samples": [{"prompt": "a"}, {"prompt": "b"}]},
    } | blocks


def write(folder: Path, *processes: dict[str, Any]) -> TrainingRun:
    document = {"job": "extension", "config": {"name": "style", "process": list(processes)}}
    (folder / "config.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    return read_run(folder)


def run_of(folder: Path, **blocks: Any) -> TrainingRun:
    return write(folder, process(**blocks))


def sampled(**sample: Any) -> dict[str, Any]:
    return {"sample": SMALL | {"samples": [{"prompt": "a"}, {"prompt": "b"}]} | sample}


def add(folder: Path, *names: str, metadata: dict[str, str] | None = None) -> None:
    """Write files without content, or .safetensors files with metadata and without tensors."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        header = json.dumps({"__metadata__": metadata or {"name": name}}).encode()
        is_weights = path.suffix.lower() == ".safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header if is_weights else b"")


def add_image(folder: Path, plan: PlannedSample, engine: Engine, time: int) -> None:
    """Write the trainer's image of a planned sample."""
    path = folder / "samples" / f"{time}__{plan.step:09d}_{plan.index}.png"
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(engine.generate(plan.recipe).pixels).save(path)


# --- the first_sample block -----------------------------------------------------------------------

FIRST = SMALL | {"samples": [{"prompt": "first"}], "seed": 7, "guidance_scale": 3}


def first_images(run: TrainingRun) -> dict[tuple[int, int], str]:
    assert run.first_round is not None
    return {key: path.name for key, path in run.first_round.images.items()}


@pytest.mark.parametrize(
    ("times", "skips", "first", "ordinary"),
    [
        ([(1, 0), (2, 0), (3, 1)], False, [1], [2, 3]),
        ([(1, 0), (2, 1), (3, 0)], False, [1, 2], [3]),  # more first samples than others
        ([(1, 0)], False, [1], []),  # stopped before the others
        ([(1, 0)], True, [1], []),
        ([(1, 0), (2, 0)], True, [2], []),  # started twice
        ([(1, 0), (2, 0), (3, 1), (4, 0), (5, 0), (6, 1)], False, [4], [5, 6]),
        ([(9, 0), (10, 0), (11, 1)], False, [9], [10, 11]),  # ordered by number, not as text
        ([], False, [], []),
    ],
)
def test_images_of_step_0_are_divided_between_two_rounds(folder, times, skips, first, ordinary):
    add(folder, *(f"samples/{time}__000000000_{index}.png" for time, index in times))
    run = run_of(folder, first_sample=FIRST, train={"steps": 6, "skip_first_sample": skips})
    assert [int(name.split("__")[0]) for name in first_images(run).values()] == first
    assert [int(path.name.split("__")[0]) for path in run.images.values()] == ordinary
    assert run.sampled_steps == ((0,) if times else ())


def test_the_first_round_has_its_own_settings(folder):
    add(folder, "style.safetensors", "samples/1__000000000_0.png", "samples/2__000000006_0.png")
    run = run_of(folder, first_sample=FIRST, **sampled(seed=42))
    assert run.first_round is not None
    (plan,) = plan_samples(run.first_round, 0)
    assert (plan.round, plan.recipe.prompt, plan.recipe.seed) == ("first", "first", 7)
    assert plan.recipe.guidance_scale == 3
    assert plan.trainer_image is not None
    ordinary = plan_samples(run, 6)
    assert [plan.round for plan in ordinary] == ["6", "6"]
    assert [plan.recipe.seed for plan in ordinary] == [42, 42]
    assert checkable_steps(run) == [0, 6]


def test_first_samples_are_verified_with_their_block(folder, engine):
    run = run_of(folder, first_sample=FIRST)
    assert run.first_round is not None
    first = plan_samples(run.first_round, 0, base_model=BASE)
    ordinary = plan_samples(run, 0, base_model=BASE)
    for time, plan in enumerate([*first, *ordinary], start=1):
        add_image(folder, plan, engine, time)
    samples = verify(read_run(folder), engine, [0], base_model=BASE)
    assert [sample.plan.round for sample in samples] == ["first", "0", "0"]
    assert [sample.verdict for sample in samples] == [Verdict.IDENTICAL] * 3
    run_of(folder, first_sample=FIRST | {"guidance_scale": 6})
    samples = verify(read_run(folder), engine, [0], base_model=BASE)
    assert [sample.comparison.identical for sample in samples if sample.comparison] == [
        False,
        True,
        True,
    ]


@pytest.mark.timeout(600)
def test_the_golden_first_sample_matches_its_block(engine):
    """The pixels are equal on a processor like the trainer's, and in bfloat16 close on others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the trainer
    try:
        run = read_run(GOLDEN_JOBS / "first_sample_block")
        assert run.first_round is not None
        for one, step in ((run.first_round, 0), (run, 2)):
            (plan,) = plan_samples(one, step, base_model="fidelora:miniature")
            assert plan.trainer_image is not None
            pixels = engine.generate(plan.recipe).pixels
            comparison = compare_with_sample(pixels, plan.trainer_image)
            assert comparison.identical if SAME_PROCESSOR else comparison.mean_difference < 0.5
    finally:
        torch.set_num_threads(threads)


# --- random seeds ---------------------------------------------------------------------------------


def seeds_of(run: TrainingRun) -> list[int | None]:
    return [None if plan.has_random_seed else plan.recipe.seed for plan in plan_samples(run, 0)]


@pytest.mark.parametrize(
    ("sample", "seeds"),
    [
        ({"seed": -1, "walk_seed": True}, [None, 0, 1]),
        ({"seed": -1}, [None, None, None]),
        ({"seed": -3, "walk_seed": True}, [2**32 - 3, 2**32 - 2, None]),
        ({"seed": 2**64 - 1}, [2**32 - 1] * 3),
        ({"samples": [{"prompt": "a"}, {"prompt": "b", "seed": -1}, {"prompt": "c"}]},
         [0, None, None]),
        ({"samples": [{"prompt": "a --seed -1"}, {"prompt": "b"}]}, [2**32 - 1, 0]),
        ({"seed": -1, "samples": [{"prompt": "a --seed 5"}, {"prompt": "b"}]}, [5, None]),
    ],
)  # fmt: skip
def test_a_seed_of_minus_1_is_random(folder, sample, seeds):
    """The trainer adds the index (walk_seed), then draws a seed for -1, then parses flags."""
    items = [{"prompt": prompt} for prompt in "abc"]
    assert seeds_of(run_of(folder, sample=SMALL | {"samples": items} | sample)) == seeds


def test_torch_uses_the_lowest_32_bits_of_a_seed():
    """Seeds out of a recipe's range are replaced by their lowest 32 bits."""
    for seed in (-3, 2**64 - 3):
        numbers = [
            torch.randn(8, generator=torch.Generator("cpu").manual_seed(one))
            for one in (seed, 2**32 - 3)
        ]
        assert torch.equal(*numbers)


def test_only_samples_with_random_seeds_are_left_out(folder, engine):
    run = run_of(folder, **sampled(seed=-1, walk_seed=True))
    for time, plan in enumerate(plan_samples(run, 0, base_model=BASE)):
        add_image(folder, plan, engine, time)
    run = read_run(folder)
    assert notes_on(run) == [
        "Sample 0 of the sample block has a random seed (seed -1), which the trainer does not "
        "save, so it cannot be replayed."
    ]
    (sample,) = verify(run, engine, steps_to_check(run, "last"), base_model=BASE)
    assert (sample.plan.index, sample.verdict) == (1, Verdict.IDENTICAL)


def test_a_run_with_only_random_seeds_has_nothing_to_check(folder):
    add(folder, "samples/1__000000000_0.png")
    run = run_of(folder, **sampled(seed=-1))
    with pytest.raises(NothingToCheckError, match="random seeds"):
        steps_to_check(run, "last")


# --- names of files -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("info", "step"),
    [
        ('{"step": 6, "epoch": 0}', 6),
        ('{"step": 0}', 0),
        ('{"step": "6"}', 12),
        ('{"step": -1}', 12),
        ("[]", 12),
        ("no JSON", 12),
        (None, 12),
    ],
)
def test_the_last_checkpoint_has_the_step_in_its_metadata(folder, info, step):
    add(folder, "style.safetensors", metadata=None if info is None else {"training_info": info})
    assert list(run_of(folder, train={"steps": 12}).checkpoints) == [step]


def test_a_damaged_last_checkpoint_has_the_configured_step(folder):
    (folder / "style.safetensors").write_bytes(b"damaged")
    assert list(run_of(folder, train={"steps": 12}).checkpoints) == [12]


def test_upper_case_suffixes_are_accepted(folder):
    add(folder, "style_000000004.SAFETENSORS", "style.Safetensors", "STYLE_000000002.safetensors")
    add(folder, "samples/1__000000004_0.PNG", "samples/2__000000006_0.Jpg")
    run = run_of(folder)
    assert sorted(run.checkpoints) == [4, 6]
    assert sorted(run.images) == [(4, 0), (6, 0)]


def test_rounds_with_only_samples_or_weights_are_named(folder):
    """The user interface can request samples or a checkpoint at any step."""
    add(folder, "style_000000003.safetensors", "style.safetensors")
    add(folder, "samples/1__000000005_0.png", "samples/2__000000006_0.png")
    run = run_of(folder)
    assert checkable_steps(run) == [6]
    assert incomplete_parts(run) == [
        "Step 5 has samples but no checkpoint.",
        "Step 3 has a checkpoint but no samples.",
    ]


@pytest.mark.parametrize("blocks", [{"embedding": {"trigger": "x"}}, {"adapter": {"train": True}}])
def test_a_lora_beside_other_weights_has_another_name(folder, blocks):
    add(folder, "style_LoRA.safetensors", "style_LoRA_000000003.safetensors", "style.safetensors")
    add(folder, "x.safetensors", "x_000000003.safetensors")
    run = run_of(folder, **blocks)
    assert {step: path.name for step, path in run.checkpoints.items()} == {
        3: "style_LoRA_000000003.safetensors",
        6: "style_LoRA.safetensors",
    }


# --- prompts that are encoded once ----------------------------------------------------------------

SDXL = {"model": {"name_or_path": "base", "arch": "sdxl"}}


@pytest.mark.parametrize(
    ("blocks", "second"),
    [
        ({}, "block"),
        ({"train": {"unload_text_encoder": True}}, None),
        ({"train": {"cache_text_embeddings": True}}, None),
        ({"datasets": [{"cache_text_embeddings": True}]}, None),
        ({"train": {"unload_text_encoder": False}, "datasets": None}, "block"),
    ],
)
def test_prompts_encoded_once_have_one_negative_prompt(folder, blocks, second):
    items = [{"prompt": "a --n flag", "neg": "block"}]
    run = run_of(folder, **SDXL, **sampled(samples=items), **blocks)
    (plan,) = plan_samples(run, 0)
    assert (plan.recipe.negative_prompt, plan.recipe.negative_prompt_2) == ("flag", second)


def test_first_samples_use_the_prompts_that_were_encoded_once(folder):
    items = [{"prompt": "a --n flag --w 128"}]
    first = FIRST | {"samples": [{"prompt": "first --n other --h 128"}]}
    run = run_of(
        folder,
        first_sample=first,
        train={"unload_text_encoder": True},
        **SDXL,
        **sampled(samples=items),
    )
    assert run.first_round is not None
    recipe = plan_samples(run.first_round, 0)[0].recipe
    assert (recipe.prompt, recipe.negative_prompt, recipe.negative_prompt_2) == ("a", "flag", None)
    assert (recipe.width, recipe.height) == (64, 128)


@pytest.mark.parametrize("key", ["layer_offloading", "auto_memory"])
def test_offloaded_layers_keep_the_adapter_live(folder, key):
    model = {"name_or_path": "base"}
    assert run_of(folder, model=model | {key: True}).stays_live
    assert not run_of(folder, model=model | {"layer_offloading": False, key: False}).stays_live


# --- full fine-tunes ------------------------------------------------------------------------------


def fine_tune(folder: Path, name: str, factor: float = 1.0, base: Path = TINY_BASE) -> Path:
    """Write a diffusers folder as the trainer saves it, with changed weights."""
    path = Path(shutil.copytree(base, folder / name))
    change_weights(
        path / "unet" / "diffusion_pytorch_model.safetensors",
        lambda tensors: tensors | {"conv_in.weight": tensors["conv_in.weight"] * factor},
    )
    (path / "aitk_meta.yaml").write_text(
        yaml.safe_dump(
            {
                "training_info": {"step": 5, "epoch": 0},
                "software": {"name": "ai-toolkit", "version": "0.9.0"},
            }
        )
    )
    return path


def test_each_checkpoint_of_a_fine_tune_is_a_base_model(folder, engine):
    fine_tune(folder, "style_000000003", 1.1)
    fine_tune(folder, "style", 1.3)
    run = run_of(folder, network=None)
    assert list(run.checkpoints) == [3, 5]  # the metadata of the last one has step 5
    for time, step in enumerate((0, 3, 5)):
        for plan in plan_samples(run, step, base_model=BASE):
            assert plan.recipe.adapters == ()
            assert plan.recipe.noise == "legacy"  # from the version in aitk_meta.yaml
            add_image(folder, plan, engine, 10 * time + plan.index)
    pictures = {path.read_bytes() for path in (folder / "samples").glob("*_0.png")}
    assert len(pictures) == 3
    run = read_run(folder)
    samples = verify(run, engine, steps_to_check(run, "all"), base_model=BASE)
    assert [sample.plan.step for sample in samples] == [0, 0, 3, 3, 5, 5]
    assert {sample.verdict for sample in samples} == {Verdict.IDENTICAL}


def test_a_fine_tune_saved_in_half_precision_is_judged(folder, engine, tmp_path):
    """The trainer sampled in float32; the tiny base model is stored in float16."""
    saved = fine_tune(folder, "style")
    run = run_of(folder, network=None, **sampled(sample_steps=4))
    exact_folder = tmp_path / "exact"
    exact_folder.mkdir()
    exact = perturbed_model(saved, exact_folder, 99)
    for plan in plan_samples(run, 5):
        exact_plan = replace(plan, recipe=replace(plan.recipe, base_model=str(exact)))
        add_image(folder, exact_plan, engine, plan.index)
    samples = verify(read_run(folder), engine, [5])
    assert {sample.verdict for sample in samples} == {Verdict.ROUNDING}
    assert "he model was saved as F16" in samples[0].reason


def test_a_fine_tune_has_its_own_vae_and_no_history(folder):
    fine_tune(folder, "style_000000003")
    fine_tune(folder, "style")
    run = run_of(
        folder,
        network=None,
        model={"name_or_path": "base", "vae_path": "own/vae"},
        **sampled(sample_every=1, samples=[{"prompt": "a"}, {"prompt": "b --m 2"}]),
    )
    assert [plan.recipe.vae for plan in plan_samples(run, 0)] == ["own/vae"] * 2
    for plan in plan_samples(run, 5):
        assert (plan.recipe.vae, plan.recipe.adapter_mode) == ("", "merged")
        assert plan.recipe.history == ()
    with pytest.raises(TrainingRunError, match="has no adapter"):
        run.adapters(3)


@pytest.mark.parametrize(
    ("blocks", "is_full"),
    [
        ({"network": None}, True),
        ({"network": {}}, False),
        ({"train": {"merge_network_on_save": True}}, True),
        ({"network": None, "embedding": {"trigger": "x"}}, False),
        ({"network": None, "adapter": {"type": "ip", "train": True}}, False),
        ({"network": None, "adapter": {"type": "ip"}}, True),
    ],
)
def test_runs_that_save_base_models_are_recognized(folder, blocks, is_full):
    assert run_of(folder, **blocks).full_models is is_full


def test_a_fine_tune_saved_as_a_file_is_a_base_model(folder):
    add(folder, "style_000000003.safetensors", "style.safetensors")
    run = run_of(folder, network=None)
    assert [plan.recipe.base_model for plan in plan_samples(run, 3)] == [
        str(folder / "style_000000003.safetensors")
    ] * 2


def test_a_saved_model_without_weights_is_named(folder):
    add(folder, "style/model_index.json", "style_000000003/aitk_meta.yaml")
    run = run_of(folder, network=None)
    assert run.checkpoints == {}
    assert [note.split()[0] for note in notes_on(run)] == ["style", "style_000000003"]
    assert notes_on(run_of(folder)) == []


def test_the_grid_of_a_fine_tune_has_a_base_model_per_column(folder):
    path = fine_tune(folder, "style")
    run = run_of(folder, network=None)
    columns = make_columns(run, [0, 5], [1])
    assert columns == [Column(0, None), Column(5, None)]
    rows = make_rows(run, ["0"], base_model=BASE)
    recipes = [recipe for _, _, recipe in iterate_cells(run, rows, columns)]
    assert [recipe.base_model for recipe in recipes] == [BASE, str(path)]
    assert all(recipe.adapters == () for recipe in recipes)
    with pytest.raises(TrainingRunError, match="no multiplier"):
        make_columns(run, [5], [0.5, 1])


def test_recipe_explains_that_a_fine_tune_has_no_lora(folder, fidelora):
    fine_tune(folder, "style")
    run_of(folder, network=None)
    code, _, err = fidelora("recipe", str(folder))
    assert code == 2
    assert "base models, but a request requires a LoRA" in err


# --- settings that are not replayed ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("extras", "is_named"),
    [("Tongyi-MAI/Z-Image-Turbo", False), ("base", False), ("other/parts", True), (None, False)],
)
def test_other_parts_of_the_base_model_are_named(folder, extras, is_named):
    model = {"name_or_path": "base", "arch": "zimage:deturbo", "extras_name_or_path": extras}
    notes = notes_on(run_of(folder, model=model))
    assert [note.split()[0] for note in notes] == ["model.extras_name_or_path"] * is_named


@pytest.mark.parametrize(
    ("blocks", "name"),
    [
        *[
            ({"model": {"name_or_path": "base", key: "x"}}, f"model.{key}")
            for key in (
                "lora_path",
                "assistant_lora_path",
                "inference_lora_path",
                "unconditional_lora_path",
                "compile",
            )
        ],
        ({"model": {"name_or_path": "base", "text_encoder_bits": 8}}, "model.text_encoder_bits"),
        ({"train": {"free_u": True}}, "train.free_u"),
        ({"train": {"xformers": True}}, "train.xformers"),
        ({"train": {"attention_backend": "flash"}}, "train.attention_backend"),
        ({"network": {"pretrained_lora_path": "x"}}, "network.pretrained_lora_path"),
        ({"network": {"type": "lorm"}}, "network.type"),
        ({"adapter": {"type": "ip"}}, "adapter"),
        ({"decorator": {}}, "decorator"),
    ],
)
def test_a_setting_that_is_not_replayed_is_named(folder, blocks, name):
    (note,) = notes_on(run_of(folder, **blocks))
    assert note.startswith(f"{name} is set: ")
    assert incomplete_parts(read_run(folder)) == [note]


def test_settings_without_effect_are_not_named(folder):
    run = run_of(
        folder,
        model={
            "name_or_path": "base",
            "lora_path": None,
            "compile": False,
            "text_encoder_bits": 16,
        },
        train={"free_u": False, "attention_backend": "native", "xformers": None},
        network={"type": "lora", "pretrained_lora_path": None},
        adapter=None,
        embedding=None,
    )
    assert notes_on(run) == []


def test_verify_names_settings_in_both_outputs(folder, fidelora):
    add(folder, "samples/1__000000000_0.png")
    Image.new("RGB", (64, 64)).save(folder / "samples" / "1__000000000_0.png")
    run_of(folder, model={"name_or_path": "base", "lora_path": "x"})
    _, out, err = fidelora("verify", str(folder), "--base-model", BASE, "--json")
    assert "warning: model.lora_path is set" in err
    assert json.loads(out)["warnings"][0].startswith("model.lora_path is set")


# --- configurations -------------------------------------------------------------------------------


def test_the_training_process_is_chosen_among_others(folder):
    generator = {"type": "reference_generator", "model": {"name_or_path": "no"}, "sample": SMALL}
    others: list[Any] = [{"type": "extract", "mode": "fixed"}, generator, "text", None]
    run = write(folder, *others, process(trigger_word="sks"))
    assert (run.trigger_word, run.notes) == ("sks", ())


def test_the_last_of_several_training_processes_is_used_and_named(folder):
    run = write(folder, process(trigger_word="one"), {"type": "mod"}, process(trigger_word="two"))
    assert run.trigger_word == "two"
    (note,) = notes_on(run)
    assert "2 training processes: 1 (type sd_trainer), 3 (type sd_trainer)" in note
    assert "the last one, process 3, are used" in note


def test_a_configuration_without_training_process_names_the_processes(folder):
    with pytest.raises(TrainingRunError, match=r"\(process 1 \(type extract\), process 2\)"):
        write(folder, {"type": "extract"}, {"mode": "x"})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: 1\nb:\n\tc: 2\n", r"found character '\\t' .* \(line 3, column 1\)"),
        ("a: 1\nb: [1, 2\n", r"expected ',' or '\]', .* \(line 3, column 1\)"),
        ("a: 1\n b: 2\n", r"mapping values are not allowed here \(line 2, column 3\)"),
        ("a: 1\nb: *x\n", r"found undefined alias 'x' \(line 2, column 4\)"),
        ("a: 1\nb: \x07\n", r"unacceptable character #x0007.* \(line 2\)"),
        ("a: 1\nb: \xe9\n", r"it is not UTF-8 text \(line 2\)"),
        ("a: !!python/none x\n", r"could not determine a constructor .* \(line 1, column 4\)"),
    ],
)
def test_a_yaml_error_has_its_problem_and_line(folder, text, reason):
    (folder / "config.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(TrainingRunError, match=reason):
        read_run(folder)


@pytest.mark.parametrize("name", ["config.yaml", ".job_config.json"])
def test_a_byte_order_mark_is_ignored(folder, name):
    document = {"config": {"name": "style", "process": [process()]}}
    (folder / name).write_text(json.dumps(document), encoding="utf-8-sig")
    assert read_run(folder).name == "style"


# --- sliders --------------------------------------------------------------------------------------


def test_a_slider_is_planned_with_its_multipliers(folder):
    shutil.copyfile(LORA, folder / "style.safetensors")
    prompts = [f"a --m {multiplier}" for multiplier in (-5, -3, 3, 5)]
    run = run_of(folder, sample=SMALL | {"prompts": prompts})
    plans = plan_samples(run, 6)
    assert [plan.recipe.adapters[0].multiplier for plan in plans] == [-5, -3, 3, 5]
    assert {plan.recipe.adapter_mode for plan in plans} == {"live"}


def test_a_folder_of_sdxl_is_a_checkpoint(folder):
    fine_tune(folder, "style", base=TINY_SDXL)
    run = run_of(folder, network=None, **SDXL)
    assert [plan.recipe.base_model for plan in plan_samples(run, 5)] == [str(folder / "style")] * 2
