"""Suspects of the doctor that depend on how a training run was carried out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

from fidelora.errors import FideloraError
from fidelora.families import get_family
from fidelora.recipe import AdapterRef, Recipe
from fidelora.training.flags import split_flags
from fidelora.training.history import refs_of, resumed_histories
from fidelora.training.plan import PlannedSample, plan_samples
from fidelora.training.run_folder import TrainingRun
from fidelora.training.suspects import Suspect

_MAX_RESUMES = 3  # histories of resumed runs to try, those with the fewest rounds first
_MAX_EMBEDDINGS = 3  # embeddings of other steps to try, the nearest steps first


def run_suspects(run: TrainingRun, plan: PlannedSample) -> Iterator[Suspect]:
    """Yield the recipe of a sample as it would be if the run had been carried out differently.

    Args:
        run: the training run; its `first_round` contains the samples of the first round.
    """
    yield from _rounds(run, plan)
    yield from _encoding(run, plan)
    yield from trainer_versions(run, plan)
    yield from _quantization(plan.recipe)
    yield from _training_adapters(plan.recipe)
    yield from _adapter_modes(run, plan.recipe)
    yield from _histories(run, plan)
    yield from _embeddings(run, plan)


def _rounds(run: TrainingRun, plan: PlannedSample) -> Iterator[Suspect]:
    """Yield the settings of the other round at step 0: that of `sample`, or of `first_sample`."""
    if plan.step != 0 or run.first_round is None:
        return
    other, name = (run, "sample") if plan.is_first_round else (run.first_round, "first_sample")
    # Empty if the other round lacks this sample, or has a setting that no recipe accepts.
    for planned in _planned(other, 0, plan.index):
        fix = (
            f"The sample was made with the settings of the {name} block. Set train."
            "skip_first_sample to the value that it had during training, and restore images that "
            "were removed: without them, the two rounds of step 0 cannot be told apart."
        )
        yield Suspect("first_sample", _with_base_of(plan.recipe, planned.recipe), fix)


def _encoding(run: TrainingRun, plan: PlannedSample) -> Iterator[Suspect]:
    """Yield the prompts that are encoded if `unload_text_encoder` has the opposite value."""
    once = not run.encodes_prompts_once
    block = replace(run, encodes_prompts_once=once)
    if plan.is_first_round and run.first_round is not None:
        encoded = block if once else None
        block = replace(run.first_round, encodes_prompts_once=once, encoded_block=encoded)
    for planned in _planned(block, 0, plan.index):
        changed = replace(
            plan.recipe,
            prompt=planned.recipe.prompt,
            negative_prompt=planned.recipe.negative_prompt,
            negative_prompt_2=planned.recipe.negative_prompt_2,
        )
        how, value = (
            ("once, before training", "true") if once else ("again for each sample", "false")
        )
        fix = f"The prompts were encoded {how}: set train.unload_text_encoder to {value}."
        yield Suspect("unload_text_encoder", changed, fix)


def trainer_versions(run: TrainingRun, plan: PlannedSample) -> Iterator[Suspect]:
    """Yield the sample as other releases of the trainer made it, the latest release first."""
    changes = [one.before for one in get_family(run.model).trainer_sampling.older]
    for number, before in enumerate((None, *changes)):
        # Releases from `changes[number]` (if there is one) to `before` made it in the same way.
        first = changes[number] if number < len(changes) else (0, 0, 0)
        fix = (
            f"The sample was made by AI Toolkit {_release(first)} or later"
            if before is None
            else f"The sample was made by AI Toolkit before {_release(before)}"
        )
        fix += f": add `--trainer-version {_release(first)}`."
        other = run.with_settings(trainer_version=first)
        for planned in _planned(other, plan.step, plan.index):
            yield Suspect("trainer_version", _with_base_of(plan.recipe, planned.recipe), fix)


def _release(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _quantization(recipe: Recipe) -> Iterator[Suspect]:
    """Yield the sample with a base model that is quantised, or not."""
    if "quantization" not in get_family(recipe.model).uses:
        return
    if recipe.quantization == recipe.text_encoder_quantization == "none":
        fix = "The base model was quantised: set model.quantize and model.quantize_te to true."
        changed = replace(
            recipe,
            quantization="qfloat8",
            text_encoder_quantization="qfloat8",
            adapter_mode="live",
            history=(),
        )
    else:
        fix = "The base model was not quantised: set model.quantize and model.quantize_te to false."
        changed = replace(recipe, quantization="none", text_encoder_quantization="none")
        yield Suspect("quantized", replace(changed, adapter_mode="merged"), fix)
    yield Suspect("quantized", changed, fix)


def _training_adapters(recipe: Recipe) -> Iterator[Suspect]:
    """Yield the sample without the training adapter."""
    if recipe.training_adapters:
        fix = (
            "The sample was made without the training adapter: remove model.assistant_lora_path, "
            "or add `--training-adapter none`."
        )
        yield Suspect("training_adapter", replace(recipe, training_adapters=()), fix)


def _adapter_modes(run: TrainingRun, recipe: Recipe) -> Iterator[Suspect]:
    """Yield the other adapter mode, which depends on whether the base model is quantised."""
    is_quantized = recipe.quantization != "none"  # adapters of a quantised model are always live
    if is_quantized or all(ref.word is not None for ref in recipe.adapters):
        return
    if recipe.adapter_mode == "merged":
        fix = (
            "The adapter was unmerged, as with a quantised or offloaded base model: set "
            "model.quantize to true. Or the samples had several multipliers. In fidelora generate: "
            "`--live`."
        )
        yield Suspect("quantized", replace(recipe, adapter_mode="live", history=()), fix)
    elif run.stays_live:
        fix = (
            "The adapter was merged, as with a base model that is neither quantised nor "
            "offloaded: set model.quantize and model.layer_offloading to false."
        )
        yield Suspect("quantized", replace(recipe, adapter_mode="merged"), fix)
    else:
        fix = "The adapter was merged. Set one multiplier for all samples of the training run."
        yield Suspect("multiplier", replace(recipe, adapter_mode="merged"), fix)


def _histories(run: TrainingRun, plan: PlannedSample) -> Iterator[Suspect]:
    """Yield the histories of resumed runs, those with the fewest earlier rounds first."""
    recipe = plan.recipe
    if not plan.history.rounds and not plan.history.missing:
        return
    multiplier = next(ref.multiplier for ref in recipe.adapters if ref.word is None)
    for history in islice(resumed_histories(run, plan.step), _MAX_RESUMES):
        if history.missing:
            return  # all longer histories lack these rounds, too
        fix = (
            f"The run was resumed after step {history.resumed_after}, so that earlier rounds of "
            "samples did not change its base model. The configuration is right."
        )
        changed = replace(recipe, history=refs_of(run, history, multiplier))
        yield Suspect("history", changed, fix)


def _embeddings(run: TrainingRun, plan: PlannedSample) -> Iterator[Suspect]:
    """Yield the sample without its embedding, with one token of it, or with other steps' files."""
    recipe = plan.recipe
    embedding = run.embedding
    others = tuple(ref for ref in recipe.adapters if ref.word is None)
    if embedding is None or len(others) == len(recipe.adapters):
        return
    fix = (
        "The sample was made without the trained embedding. Load the embedding in the program that "
        "made the sample."
    )
    yield Suspect("embedding", replace(recipe, adapters=others), fix)
    prompt = split_flags(run.samples[plan.index].prompt.replace("[trigger]", embedding.word))[0]
    fix = (
        f"Only the first token of the embedding was used: replace the trigger by all of them, "
        f"{embedding.text!r}."
    )
    yield Suspect("embedding", replace(recipe, prompt=prompt), fix)
    nearest = sorted(embedding.files, key=lambda step: abs(step - plan.step))
    for step in nearest[: _MAX_EMBEDDINGS + 1]:
        if step != plan.step:
            ref = replace(AdapterRef.from_file(embedding.files[step]), word=embedding.word)
            fix = f"The sample was made with the embedding of step {step}: use that file."
            yield Suspect("embedding", replace(recipe, adapters=(*others, ref)), fix)


def _planned(run: TrainingRun, step: int, index: int) -> list[PlannedSample]:
    """Return a list with the planned sample; empty if there is none or it cannot be planned."""
    try:
        return plan_samples(run, step)[index : index + 1]
    except FideloraError:
        return []


def _with_base_of(planned: Recipe, other: Recipe) -> Recipe:
    """Return `other` with the base model, precision, noise and adapters of `planned`.

    Options of `fidelora verify` may have changed these in `planned`, and both rounds share them.
    """
    kept = (
        "base_model", "variant", "vae", "dtype", "vae_dtype", "text_encoder_dtype", "noise",
        "adapters",
    )  # fmt: skip
    return replace(other, **{name: getattr(planned, name) for name in kept})
