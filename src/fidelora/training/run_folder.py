"""Run folders of AI Toolkit: configuration, checkpoints and samples of a training run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from fidelora.errors import JobFolderError, WeightsFileError
from fidelora.families import all_families
from fidelora.recipe import AdapterRef, Dtype, Prediction
from fidelora.safetensors_header import read_file_header
from fidelora.training.config_file import read_config, read_small_yaml
from fidelora.training.unused_settings import unused_settings

_DTYPES: Mapping[str, Dtype] = {
    "float32": "float32", "float": "float32", "fp32": "float32", "single": "float32",
    "bfloat16": "bfloat16", "bf16": "bfloat16",
    "float16": "float16", "fp16": "float16", "half": "float16",
}  # fmt: skip

_Number = TypeVar("_Number", int, float)

_SAMPLE_FILE = re.compile(
    r"(?P<time>\d+)__(?P<step>\d{9})_(?P<index>\d+)\.(jpg|jpeg|png|webp)", re.IGNORECASE
)


@dataclass(frozen=True)
class SampleItem:
    """An item of the sample block, with the block's values as defaults.

    Flags in the prompt are not parsed here.
    """

    prompt: str
    neg: str
    width: int
    height: int
    seed: int | None
    guidance_scale: float
    sample_steps: int
    network_multiplier: float
    guidance_rescale: float = 0.0


@dataclass(frozen=True)
class TrainingRun:
    """Contents of a run folder.

    Attributes:
        model: id of the model family.
        vae: replaces the base model's VAE; empty for none.
        seed: seed of the sample block.
        walk_seed: True if the index of a sample is added to the seed.
        steps: configured training steps.
        checkpoints: by step; the file or folder of the last step has no number in its name.
        images: samples, by step and index of the sample item; without those of `first_round`.
        sample_every: steps between two rounds of samples; 0 for none.
        stays_live: True if the trainer never merges the adapter, as the base model is quantised
            or its layers are offloaded. (The UNet of SD 1.5 and SDXL is then not quantised, but the
            adapter stays live all the same.)
        network_type: type of the adapter in the configuration, such as `lora`, in lower case.
        dora_alpha: alpha of a DoRA, which its file does not contain; None for other adapter types
            or if unknown.
        full_models: True if the checkpoints are whole base models, as in a full fine-tune. They are
            .safetensors files or diffusers folders, and there is no adapter.
        encodes_prompts_once: True if the trainer encodes the prompts of the sample block before
            training and unloads the text encoders. It then uses `neg` and the flag `--n` for both
            text encoders, and the prompts of the sample block also for `first_round`.
        first_round: the same run with the samples of the `first_sample` block, which the trainer
            makes before the samples of step 0; None without this block.
        is_first_round: True for the `first_round` of another run.
        encoded_block: the run with the sample block whose encoded prompts the first round uses;
            None if it uses its own prompts.
        notes: sentences about parts of the run that are not replayed.
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
    network_type: str = ""
    dora_alpha: float | None = None
    full_models: bool = False
    encodes_prompts_once: bool = False
    first_round: TrainingRun | None = None
    is_first_round: bool = False
    encoded_block: TrainingRun | None = None
    notes: tuple[str, ...] = ()

    @property
    def sampled_steps(self) -> tuple[int, ...]:
        """Steps with samples, in ascending order."""
        first = self.first_round.images if self.first_round else {}
        return tuple(sorted({step for step, _ in [*self.images, *first]}))

    def adapter(self, step: int) -> AdapterRef:
        """Return the adapter of the checkpoint of a step.

        Raises:
            JobFolderError: the checkpoints are whole base models.
            WeightsFileError: the file is invalid or cannot be read.
        """
        if self.full_models:
            raise JobFolderError(
                f"The training run {self.name} has no adapter: its checkpoints are base models."
            )
        return replace(AdapterRef.from_file(self.checkpoints[step]), alpha=self.dora_alpha)


def read_run(folder: Path) -> TrainingRun:
    """Read a run folder.

    Raises:
        JobFolderError: it is not a run folder, or its configuration is invalid or not supported.
    """
    if not folder.is_dir():
        raise JobFolderError(
            f"The folder {folder} does not exist; set the output folder of a training run."
        )
    config = read_config(folder)
    process, name = config.process, config.name
    train, model, sample, network = (
        _block(process, key) for key in ("train", "model", "sample", "network")
    )
    base_model = model.get("name_or_path")
    if not isinstance(base_model, str):
        raise JobFolderError(
            f"The configuration in {folder} has no base model; set model.name_or_path."
        )
    family = _family(model)
    dtype = _dtype(train.get("dtype", "float32"), "train.dtype")
    steps = _number(int, train.get("steps", 1000), "train.steps")
    full_models = _saves_full_models(process, train)
    checkpoints: dict[int, Path] = {}
    if _names_lora(process):
        checkpoints = _checkpoints(folder, f"{name}_LoRA", steps)
    if not checkpoints:
        checkpoints = _checkpoints(folder, name, steps, full_models=full_models)
    offloading = model.get("layer_offloading", model.get("auto_memory"))  # the trainer's order
    run = TrainingRun(
        folder=folder,
        name=name,
        trigger_word=str(process.get("trigger_word") or ""),
        model=family,
        base_model=base_model,
        dtype=dtype,
        vae_dtype=_dtype(model.get("vae_dtype", dtype), "model.vae_dtype"),
        text_encoder_dtype=_dtype(model.get("te_dtype", dtype), "model.te_dtype"),
        prediction="v_prediction" if model.get("is_v_pred") else "epsilon",
        vae=str(model.get("vae_path") or ""),
        **_sample_settings(sample, "sample"),
        steps=steps,
        checkpoints=checkpoints,
        images={},
        stays_live=bool(model.get("quantize") or offloading),
        network_type=str(network.get("type", "")).lower(),
        dora_alpha=_dora_alpha(network),
        full_models=full_models,
        encodes_prompts_once=_encodes_prompts_once(process, train),
        notes=(
            *config.notes,
            *unused_settings(process, family),
            *(_folders_without_weights(folder, name) if full_models else ()),
        ),
    )
    rounds = _rounds(folder / "samples")
    if process.get("first_sample") is None:
        return replace(run, images=_latest(rounds))
    return _with_first_round(
        run, rounds, _block(process, "first_sample"), bool(train.get("skip_first_sample"))
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
        rounds: images by step, as from `_rounds`.
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
        **_sample_settings(block, "first_sample"),
        images=_latest({0: first_rounds}),
        is_first_round=True,
        encoded_block=run if run.encodes_prompts_once else None,
    )
    return replace(run, images=_latest(ordinary), first_round=first)


def _sample_settings(block: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the fields of `TrainingRun` that a block of sample settings defines."""
    return {
        "sampler": str(block.get("sampler", "ddpm")),
        "seed": _number(int, block.get("seed", 0), f"{name}.seed"),
        "walk_seed": bool(block.get("walk_seed", False)),
        "image_format": str(block.get("format", "jpg")),
        "samples": tuple(_items(block, name)),
        "sample_every": max(
            0, _number(int, block.get("sample_every") or 0, f"{name}.sample_every")
        ),
    }


def _trains_adapter(process: Mapping[str, Any]) -> bool:
    """Return True if the run trains an image adapter, such as an IP-Adapter."""
    adapter = process.get("adapter")
    return isinstance(adapter, dict) and bool(adapter.get("train"))


def _saves_full_models(process: Mapping[str, Any], train: Mapping[str, Any]) -> bool:
    """Return True if the trainer saves whole base models: without network, or with a merged one."""
    if process.get("network") is not None:
        return bool(train.get("merge_network_on_save"))
    others = (process.get(key) is not None for key in ("embedding", "decorator"))
    return not any(others) and not _trains_adapter(process)


def _names_lora(process: Mapping[str, Any]) -> bool:
    """Return True if the trainer adds `_LoRA` to file names, as it also saves other weights."""
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


def _family(model: Mapping[str, Any]) -> str:
    """Return the id of the model family; older configurations set a flag, newer ones `arch`.

    Raises:
        JobFolderError: the family is not supported, or an option that changes its samples is not.
    """
    arch = model.get("arch")
    flags = {
        key
        for key, value in model.items()
        if key.startswith("is_") and key != "is_v_pred" and value
    }
    spec = next(
        (
            spec
            for spec in all_families().values()
            if flags <= set(spec.samples.flags)
            and (arch in spec.samples.archs or (arch is None and flags))
        ),
        None,
    )
    if spec is None:
        known = ", ".join(spec.title for spec in all_families().values())
        trained = " and ".join([*([repr(arch)] if arch else []), *sorted(flags)])
        raise JobFolderError(
            f"The training run trains {trained}, which is not supported; "
            f"the supported models are: {known}."
        )
    if model.get("refiner_name_or_path"):
        raise JobFolderError(
            "The training run samples with a refiner (model.refiner_name_or_path), "
            "which is not supported."
        )
    return spec.id


def _dora_alpha(network: Mapping[str, Any]) -> float | None:
    if str(network.get("type", "")).lower() != "dora":
        return None
    alpha = network.get("linear_alpha", network.get("alpha", 1.0))  # the trainer's own default
    return None if alpha is None else _number(float, alpha, "network.linear_alpha")


def _block(process: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    block = process.get(key) or {}
    if not isinstance(block, dict):
        raise JobFolderError(f"The {key} block of the configuration must be a mapping.")
    return block


def _number(kind: Callable[[Any], _Number], value: object, where: str) -> _Number:
    try:
        return kind(value)
    except (TypeError, ValueError, OverflowError):
        raise JobFolderError(
            f"The configuration has {where} {value!r}, which is not a usable number."
        ) from None


def _dtype(name: object, where: str) -> Dtype:
    if isinstance(name, str) and name in _DTYPES:
        return _DTYPES[name]
    raise JobFolderError(
        f"The configuration has {where} {name!r}, which is not supported; "
        "use float32, bfloat16 or float16."
    )


def _items(sample: Mapping[str, Any], name: str) -> list[SampleItem]:
    """Return the items of a block of samples, with the trainer's defaults.

    The trainer's user interface has other defaults, but writes all values.

    Args:
        name: name of the block in error messages.
    """
    defaults = {
        "width": 512, "height": 512, "neg": False, "guidance_scale": 7, "guidance_rescale": 0,
        "sample_steps": 20, "network_multiplier": 1,
    }  # fmt: skip
    block = defaults | {key: value for key, value in sample.items() if key != "samples"}
    prompts = sample.get("prompts") or []
    raw = sample.get("samples") or (
        [{"prompt": prompt} for prompt in prompts] if isinstance(prompts, list) else prompts
    )
    if not isinstance(raw, list) or not all(
        isinstance(item, dict) and isinstance(item.get("prompt"), str) for item in raw
    ):
        raise JobFolderError(
            f"{name}.samples or {name}.prompts is not a list of items with a prompt each; "
            "correct the configuration."
        )
    # The trainer ignores guidance_rescale of an item.
    rescale = {"guidance_rescale": block["guidance_rescale"]}
    return [
        _item(block | item | rescale, item.get("seed"), f"{name}.samples[{index}]")
        for index, item in enumerate(raw)
    ]


def _item(values: Mapping[str, Any], seed: object, where: str) -> SampleItem:
    return SampleItem(
        prompt=values["prompt"],
        neg=str(values["neg"] or ""),
        width=_number(int, values["width"], f"{where}.width"),
        height=_number(int, values["height"], f"{where}.height"),
        seed=None if seed is None else _number(int, seed, f"{where}.seed"),
        guidance_scale=_number(float, values["guidance_scale"], f"{where}.guidance_scale"),
        sample_steps=_number(int, values["sample_steps"], f"{where}.sample_steps"),
        network_multiplier=_number(
            float, values["network_multiplier"], f"{where}.network_multiplier"
        ),
        guidance_rescale=_number(float, values["guidance_rescale"], f"{where}.guidance_rescale"),
    )


def _checkpoints(
    folder: Path, name: str, steps: int, *, full_models: bool = False
) -> dict[int, Path]:
    """Return the checkpoints by step.

    The last one has no number in its name. Its metadata has the step, which differs from the
    configured steps if these were raised to continue the run later.

    Args:
        name: start of the file names.
        full_models: True to include diffusers folders.
    """
    names = re.compile(re.escape(name) + r"(_(?P<step>\d{9}))?(?P<suffix>\.safetensors)?", re.I)
    found, final = {}, None
    for path in sorted(folder.glob("*")):
        match = names.fullmatch(path.name)
        if match is None or not path.name.startswith(name):  # upper case only in the suffix
            continue
        if not (path.is_file() if match["suffix"] else full_models and _is_full_model(path)):
            continue
        if match["step"]:
            found[int(match["step"])] = path
        else:
            final = path
    if final is not None:
        found[_saved_step(final, steps)] = final
    return found


def _is_full_model(path: Path) -> bool:
    """Return True for a diffusers folder with weights."""
    return _is_diffusers_folder(path) and any(path.glob("*/*.safetensors"))


def _is_diffusers_folder(path: Path) -> bool:
    return any((path / name).is_file() for name in ("aitk_meta.yaml", "model_index.json"))


def _folders_without_weights(folder: Path, name: str) -> list[str]:
    return [
        f"{path.name} is the folder of a saved model, but it has no .safetensors files."
        for path in sorted(folder.glob("*"))
        if path.name.startswith(name) and _is_diffusers_folder(path) and not _is_full_model(path)
    ]


def _saved_step(path: Path, default: int) -> int:
    """Return the step in the metadata of a checkpoint; `default` if there is none."""
    try:
        step = json.loads(checkpoint_metadata(path)["training_info"])["step"]
    except (KeyError, TypeError, ValueError, RecursionError, WeightsFileError):
        return default
    return step if type(step) is int and step >= 0 else default


def checkpoint_metadata(path: Path) -> Mapping[str, str]:
    """Return the trainer's metadata of a checkpoint, with each value as JSON or plain text.

    Raises:
        WeightsFileError: the file is not a valid .safetensors file.
    """
    if path.is_file():
        return read_file_header(path).metadata
    document = read_small_yaml(path / "aitk_meta.yaml")
    if not isinstance(document, dict):
        return {}
    return {
        str(key): value if isinstance(value, str) else json.dumps(value, default=str)
        for key, value in document.items()
    }


def _rounds(folder: Path) -> dict[int, list[dict[int, Path]]]:
    """Return the rounds of images of each step, in order of time, each by index.

    A round begins where the index does not increase.
    """
    rounds: dict[int, list[dict[int, Path]]] = {}
    found = ((path, _SAMPLE_FILE.fullmatch(path.name)) for path in folder.glob("*"))
    matches = [(path, match) for path, match in found if match]
    for path, match in sorted(matches, key=_time_and_index):
        of_step = rounds.setdefault(int(match["step"]), [])
        index = int(match["index"])
        if not of_step or index <= max(of_step[-1]):
            of_step.append({})
        of_step[-1][index] = path
    return rounds


def _time_and_index(found: tuple[Path, re.Match[str]]) -> tuple[int, int, str]:
    path, match = found
    return int(match["time"]), int(match["index"]), path.name


def _latest(rounds: Mapping[int, list[dict[int, Path]]]) -> dict[tuple[int, int], Path]:
    """Return the last image of each step and index."""
    return {
        (step, index): path
        for step, of_step in rounds.items()
        for one in of_step
        for index, path in one.items()
    }
