"""Suspects that depend on how a training run was carried out, without making images."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.support import GOLDEN_JOBS

from fidelora.training.doctor import CAUSES
from fidelora.training.plan import plan_samples
from fidelora.training.run_folder import TrainingRun, read_run
from fidelora.training.run_suspects import run_suspects
from fidelora.training.suspects import Suspect, UniqueSuspects

Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def run_of(tmp_path: Path) -> Callable[..., TrainingRun]:
    """Return a function that copies a golden run and changes its configuration."""

    def make(name: str, change: Change = lambda process: None) -> TrainingRun:
        folder = Path(shutil.copytree(GOLDEN_JOBS / name, tmp_path / name))
        document = yaml.safe_load((folder / "config.yaml").read_text())
        change(document["config"]["process"][0])
        (folder / "config.yaml").write_text(yaml.safe_dump(document))
        return read_run(folder)

    return make


def suspects_of(run: TrainingRun, step: int, index: int = 0, *, first: bool = False) -> Any:
    """Return the suspects of a sample by cause, without those that equal its recipe."""
    block = run.first_round if first else run
    assert block is not None
    plan = plan_samples(block, step)[index]
    found: dict[str, list[Suspect]] = {}
    for suspect in UniqueSuspects(plan.recipe)(run_suspects(run, plan)):
        found.setdefault(suspect.cause, []).append(suspect)
    assert found.keys() <= set(CAUSES)
    return plan.recipe, found


def test_each_round_of_step_0_has_the_other_one_as_suspect(run_of):
    run = run_of("first_sample_block")
    ordinary, found = suspects_of(run, 0)
    first, found_first = suspects_of(run, 0, first=True)
    (suspect,), (suspect_first,) = found["first_sample"], found_first["first_sample"]
    assert (suspect.recipe, suspect_first.recipe) == (first, ordinary)
    assert first != ordinary
    assert "first_sample" not in suspects_of(run, 2)[1]


def test_suspects_keep_a_replaced_base_model_and_precision(run_of):
    run = run_of("first_sample_block")
    plan = plan_samples(run, 0, base_model="elsewhere")[0]
    plan = replace(plan, recipe=replace(plan.recipe, dtype="float16"))
    suspect = next(one for one in run_suspects(run, plan) if one.cause == "first_sample")
    assert (suspect.recipe.base_model, suspect.recipe.dtype) == ("elsewhere", "float16")


@pytest.mark.parametrize(("unloads", "second"), [(False, None), (True, "block")])
def test_prompts_encoded_once_or_again_are_suspected(run_of, unloads, second):
    def change(process: dict[str, Any]) -> None:
        process["train"]["unload_text_encoder"] = unloads
        process["sample"]["samples"] = [{"prompt": "a --n flag", "neg": "block"}]

    recipe, found = suspects_of(run_of("xl_lora_linear_f32", change), 6)
    (suspect,) = found["unload_text_encoder"]
    assert suspect.recipe == replace(recipe, negative_prompt_2=second)
    assert str(not unloads).lower() in suspect.fix


def test_prompts_encoded_once_are_a_suspect_of_first_samples(run_of):
    def change(process: dict[str, Any]) -> None:
        process["first_sample"]["samples"] = [{"prompt": "another prompt"}]

    run = run_of("first_sample_block", change)
    _, found = suspects_of(run, 0, first=True)
    (suspect,) = found["unload_text_encoder"]
    assert suspect.recipe.prompt == plan_samples(run, 0)[0].recipe.prompt


@pytest.mark.parametrize(
    ("model", "multipliers", "cause", "mode"),
    [
        ({}, (1, 1), "quantized", "live"),
        ({"quantize": True}, (1, 1), "quantized", "merged"),
        ({"layer_offloading": True}, (1, 1), "quantized", "merged"),
        ({}, (1, 0.5), "multiplier", "merged"),
    ],
)
def test_the_other_adapter_mode_is_suspected(run_of, model, multipliers, cause, mode):
    def change(process: dict[str, Any]) -> None:
        process["model"].update(model)
        process["sample"]["samples"] = [
            {"prompt": "a", "network_multiplier": value} for value in multipliers
        ]

    recipe, found = suspects_of(run_of("bf16_save_f32", change), 6)
    (suspect,) = found[cause]
    assert suspect.recipe == replace(recipe, adapter_mode=mode)
    assert recipe.adapter_mode != mode


def test_resumes_are_suspected_shortest_history_first(run_of):
    _, found = suspects_of(run_of("checkpoints_jpg"), 8)
    assert [len(one.recipe.history) for one in found["history"]] == [0, 1, 2]
    assert "after step 6" in found["history"][0].fix


def test_embeddings_are_suspected(run_of):
    recipe, found = suspects_of(run_of("embed"), 12, 1)
    without, one_token, other_step = found["embedding"]
    assert without.recipe == replace(recipe, adapters=())
    assert one_token.recipe == replace(recipe, prompt="a zrkk on white")
    assert recipe.prompt == "a zrkk zrkk_1 zrkk_2 zrkk_3 on white"
    (ref,) = other_step.recipe.adapters
    assert (ref.name, ref.word) == ("zrkk_000000006", "zrkk")
    assert "quantized" not in found  # an embedding is neither merged nor live
