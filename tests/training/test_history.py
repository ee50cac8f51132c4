"""Earlier rounds of samples change the base model, as in the trainer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from PIL import Image
from tests.support import GOLDEN_JOBS, LORA, LORA_CONV, TINY_BASE, load_model_of, save_adapter

from fidelora import AdapterRef, Engine, Recipe
from fidelora.adapters.read import read_adapter
from fidelora.errors import RecipeError
from fidelora.training.evidence import Verdict
from fidelora.training.history import full_history, resumed_histories
from fidelora.training.plan import plan_samples
from fidelora.training.run_folder import TrainingRun, read_run
from fidelora.training.verify import verify

SMALL: dict[str, Any] = {"base_model": str(TINY_BASE), "width": 64, "height": 64, "steps": 2}
NAME = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def trainers_weight(
    weight: torch.Tensor, rounds: list[tuple[Path, float]], last: tuple[Path, float], module: str
) -> torch.Tensor:
    """Merge and subtract as the trainer does, with a rounding after each."""

    def delta(path: Path) -> torch.Tensor:
        tensors = safetensors.torch.load_file(path)
        down, up = (tensors[f"{module}.lora_{side}.weight"].float() for side in ("down", "up"))
        scale = float(tensors[f"{module}.alpha"]) / len(down)
        return (up.flatten(1) @ down.flatten(1)) * scale

    for path, multiplier in rounds:
        merged = (weight.float() + multiplier * delta(path)).to(weight.dtype)
        weight = (merged.float() - abs(multiplier) * delta(path)).to(weight.dtype)
    return (weight.float() + last[1] * delta(last[0])).to(weight.dtype)


@pytest.mark.parametrize("multiplier", [1.0, -1.0])
def test_weights_drift_as_in_the_trainer(tmp_path, multiplier):
    base = load_model_of(Recipe(prompt="", dtype="bfloat16", **SMALL))
    name = base.targets.find_name(NAME)
    assert name is not None
    target = base.targets.by_name[name]
    out, into = target.weight.shape
    paths = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            f"{NAME}.lora_down.weight": torch.randn(4, into, generator=generator) / 8,
            f"{NAME}.lora_up.weight": torch.randn(out, 4, generator=generator) / 8,
            f"{NAME}.alpha": torch.tensor(4.0),
        }
        paths.append(save_adapter(tmp_path / f"{seed}.safetensors", tensors))
    pristine = target.weight.clone()
    first, second, last = (base.targets.bind(read_adapter(path)) for path in paths)
    history = [(first, multiplier), (second, multiplier)]
    base.merged.apply([(last, multiplier)], history)
    rounds = [(path, multiplier) for path in paths[:2]]
    expected = trainers_weight(pristine, rounds, (paths[2], multiplier), NAME)
    assert torch.equal(target.weight, expected)
    base.merged.apply([(last, multiplier)])
    assert not torch.equal(target.weight, expected), (
        "the history does not change the weight, so this test cannot fail"
    )
    base.merged.apply([])
    assert torch.equal(target.weight, pristine)


def test_history_is_part_of_the_recipe():
    refs = (AdapterRef.from_file(LORA), AdapterRef.from_file(LORA_CONV, -1))
    plain = Recipe(prompt="a ball", adapters=refs[:1], **SMALL)
    drifted = replace(plain, history=refs)
    assert "history" not in plain.to_dict()
    assert Recipe.from_dict(drifted.to_dict(paths=True)) == drifted
    assert len({plain.digest, drifted.digest, replace(plain, history=refs[::-1]).digest}) == 3
    changes: tuple[dict[str, Any], ...] = ({"fidelity": "fast"}, {"adapter_mode": "live"})
    for change in changes:
        with pytest.raises(RecipeError, match="history"):
            replace(drifted, **change)


def test_history_changes_half_precision_images_and_leaves_no_trace():
    engine = Engine(device="cpu")
    plain = Recipe(
        prompt="a ball", adapters=(AdapterRef.from_file(LORA),), dtype="bfloat16", **SMALL
    )
    drifted = replace(plain, history=(AdapterRef.from_file(LORA_CONV),) * 3)
    before = engine.generate(plain).pixels.tobytes()
    after = engine.generate(drifted).pixels.tobytes()
    assert before != after
    assert engine.generate(plain).pixels.tobytes() == before
    assert Engine(device="cpu").generate(drifted).pixels.tobytes() == after


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., TrainingRun]:
    """Return a function that makes a run in bfloat16 with a float32 checkpoint every two steps."""

    def make(first: int = 0, *, are_compared: bool = True, **changes: Any) -> TrainingRun:
        """Make the last samples as the trainer does if it was started after step `first`.

        The other samples are placeholders, because only their names matter. Unless `are_compared`,
        the last ones are placeholders, too.
        """
        folder = Path(shutil.copytree(GOLDEN_JOBS / "checkpoints_jpg", tmp_path / "run"))
        document = yaml.safe_load((folder / "config.yaml").read_text())
        process = document["config"]["process"][0]
        process["train"]["dtype"] = "bf16"
        process["sample"] |= {"sample_every": 2, "sample_steps": 3, "format": "png"} | changes
        (folder / "config.yaml").write_text(yaml.safe_dump(document))
        for path in folder.glob("*.safetensors"):
            tensors = safetensors.torch.load(path.read_bytes())
            metadata = {"format": "pt"}
            wide = {
                key: tensor.float() * (1 if key.endswith("alpha") else 8)
                for key, tensor in tensors.items()
            }
            safetensors.torch.save_file(wide, path, metadata)
        shutil.rmtree(folder / "samples")
        (folder / "samples").mkdir()
        for step in (2, 4, 6, 8):
            for index in range(3):
                Image.new("RGB", (8, 8)).save(folder / "samples" / f"1__{step:09d}_{index}.png")
        run = read_run(folder)
        history = full_history(run, 8)
        history = replace(history, rounds=tuple(r for r in history.rounds if r > first))
        engine = Engine(device="cpu")
        plans = plan_samples(run, 8, base_model=str(TINY_BASE), history=history)
        for plan in plans if are_compared else []:
            assert plan.trainer_image is not None
            Image.fromarray(engine.generate(plan.recipe).pixels).save(plan.trainer_image)
        return run

    return make


def verdicts(run: TrainingRun, step: int) -> tuple[set[Verdict], str]:
    samples = verify(run, Engine(device="cpu"), [step], base_model=str(TINY_BASE))
    return {sample.verdict for sample in samples}, samples[0].plan.history.summary


def test_all_rounds_since_the_start_are_replayed(make_run):
    run = make_run()
    assert full_history(run, 8).rounds == (2, 4, 6)
    found, summary = verdicts(run, 8)
    assert found == {Verdict.IDENTICAL}
    assert "Earlier rounds of samples were replayed (steps 2, 4, 6)" in summary


def test_a_resume_is_found_by_trying(make_run):
    found, summary = verdicts(make_run(first=4), 8)
    assert found == {Verdict.IDENTICAL}
    assert "The run was resumed after step 4" in summary
    assert "(steps 6)" in summary


def test_rounds_are_known_from_the_configuration_if_images_are_gone(make_run):
    run = make_run(are_compared=False)
    for path in (run.folder / "samples").glob("*_000000004_*"):
        path.unlink()
    assert full_history(read_run(run.folder), 8).rounds == (2, 4, 6)


def test_missing_checkpoints_are_named(make_run):
    run = make_run(are_compared=False)
    run.checkpoints[4].unlink()
    run = read_run(run.folder)
    history = full_history(run, 8)
    assert (history.rounds, history.missing) == ((2, 6), (4,))
    assert "because their checkpoints are missing (steps 4)" in history.summary
    assert [one.rounds for one in resumed_histories(run, 8)] == [(), (6,), (6,)]


@pytest.mark.parametrize(
    "change",
    [
        lambda process: process["model"].update(quantize=True),
        lambda process: process["model"].update(layer_offloading=True),
    ],
)
def test_quantised_and_offloaded_runs_are_live_without_history(tmp_path, change):
    folder = Path(shutil.copytree(GOLDEN_JOBS / "checkpoints_jpg", tmp_path / "run"))
    document = yaml.safe_load((folder / "config.yaml").read_text())
    change(document["config"]["process"][0])
    (folder / "config.yaml").write_text(yaml.safe_dump(document))
    plans = plan_samples(read_run(folder), 8, base_model=str(TINY_BASE))
    assert {(plan.recipe.adapter_mode, plan.recipe.history) for plan in plans} == {("live", ())}
