"""Run folders of AI Toolkit: configuration, checkpoints and samples of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fidelora.errors import TrainingRunError
from fidelora.families import get_family
from fidelora.families.spec import Stage
from fidelora.recipe import AdapterRef, Dtype, Prediction, Quantization
from fidelora.training.config_file import block_of, dtype_of, number_of, read_config
from fidelora.training.embedding_block import TrainedEmbedding, read_embedding
from fidelora.training.folder_hints import file_advice
from fidelora.training.model_block import family_of, quantization_of, training_adapter_of
from fidelora.training.run_files import (
    find_checkpoints,
    folders_without_weights,
    image_rounds,
    latest_images,
    stage_checkpoints,
)
from fidelora.training.sample_block import SampleItem, sample_settings
from fidelora.training.unused_settings import unused_settings


@dataclass(frozen=True)
class TrainingRun:
    """Contents of a run folder.

    Attributes:
        model: id of the model family.
        vae: replaces the base model's VAE; empty for none.
        seed: seed of the sample block.
        walk_seed: True if the index of a sample is added to the seed.
        steps: configured training steps.
        checkpoints: by step; the file or folder of the last step has no number in its name. They
            are the files of the embedding if the run trains nothing else. If it trains a LoRA and
            an embedding, they are the LoRA's files of steps that have both. In families with
            stages, they are the files of the first stage that has one.
        stage_checkpoints: all checkpoints in families with stages, by stage and step; empty in
            other families. The trainer saves one file for each stage that it trains.
        images: samples, by step and index of the sample item; without those of `first_round`.
        sample_every: steps between two rounds of samples; 0 for none.
        stays_live: True if the trainer never merges the adapter, because the configuration
            quantises the base model or offloads its layers. (The trainer never quantises the UNet
            of SD 1.5 and SDXL, but even then it does not merge the adapter.)
        quantization, text_encoder_quantization: recipe fields; `none` for families that the trainer
            does not quantise.
        training_adapter: path or hub location (owner/name/file) of the assistant LoRA, for families
            that use `training_adapters`; empty for none.
        trainer_version: release of AI Toolkit that made the samples; None for the one in the
            metadata of the checkpoint.
        low_vram: True if `model.low_vram` is set; some families then decode in tiles.
        network_type: type of the adapter in the configuration, such as `lora`, in lower case.
        dora_alpha: alpha of a DoRA, which its file does not contain; None for other adapter types
            or if unknown.
        full_models: True if the checkpoints are whole base models, as in a full fine-tune. They are
            .safetensors files or diffusers folders, and the run has no adapter.
        encodes_prompts_once: True if the trainer encodes the prompts of the sample block before
            training and unloads the text encoders. It then uses `neg` and the flag `--n` for both
            text encoders, and the prompts of the sample block also for `first_round`.
        first_round: the same run with the samples of the `first_sample` block, which the trainer
            makes before the samples of step 0; None without this block.
        is_first_round: True for the `first_round` of another run.
        encoded_block: the run with the sample block whose encoded prompts the first round uses;
            None if it uses its own prompts.
        notes: sentences about parts of the run that are not replayed.
        embedding: the embedding that the run trains; None if it trains none.
    """

    folder: Path
    name: str
    trigger_word: str
    model: str
    base_model: str
    dtype: Dtype
    vae_dtype: Dtype
    text_encoder_dtype: Dtype
    prediction: Prediction
    vae: str
    sampler: str
    seed: int
    walk_seed: bool
    image_format: str
    steps: int
    samples: tuple[SampleItem, ...]
    checkpoints: Mapping[int, Path]
    images: Mapping[tuple[int, int], Path]
    sample_every: int = 0
    stays_live: bool = False
    quantization: Quantization = "none"
    text_encoder_quantization: Quantization = "none"
    training_adapter: str = ""
    trainer_version: tuple[int, ...] | None = None
    low_vram: bool = False
    network_type: str = ""
    dora_alpha: float | None = None
    full_models: bool = False
    encodes_prompts_once: bool = False
    first_round: TrainingRun | None = None
    is_first_round: bool = False
    encoded_block: TrainingRun | None = None
    notes: tuple[str, ...] = ()
    embedding: TrainedEmbedding | None = None
    stage_checkpoints: Mapping[Stage, Mapping[int, Path]] = field(default_factory=dict)

    @property
    def trigger_text(self) -> str:
        """Text that replaces `[trigger]`: all tokens of the embedding, else the trigger word."""
        return self.trigger_word if self.embedding is None else self.embedding.text

    @property
    def has_network(self) -> bool:
        """True if the run trains an adapter that changes weights, not only an embedding."""
        return self.embedding is None or self.embedding.has_lora

    @property
    def sampled_steps(self) -> tuple[int, ...]:
        """Steps with samples, in ascending order."""
        first = self.first_round.images if self.first_round else {}
        return tuple(sorted({step for step, _ in [*self.images, *first]}))

    def with_settings(self, **changes: Any) -> TrainingRun:
        """Return the run with other values of these fields, also in its first round."""
        first = self.first_round and replace(self.first_round, **changes)
        return replace(self, **changes, first_round=first)

    def files(self, step: int) -> tuple[tuple[Path, Stage | None], ...]:
        """Return the checkpoint of a step, or one for each stage, with the stage."""
        if not self.stage_checkpoints:
            return ((self.checkpoints[step], None),)
        by_stage = self.stage_checkpoints.items()
        return tuple((paths[step], stage) for stage, paths in by_stage if step in paths)

    def _adapters_of_checkpoint(self, step: int) -> list[AdapterRef]:
        """Return the adapters of the checkpoint of a step, one for each stage.

        Raises:
            TrainingRunError: the checkpoints are whole base models.
            WeightsFileError: the file is invalid or cannot be read.
        """
        if self.full_models:
            raise TrainingRunError(
                f"The training run {self.name} has no adapter: its checkpoints are base models."
            )
        is_embedding = self.embedding is not None and not self.embedding.has_lora
        word = self.embedding.word if self.embedding is not None and is_embedding else None
        alpha = None if is_embedding else self.dora_alpha
        refs = [(AdapterRef.from_file(path), stage) for path, stage in self.files(step)]
        return [
            replace(ref, word=word, alpha=None if _has_peft_names(ref) else alpha, stage=stage)
            for ref, stage in refs
        ]

    def adapters(self, step: int) -> tuple[AdapterRef, ...]:
        """Return the adapters of a step: those of its checkpoint and its embedding, if they exist.

        Raises:
            TrainingRunError: the checkpoints are whole base models.
            WeightsFileError: a file is invalid or cannot be read.
        """
        refs = []
        if self.has_network and step in self.checkpoints:
            refs += self._adapters_of_checkpoint(step)
        if self.embedding is not None and step in self.embedding.files:
            ref = AdapterRef.from_file(self.embedding.files[step])
            refs.append(replace(ref, word=self.embedding.word))
        return tuple(refs)


def read_run(folder: Path) -> TrainingRun:
    """Read a run folder.

    Raises:
        TrainingRunError: it is not a run folder, or its configuration is invalid or not supported.
    """
    if folder.is_file():
        raise TrainingRunError(
            f"{folder} is a file; give the output folder of a training run.{file_advice(folder)}"
        )
    if not folder.is_dir():
        raise TrainingRunError(
            f"The folder {folder} does not exist; give the output folder of a training run."
        )
    config = read_config(folder)
    process, name = config.process, config.name
    train, model, sample, network = (
        block_of(process, key) for key in ("train", "model", "sample", "network")
    )
    base_model = model.get("name_or_path")
    if not isinstance(base_model, str):
        raise TrainingRunError(
            f"The configuration in {folder} has no base model; set model.name_or_path."
        )
    family = family_of(model)
    dtype = dtype_of(train.get("dtype", "float32"), "train.dtype")
    steps = number_of(int, train.get("steps", 1000), "train.steps")
    full_models = _saves_full_models(process, train)
    embedding = read_embedding(process, folder, steps)
    checkpoints: Mapping[int, Path] = {}
    if embedding is not None and not embedding.has_lora:
        checkpoints = embedding.files
    elif _names_lora(process):
        checkpoints = find_checkpoints(folder, f"{name}_LoRA", steps)
    stages = get_family(family).stages
    by_stage = stage_checkpoints(folder, name, steps, stages)
    for found in reversed(by_stage.values()):
        checkpoints = {**checkpoints, **found}
    if not checkpoints and not stages:
        checkpoints = find_checkpoints(folder, name, steps, full_models=full_models)
    if embedding is not None:
        checkpoints = {step: path for step, path in checkpoints.items() if step in embedding.files}
    offloading = model.get("layer_offloading", model.get("auto_memory"))  # the trainer's order
    run = TrainingRun(
        folder=folder,
        name=name,
        trigger_word=str(process.get("trigger_word") or ""),
        model=family,
        base_model=base_model,
        dtype=dtype,
        vae_dtype=dtype_of(model.get("vae_dtype", dtype), "model.vae_dtype"),
        text_encoder_dtype=dtype_of(model.get("te_dtype", dtype), "model.te_dtype"),
        prediction="v_prediction" if model.get("is_v_pred") else "epsilon",
        vae=str(model.get("vae_path") or ""),
        **sample_settings(sample, "sample"),
        steps=steps,
        checkpoints=checkpoints,
        images={},
        stays_live=bool(model.get("quantize") or offloading),
        **quantization_of(model, get_family(family)),
        training_adapter=training_adapter_of(model, get_family(family)),
        low_vram=bool(model.get("low_vram")),
        network_type=str(network.get("type", "")).lower(),
        dora_alpha=_dora_alpha(network),
        full_models=full_models,
        encodes_prompts_once=_encodes_prompts_once(process, train),
        notes=(
            *config.notes,
            *unused_settings(process, family),
            *(folders_without_weights(folder, name) if full_models else ()),
        ),
        embedding=embedding,
        stage_checkpoints=by_stage,
    )
    rounds = image_rounds(folder / "samples")
    if process.get("first_sample") is None:
        return replace(run, images=latest_images(rounds))
    return _with_first_round(
        run, rounds, block_of(process, "first_sample"), bool(train.get("skip_first_sample"))
    )


def _with_first_round(
    run: TrainingRun,
    rounds: Mapping[int, list[dict[int, Path]]],
    block: Mapping[str, Any],
    skips_ordinary: bool,
) -> TrainingRun:
    """Return the run with its first round, and the images of step 0 divided between the rounds.

    The trainer makes the first round directly before the ordinary samples of step 0, with the same
    step in the file names. If it was started several times, the last two rounds belong together.

    Args:
        rounds: images by step, as from `image_rounds`.
        block: the `first_sample` block.
        skips_ordinary: True if the trainer makes no ordinary samples of step 0.
    """
    at_zero = rounds.get(0, [])
    has_ordinary = len(at_zero) > 1 and not skips_ordinary
    first_rounds = at_zero[-2:-1] if has_ordinary else at_zero[-1:]
    ordinary = {step: found for step, found in rounds.items() if step != 0}
    if has_ordinary:
        ordinary[0] = at_zero[-1:]
    first = replace(
        run,
        **sample_settings(block, "first_sample"),
        images=latest_images({0: first_rounds}),
        is_first_round=True,
        encoded_block=run if run.encodes_prompts_once else None,
    )
    return replace(run, images=latest_images(ordinary), first_round=first)


def _trains_adapter(process: Mapping[str, Any]) -> bool:
    """Return True if the run trains an image adapter, such as an IP-Adapter."""
    adapter = process.get("adapter")
    return isinstance(adapter, dict) and bool(adapter.get("train"))


def _saves_full_models(process: Mapping[str, Any], train: Mapping[str, Any]) -> bool:
    """Return True if the trainer saves whole base models: no adapter, or a merged one."""
    if process.get("network") is not None:
        return bool(train.get("merge_network_on_save"))
    others = (process.get(key) is not None for key in ("embedding", "decorator"))
    return not any(others) and not _trains_adapter(process)


def _names_lora(process: Mapping[str, Any]) -> bool:
    """Return True if the trainer adds `_LoRA` to file names because it also saves other weights."""
    saves_others = process.get("embedding") is not None or _trains_adapter(process)
    return process.get("network") is not None and saves_others


def _encodes_prompts_once(process: Mapping[str, Any], train: Mapping[str, Any]) -> bool:
    datasets = process.get("datasets")
    return bool(
        train.get("unload_text_encoder")
        or train.get("cache_text_embeddings")
        or any(
            isinstance(dataset, dict) and dataset.get("cache_text_embeddings")
            for dataset in (datasets if isinstance(datasets, list) else ())
        )
    )


def _dora_alpha(network: Mapping[str, Any]) -> float | None:
    if str(network.get("type", "")).lower() != "dora":
        return None
    alpha = network.get("linear_alpha", network.get("alpha", 1.0))  # the trainer's own default
    return None if alpha is None else number_of(float, alpha, "network.linear_alpha")


def _has_peft_names(ref: AdapterRef) -> bool:
    """Return True if the trainer wrote the file with PEFT's names, as for all transformers.

    It then replaces the configured alpha by the rank (`peft_format` in its `lora_special.py`).
    """
    return ref.file is not None and any(".lora_A." in key for key in ref.file.header.tensors)
