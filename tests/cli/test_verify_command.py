"""Output and exit codes of `fidelora verify`."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tests.cli.training_support import BASE, SDXL_BASE
from tests.support import (
    GOLDEN_JOBS,
    SAME_PROCESSOR,
    SDXL_DORA,
    SDXL_LORA,
    TINY_BASE,
    TINY_CHROMA,
    TINY_SDXL,
)

from fidelora import Engine
from fidelora.training.plan import plan_samples
from fidelora.training.run_folder import read_run

pytestmark = pytest.mark.usefixtures("golden_threads")


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
        "error: The folder nowhere does not exist; give the output folder of a training run.\n",
    )
    (tmp_path / "lora.safetensors").touch()
    code, _, err = fidelora("verify", str(tmp_path / "lora.safetensors"))
    assert (code, err.count("\n")) == (2, 1)
    assert "lora.safetensors is a file; give the output folder of a training run." in err


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


@pytest.mark.skipif(
    not SAME_PROCESSOR,
    reason="the goldens were made on AMD's with AVX-512; other processors round differently",
)
def test_an_sdxl_run_selects_its_model(fidelora):
    code, out, _ = fidelora("verify", str(SDXL_LORA.parent), *SDXL_BASE)
    assert (code, out.count("identical\n")) == (0, 3)
    code, out, _ = fidelora("verify", str(SDXL_DORA.parent), *SDXL_BASE, "--json")
    assert (code, json.loads(out)["model"]) == (0, "sdxl")
    expected = ("identical",) if SAME_PROCESSOR else ("identical", "rounding")
    assert json.loads(out)["verdict"] in expected


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


@pytest.mark.parametrize("command", ["verify", "grid"])
def test_a_missing_base_of_the_run_is_only_an_error(fidelora, copy_run, monkeypatch, command):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = copy_run(lambda process: process["model"].update(name_or_path="/gone/base"))
    code, out, err = fidelora(command, str(folder), "--device", "cpu")
    error = err.splitlines()[-1]
    assert (code, "same %" in out) == (2, False)
    assert error.startswith(
        "error: The training run lora_linear_f32 was trained on the base model /gone/base, which "
        "was not found. If it is a path of another machine, add `--base-model PATH` with that "
        "model: a diffusers folder, a .safetensors checkpoint or a hub id."
    )
    folder = folder.rename(folder.with_name("bundled"))
    config = (folder / "config.yaml").read_text().replace("/gone/base", "golden/miniature")
    (folder / "config.yaml").write_text(config)
    code, _, err = fidelora(command, str(folder), "--device", "cpu")
    assert (code, "add `--base-model fidelora:miniature`, the same model" in err) == (2, True)
    # The message about a base model that the user named does not mention the run.
    code, _, err = fidelora(command, str(folder), "--device", "cpu", "--base-model", "/gone/too")
    assert (code, "was trained on" in err) == (2, False)
