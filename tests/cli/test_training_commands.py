"""Output and exit codes of `fidelora verify`, `inspect`, `recipe` and `grid`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tests.support import (
    GOLDEN_JOBS,
    LORA,
    SAME_PROCESSOR,
    SDXL_DORA,
    SDXL_LORA,
    TINY_BASE,
    TINY_CHROMA,
    TINY_SDXL,
    TINY_ZIMAGE,
    ZIMAGE_LORA,
    save_adapter,
)

from fidelora import Engine
from fidelora.api import InferenceRequest, check_request, recipes_of
from fidelora.images.read import read_record
from fidelora.recipe import AdapterRef
from fidelora.training.plan import plan_samples
from fidelora.training.run_folder import read_run

pytestmark = pytest.mark.usefixtures("golden_threads")
RUN = GOLDEN_JOBS / "lora_linear_f32"
BASE = ("--base-model", str(TINY_BASE), "--device", "cpu")

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture
def copy_run(tmp_path):
    """Return a function that copies a run folder and changes its configuration."""

    def make(change: Change = lambda process: None, source: Path = RUN) -> Path:
        folder = Path(shutil.copytree(source, tmp_path / "run"))
        document = yaml.safe_load((folder / "config.yaml").read_text())
        change(document["config"]["process"][0])
        (folder / "config.yaml").write_text(yaml.safe_dump(document))
        return folder

    return make


# --- verify ---------------------------------------------------------------------------------------


@pytest.mark.skipif(
    not SAME_PROCESSOR,
    reason="the goldens were made on AMD's with AVX-512; other processors round differently",
)
def test_verify_reports_identical_samples(fidelora, copy_run, tmp_path):
    folder = copy_run()
    code, out, err = fidelora(
        "verify", str(folder), *BASE, "--report", "report", "--save-images", "replayed"
    )
    assert (code, err) == (0, "")
    assert out.count("100.00    0  0.0000    inf  1.0000  identical") == 3
    assert out.endswith("identical: Every pixel of every sample is the same.\n")
    for path in sorted((folder / "samples").glob("*.png")):
        replayed = tmp_path / "replayed" / f"6_{path.stem[-1]}.png"
        assert np.array_equal(np.asarray(Image.open(replayed)), np.asarray(Image.open(path)))
    assert (tmp_path / "report" / "report.html").read_text().count("<section") == 3


def test_verify_prints_json(fidelora, copy_run):
    folder = copy_run(lambda process: process["sample"].update(network_multiplier=0.5))
    code, out, err = fidelora("verify", str(folder), *BASE, "--json", "--doctor", "--step", "6")
    assert (code, err) == (1, "")
    document = json.loads(out)
    assert list(document) == [
        "job",
        "warnings",
        "model",
        "base_model",
        "base_sha256",
        "versions",
        "settings",
        "evidence",
        "histories",
        "samples",
        "verdict",
        "doctor",
    ]
    assert (document["job"], document["base_model"], document["verdict"]) == (
        "lora_linear_f32",
        TINY_BASE.name,
        "mismatch",
    )
    assert len(document["base_sha256"]) == 64
    first = document["samples"][0]
    assert list(first) == [
        "step",
        "round",
        "index",
        "seed",
        "width",
        "height",
        "identical",
        "max",
        "mean",
        "psnr",
        "ssim",
        "verdict",
    ]
    assert [first[name] for name in ("step", "index", "seed", "width", "height", "verdict")] == [
        6,
        0,
        42,
        64,
        72,
        "mismatch",
    ]
    assert 0 <= first["identical"] < 99
    assert document["doctor"]["cause"] == "multiplier"
    assert document["doctor"]["explains"] == 1.0
    assert "set network_multiplier to 1" in document["doctor"]["fix"]
    assert (document["evidence"], document["histories"]) == ({}, {})
    assert document["versions"]["torch"] == torch.__version__


def test_a_mismatch_suggests_the_doctor(fidelora, copy_run):
    code, out, _ = fidelora(
        "verify", str(copy_run(lambda process: process["sample"].update(guidance_scale=2))), *BASE
    )
    assert code == 1
    assert out.endswith(
        "mismatch: At least one sample is different.\n"
        "Run the command again with --doctor to find the cause.\n"
    )


def test_a_sample_of_another_size_is_a_mismatch(fidelora, copy_run):
    folder = copy_run(lambda process: process["sample"].update(height=96))
    code, out, _ = fidelora("verify", str(folder), *BASE, "--doctor", "--report", "report")
    assert code == 1
    assert "mismatch: the sample is 64x72, but its settings give 64x96" in out
    assert (
        "Doctor: size (explains 100%). The sample is 64x72: "
        "set its width to 64 and its height to 72 (--w 64 --h 72). "
        "In fidelora generate: `--size 64x72`." in out
    )
    code, out, _ = fidelora("verify", str(folder), *BASE, "--json")
    assert json.loads(out)["samples"][0]["verdict"] == "mismatch"
    assert json.loads(out)["doctor"] is None


def test_nothing_to_check_exits_with_3(fidelora, copy_run):
    folder = copy_run()
    assert fidelora("verify", str(folder), *BASE, "--step", "4") == (
        3,
        "",
        "error: Step 4 cannot be checked; steps with samples and weights: 6.\n",
    )
    shutil.rmtree(folder / "samples")
    code, out, err = fidelora("verify", str(folder), *BASE)
    assert (code, out) == (3, "")
    assert "there is nothing to compare with" in err


def damage_config(folder: Path) -> None:
    (folder / "config.yaml").write_text("config: [unclosed")


def damage_sample(folder: Path) -> None:
    next((folder / "samples").glob("*.png")).write_bytes(b"no image")


def damage_weights(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize(
    ("change", "damage", "options", "words"),
    [
        (None, damage_config, BASE, "config.yaml cannot be read"),
        (None, damage_sample, BASE, "cannot be read as an image"),
        (None, damage_weights, BASE, "is truncated"),
        (lambda p: p["sample"].update(sampler="flowmatch"), None, BASE, "flowmatch"),
        (
            lambda p: p["model"].update(arch="hidream"),
            None,
            BASE,
            "trains 'hidream', which is not supported",
        ),
        (
            lambda p: p["model"].update(is_xl=True),
            None,
            BASE,
            "trains 'sd15' and is_xl, which is not supported",
        ),
        (None, None, ("--base-model", "nowhere/at-all.safetensors"), "nowhere/at-all.safetensors"),
        (
            None,
            None,
            (*BASE, "--step", "first"),
            "'first' is not a step; set a number, last or all.",
        ),
        (None, None, (*BASE, "--dtype", "int8"), None),
        (None, None, ("--device", "abacus"), "abacus"),
    ],
)
def test_unusable_runs_exit_with_2_and_one_sentence(
    fidelora, copy_run, change, damage, options, words
):
    folder = copy_run(change or (lambda process: None))
    if damage:
        damage(folder)
    code, out, err = fidelora("verify", str(folder), *options)
    assert code == 2
    if words is not None:
        assert words in err
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert "identical" not in out


def test_other_folders_are_rejected(fidelora, tmp_path):
    assert fidelora("verify", str(tmp_path))[0] == 2
    code, _, err = fidelora("verify", "nowhere")
    assert (code, err) == (
        2,
        "error: The folder nowhere does not exist; set the output folder of a training run.\n",
    )
    (tmp_path / "lora.safetensors").touch()
    code, _, err = fidelora("verify", str(tmp_path / "lora.safetensors"))
    assert (code, err.count("\n")) == (2, 1)
    assert "lora.safetensors is a file; set the output folder of a training run." in err


def test_a_run_of_the_user_interface_is_verified(fidelora, copy_run):
    """The user interface writes JSON; here it is the only configuration."""
    folder = copy_run()
    document = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / ".job_config.json").write_text(json.dumps(document))
    (folder / "config.yaml").unlink()
    code, out, _ = fidelora("verify", str(folder), *BASE, "--json")
    assert code == 0
    assert json.loads(out)["job"] == "lora_linear_f32"


def test_verify_takes_the_other_parts_of_a_checkpoint_from_a_folder(fidelora):
    """A checkpoint of Chroma has only the transformer."""
    file = TINY_CHROMA / "transformer" / "diffusion_pytorch_model.safetensors"
    base = ["--base-model", str(file), "--config", str(TINY_CHROMA)]
    code, out, _ = fidelora("verify", str(GOLDEN_JOBS / "chroma_lora_f32"), *base, "--json")
    assert code == 0
    assert json.loads(out)["verdict"] in ("identical", "rounding")


# --- inspect --------------------------------------------------------------------------------------


def test_inspect_describes_adapters(fidelora, tmp_path):
    code, out, err = fidelora("inspect", str(LORA), *BASE[:2])
    assert (code, err) == (0, "")
    for line in (
        "type        lora, 120 modules (UNet)",
        "rank        8",
        "alpha       4",
        "trigger     sks",
        "fits        tiny-sd15: all 120 modules",
        "No problems were found.",
    ):
        assert line in out
    code, out, _ = fidelora("inspect", str(LORA))
    assert code == 0
    assert "no modules have the shapes of sd15's default base model; 120 of 120" in out
    code, out, _ = fidelora("inspect", str(LORA), *BASE[:2], "--json")
    found = json.loads(out)
    assert (
        found.items()
        >= {
            "type": "lora",
            "modules": 120,
            "ranks": [8],
            "alphas": [4.0],
            "dtype": "F32",
            "step": 6,
            "epoch": 1,
            "trigger": "sks",
            "problems": [],
        }.items()
    )
    assert (found["base_model_version"], found["trainer_version"]) == (
        "sd_1.5",
        "ai-toolkit 0.12.26",
    )
    assert (found["sha256"], found["size_bytes"]) == (
        AdapterRef.from_file(LORA).sha256,
        LORA.stat().st_size,
    )

    broken = save_adapter(
        tmp_path / "x.safetensors",
        {
            "lora_unet_x.lora_down.weight": torch.ones(4, 8),
            "lora_unet_x.lora_up.weight": torch.full((8, 4), float("nan")),
            "lora_unet_x.alpha": torch.tensor(float("inf")),
        },
    )
    code, out, _ = fidelora("inspect", str(broken), "--json")
    assert code == 1
    assert json.loads(out)["alphas"] == ["inf"]
    assert {problem["code"] for problem in json.loads(out)["problems"]} == {
        "not_finite",
        "infinite_alpha",
    }
    assert (
        "problem     1 tensors have NaN or infinite values" in fidelora("inspect", str(broken))[1]
    )
    assert fidelora("inspect", "nothing.safetensors")[0] == 2


def test_inspect_names_the_part_that_the_adapter_changes(fidelora):
    code, out, _ = fidelora("inspect", str(ZIMAGE_LORA), "--base-model", str(TINY_ZIMAGE))
    assert code == 0
    assert "modules (transformer)" in out
    assert "UNet" not in out


# --- recipe ---------------------------------------------------------------------------------------


def test_recipe_names_a_base_that_is_on_another_machine(fidelora, copy_run):
    folder = copy_run(lambda process: process["model"].update(name_or_path="/gone/base"))
    code, _, err = fidelora("recipe", str(folder))
    assert code == 0
    assert "serve --base-model sd15=BASE`, where BASE is your copy of /gone/base, which" in err


def test_recipe_names_the_bundled_base_of_the_demo(fidelora):
    folder = Path(str(files("fidelora"))) / "demo_data" / "zrk_fp32"
    code, _, err = fidelora("recipe", str(folder))
    assert code == 0
    assert "--base-model sd15=fidelora:miniature` and" in err


def test_recipe_prints_the_settings_of_a_quantised_run(fidelora):
    code, out, err = fidelora("recipe", str(GOLDEN_JOBS / "zimage_turbo_quantized_save_f32"))
    assert code == 0
    assert "where ADAPTER is your copy of golden/tiny-zimage-adapter.safetensors, and" in err
    for variable in (
        "FIDELORA_DTYPE=bfloat16",
        "FIDELORA_QUANTIZATION=float8",
        "FIDELORA_TEXT_ENCODER_QUANTIZATION=qfloat8",
        "FIDELORA_TRAINING_ADAPTER=zimage_turbo=ADAPTER",
    ):
        assert variable in err
    assert "its images will differ" not in err
    assert "several multipliers" not in err
    assert json.loads(out)["model"] == "zimage_turbo"


def test_recipe_prints_a_request(fidelora):
    code, out, err = fidelora("recipe", str(RUN), "--index", "1")
    assert code == 0
    assert "serve --base-model sd15=golden/tiny-sd15` and the" in err
    assert "FIDELORA_DTYPE=float32" in err
    body = json.loads(out)
    assert body["loras"] == [{"path": LORA.name, "sha256": AdapterRef.from_file(LORA).sha256}]
    (item,) = body["prompts"]
    assert item == {
        "prompt": "a red ball on grass",
        "neg": "ugly",
        "width": 80,
        "height": 64,
        "guidance_scale": 4.5,
        "sample_steps": 9,
        "sampler": "ddpm",
        "seed": 7,
        "network_multiplier": 1.0,
    }
    check_request(InferenceRequest.model_validate(body))


def test_a_request_for_all_samples_keeps_the_lora_unmerged(fidelora):
    folder = str(GOLDEN_JOBS / "multipliers")
    code, out, err = fidelora("recipe", folder, "--lora", "mine/sks.safetensors")
    assert (code, "warning" in err) == (0, False)
    body = InferenceRequest.model_validate_json(out)
    assert body.loras[0].path == "mine/sks.safetensors"
    made = recipes_of(body, [AdapterRef("a" * 64)], {}, draw_seed=lambda: 0)
    assert {recipe.adapter_mode for recipe in made} == {"live"}
    assert "Leave out --index" in fidelora("recipe", folder, "--index", "0")[2]


def test_the_base_model_is_requested_with_multiplier_0(fidelora):
    code, out, _ = fidelora(
        "recipe", str(GOLDEN_JOBS / "checkpoints_jpg"), "--step", "0", "--index", "0"
    )
    assert code == 0
    assert json.loads(out)["prompts"][0]["network_multiplier"] == 0.0


def test_invalid_requests_exit_with_2(fidelora, copy_run):
    assert fidelora("recipe", str(RUN), "--index", "3")[0] == 2
    assert fidelora("recipe", str(RUN), "--step", "5")[0] == 2
    assert fidelora("recipe", str(RUN), "--step", "none")[0] == 2
    folder = copy_run(lambda process: process["sample"].update(guidance_scale=33))
    code, out, err = fidelora("recipe", str(folder))
    assert (code, out) == (2, "")
    assert "guidance_scale 33" in err
    for path in folder.glob("*.safetensors"):
        path.unlink()
    assert "has no checkpoints" in fidelora("recipe", str(folder))[2]


# --- grid -----------------------------------------------------------------------------------------


def test_grid_writes_a_sheet(fidelora, tmp_path):
    code, out, err = fidelora(
        "grid",
        str(GOLDEN_JOBS / "checkpoints_jpg"),
        "--steps",
        "0,last",
        "--multipliers",
        "0,1",
        "--prompts",
        "1",
        "--prompts",
        "[trigger] cat, asleep --steps 2",
        "--out",
        "sheets/grid.png",
        *BASE,
    )
    assert (code, out, err) == (0, "sheets/grid.png\n", "")
    sheet = np.asarray(Image.open(tmp_path / "sheets" / "grid.png"))
    side, gap, left, head = 80 * 3, 6, 200, 3 * 18 + 2 * 6
    base, zero = (sheet[head : head + 64 * 3, left + n * (side + gap) :][:, :side] for n in (0, 1))
    full = sheet[head : head + 64 * 3, left + 2 * (side + gap) :][:, :side]
    assert np.array_equal(base, zero), "multiplier 0 is the base model"
    assert not np.array_equal(base, full)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--steps", "5"), "no checkpoint of step 5"),
        (("--steps", "some"), "'some', which is not a step"),
        (("--steps", ","), "--steps is empty"),
        (("--multipliers", "one"), "set numbers separated by commas"),
        (("--multipliers", "6"), "multiplier"),
        (("--prompts", "7"), "Sample 7 does not exist"),
        (("--out", "grid.bmp"), "bmp"),
    ],
)
def test_invalid_grids_exit_with_2(fidelora, tmp_path, options, words):
    code, out, err = fidelora("grid", str(RUN), *BASE, *options)
    assert (code, out) == (2, "")
    assert words in err
    assert list(tmp_path.iterdir()) == []


# --- SDXL -----------------------------------------------------------------------------------------

SDXL_BASE = ("--base-model", str(TINY_SDXL), "--device", "cpu")


@pytest.mark.skipif(
    not SAME_PROCESSOR,
    reason="the goldens were made on AMD's with AVX-512; other processors round differently",
)
def test_an_sdxl_run_selects_its_model(fidelora):
    code, out, _ = fidelora("verify", str(SDXL_LORA.parent), *SDXL_BASE)
    assert (code, out.count("identical\n")) == (0, 3)
    code, out, _ = fidelora("verify", str(SDXL_DORA.parent), *SDXL_BASE, "--json")
    assert (code, json.loads(out)["model"], json.loads(out)["verdict"]) == (0, "sdxl", "rounding")


def test_a_wrong_sdxl_setting_is_diagnosed(fidelora, copy_run):
    def change(process: dict[str, Any]) -> None:
        # One sample of few steps: the doctor makes almost a hundred images of it.
        sample = {"prompt": "[trigger] a photo of a ball"}
        process["sample"].update(samples=[sample], sample_steps=2, guidance_rescale=0.7)

    folder = copy_run(change, SDXL_LORA.parent)
    (plan,) = plan_samples(read_run(folder), 6, base_model=str(TINY_SDXL))
    assert plan.trainer_image is not None
    right = Engine(device="cpu").generate(replace(plan.recipe, guidance_rescale=0.0))
    Image.fromarray(right.pixels).save(plan.trainer_image)
    code, out, _ = fidelora("verify", str(folder), *SDXL_BASE, "--doctor", "--json")
    diagnosis = json.loads(out)["doctor"]
    assert (code, diagnosis["cause"], diagnosis["explains"]) == (1, "guidance", 1.0)
    assert "set guidance_rescale to 0" in diagnosis["fix"]


def test_the_request_for_an_sdxl_run_gives_its_recipes(fidelora, copy_run):
    folder = copy_run(lambda process: process["network"].update(linear_alpha=4), SDXL_DORA.parent)
    code, out, err = fidelora("recipe", str(folder))
    body = InferenceRequest.model_validate_json(out)
    check_request(body)
    adapter = AdapterRef.from_file(SDXL_DORA)
    recipes = recipes_of(body, (adapter,), {"base_model": str(TINY_SDXL)}, draw_seed=lambda: 0)
    planned = [plan.recipe for plan in plan_samples(read_run(folder), 6, base_model=str(TINY_SDXL))]
    assert (code, list(recipes)) == (0, planned)
    assert {recipe.adapters[0].alpha for recipe in recipes} == {4.0}
    assert "fidelora serve --base-model sdxl=golden/tiny-sdxl" in err


def test_grid_supports_doras(fidelora, tmp_path):
    code, _, _ = fidelora(
        "grid",
        str(SDXL_DORA.parent),
        *SDXL_BASE,
        "--steps",
        "0,last",
        "--multipliers",
        "0.5",
        "--prompts",
        "0",
        "--out",
        "g.png",
    )
    assert code == 0
    assert Image.open(tmp_path / "g.png").format == "PNG"


def test_inspect_identifies_an_sdxl_dora(fidelora):
    code, out, _ = fidelora("inspect", str(SDXL_DORA), "--json")
    found = json.loads(out)
    assert (code, found["model"], found["type"], found["base_model_version"]) == (
        0,
        "sdxl",
        "dora",
        "sdxl_1.0",
    )


def test_generate_supports_sdxl(fidelora, tmp_path):
    small = ("--width", "64", "--height", "64", "--steps", "2")
    code, _, err = fidelora(
        "generate",
        "a ball",
        "--model",
        "sdxl",
        *SDXL_BASE,
        *small,
        "--lora",
        str(SDXL_DORA),
        "--negative-2",
        "ugly",
        "--guidance-rescale",
        "0.5",
        "--out",
        "x.png",
    )
    assert code == 0, err
    recipe = read_record(tmp_path / "x.png")["recipe"]
    assert (recipe["model"], recipe["negative_prompt_2"], recipe["guidance_rescale"]) == (
        "sdxl",
        "ugly",
        0.5,
    )
    code, _, err = fidelora("generate", "a ball", *SDXL_BASE, *small)
    assert (
        code,
        "is a base model of Stable Diffusion XL, not of Stable Diffusion 1.5; "
        "use it with model sdxl." in err,
    ) == (1, True)
    code, _, err = fidelora(
        "generate", "a ball", "--model", "sdxl", *SDXL_BASE, *small, "--lora", str(LORA)
    )
    assert (code, "Use the adapter with model sd15." in err) == (1, True)
