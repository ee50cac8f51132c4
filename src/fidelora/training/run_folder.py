"""A training job's folder: what it was told to do, what it saved, and what it painted."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from fidelora.errors import JobFolderError
from fidelora.families import all_families
from fidelora.recipe import AdapterRef, Dtype, Prediction

_DTYPES: Mapping[str, Dtype] = {
    "float32": "float32", "float": "float32", "fp32": "float32", "single": "float32",
    "bfloat16": "bfloat16", "bf16": "bfloat16",
    "float16": "float16", "fp16": "float16", "half": "float16",
}  # fmt: skip

MAX_CONFIG_BYTES = 2**20
"""Of a configuration; those of trainers have a few thousand."""
_MAX_WEIGHT = 4 * 2**20
_NODE_WEIGHT = 16
"""A configuration's weight: its characters, and so many for each value, with each alias as long as what it stands for."""
_MAX_NUMBER_LENGTH = 100
_MAX_NAME_LENGTH = 200
"""A job's name is the name of its files, and is put in many places."""

_Number = TypeVar("_Number", int, float)

_SAMPLE_FILE = re.compile(r"\d+__(?P<step>\d{9})_(?P<index>\d+)\.(jpg|jpeg|png|webp)")


@dataclass(frozen=True)
class SampleItem:
    """One item of the sample block, with the block's own values where the item has none; flags are still in the prompt."""

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
    """What a job's folder says.

    Attributes:
        model: id of the model family that it trains.
        vae: in place of the base's own; empty for that.
        dora_alpha: what the scale of a DoRA is made of, which its file does not say; None for other kinds, or if it is not known.
        checkpoints: by step; the file of the last step is the one without a number.
        images: by step and index of the sample item.
        steps: how many the training was told to do; the last samples carry this number.
        seed, walk_seed: of the sample block.
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
    dora_alpha: float | None = None

    @property
    def sampled_steps(self) -> tuple[int, ...]:
        """The steps of which there are images, in order."""
        return tuple(sorted({step for step, _ in self.images}))

    def adapter(self, step: int) -> AdapterRef:
        """What was trained until this step.

        Raises:
            WeightsFileError: its file is not sound, or cannot be read.
        """
        return replace(AdapterRef.from_file(self.checkpoints[step]), alpha=self.dora_alpha)


def read_run(folder: Path) -> TrainingRun:
    """Read the folder of a training job.

    Raises:
        JobFolderError: it is not one, or its configuration cannot be read.
    """
    if not folder.is_dir():
        raise JobFolderError(
            f"There is no folder {folder}; give the output folder of a training job."
        )
    process, name = _process(folder)
    train, model, sample, network = (
        _block(process, key) for key in ("train", "model", "sample", "network")
    )
    base_model = model.get("name_or_path")
    if not isinstance(base_model, str):
        raise JobFolderError(f"The job in {folder} names no base model (model.name_or_path).")
    family = _family(model)
    dtype = _dtype(train.get("dtype", "float32"), "train.dtype")
    steps = _number(int, train.get("steps", 1000), "train.steps")
    return TrainingRun(
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
        sampler=str(sample.get("sampler", "ddpm")),
        seed=_number(int, sample.get("seed", 0), "sample.seed"),
        walk_seed=bool(sample.get("walk_seed", False)),
        image_format=str(sample.get("format", "jpg")),
        steps=steps,
        samples=tuple(_items(sample)),
        checkpoints=_checkpoints(folder, name, steps),
        images=_images(folder / "samples"),
        dora_alpha=_dora_alpha(network),
    )


def _family(model: Mapping[str, Any]) -> str:
    """The id of the model family that a job trains: older configurations name it by a flag, and newer ones by `arch`.

    Raises:
        JobFolderError: there is no such family here, or the job has the family do what its previews here would not show.
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
            f"The job trains {trained}, which is none of the models here: {known}."
        )
    if model.get("refiner_name_or_path"):
        raise JobFolderError(
            "The job paints its previews with a refiner (model.refiner_name_or_path), which is not supported."
        )
    for name in spec.samples.required:
        if not model.get(name, True):
            raise JobFolderError(
                f"The job leaves out one of two text encoders (model.{name}), which is not supported."
            )
    return spec.id


def _dora_alpha(network: Mapping[str, Any]) -> float | None:
    if str(network.get("type", "")).lower() != "dora":
        return None
    alpha = network.get("linear_alpha", network.get("alpha", 1.0))  # the trainer's own default
    return None if alpha is None else _number(float, alpha, "network.linear_alpha")


def _process(folder: Path) -> tuple[Mapping[str, Any], str]:
    """The job's own block of its configuration, and its name."""
    path = next(
        (
            folder / name
            for name in ("config.yaml", ".job_config.json")
            if (folder / name).is_file()
        ),
        None,
    )
    if path is None:
        raise JobFolderError(
            f"{folder} has no config.yaml: it is not the output folder of an AI Toolkit job."
        )
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise JobFolderError(
                f"{path} has more than {MAX_CONFIG_BYTES:,} bytes: it is no AI Toolkit configuration."
            )
        text = path.read_text(encoding="utf-8")
        document = json.loads(text) if path.suffix == ".json" else _read_yaml(text)
    # PyYAML has the last three for a tag that its value does not fit.
    except (
        OSError,
        ValueError,
        yaml.YAMLError,
        RecursionError,
        ArithmeticError,
        AttributeError,
        LookupError,
    ) as error:
        raise JobFolderError(
            f"{path} cannot be read: {(str(error) or type(error).__name__).splitlines()[0]}."
        ) from error
    try:
        config = document["config"]
        process, name = config["process"][0], config["name"]
    except (TypeError, KeyError, IndexError):
        raise JobFolderError(
            f"{path} is no AI Toolkit configuration: it has no config.name and config.process."
        ) from None
    if not isinstance(process, dict) or not isinstance(name, str | int):
        raise JobFolderError(
            f"{path} is no AI Toolkit configuration: config.name or config.process holds nothing of use."
        )
    if len(str(name)) > _MAX_NAME_LENGTH:
        raise JobFolderError(
            f"{path} is no AI Toolkit configuration: config.name has more than {_MAX_NAME_LENGTH} characters."
        )
    # The trainer puts the job's name in the place of [name] everywhere before it reads anything; config.yaml is saved after that.
    named: Mapping[str, Any] = _with_name(process, str(name))
    return named, str(name)


def _read_yaml(text: str) -> Any:
    """A YAML document. Aliases are read, for the trainer writes some; but they must not stand for more than a configuration is.

    Raises:
        ValueError: they do, or one stands for what it is in, or a number is too long.
        yaml.YAMLError: it is not sound.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _weight(node, {}) > _MAX_WEIGHT:
            raise ValueError("its aliases stand for too much")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _weight(node: yaml.Node, known: dict[yaml.Node, int | None]) -> int:
    if node in known:
        weight = known[node]
        if weight is None:
            raise ValueError("one of its aliases stands for what it is in itself")
        return weight
    known[node] = None  # begun
    if isinstance(node, yaml.ScalarNode):
        if (
            node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
            and len(node.value) > _MAX_NUMBER_LENGTH
        ):
            raise ValueError(
                "one of its numbers is too long"
            )  # reading 1:1:1:1... takes the square of its length
        weight = len(node.value)
    elif isinstance(node, yaml.MappingNode):
        weight = sum(_weight(key, known) + _weight(value, known) for key, value in node.value)
    else:
        weight = sum(_weight(value, known) for value in node.value)
    known[node] = weight = weight + _NODE_WEIGHT
    return weight


def _with_name(value: Any, name: str) -> Any:
    if isinstance(value, str):
        return value.replace("[name]", name)
    if isinstance(value, dict):
        return {key: _with_name(inner, name) for key, inner in value.items()}
    return [_with_name(inner, name) for inner in value] if isinstance(value, list) else value


def _block(process: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    block = process.get(key) or {}
    if not isinstance(block, dict):
        raise JobFolderError(f"The job's {key} block is not a group of settings.")
    return block


def _number(kind: Callable[[Any], _Number], value: object, where: str) -> _Number:
    try:
        return kind(value)
    except (TypeError, ValueError, OverflowError):
        raise JobFolderError(
            f"The job's {where} is {value!r}, which is no number that can be used."
        ) from None


def _dtype(name: object, where: str) -> Dtype:
    if isinstance(name, str) and name in _DTYPES:
        return _DTYPES[name]
    raise JobFolderError(
        f"The job's {where} is {name!r}, which is no precision that is known here."
    )


def _items(sample: Mapping[str, Any]) -> list[SampleItem]:
    """The sample items, with the trainer's own defaults for files (not those of its user interface, which writes all)."""
    defaults = {
        "width": 512, "height": 512, "neg": False, "guidance_scale": 7, "guidance_rescale": 0, "sample_steps": 20,
        "network_multiplier": 1,
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
            "The job's sample block has samples or prompts that are not a list of items with a prompt each."
        )
    # The trainer takes an item's own value of all of these but one.
    rescale = {"guidance_rescale": block["guidance_rescale"]}
    return [
        _item(block | item | rescale, item.get("seed"), f"sample item {index}")
        for index, item in enumerate(raw)
    ]


def _item(values: Mapping[str, Any], seed: object, where: str) -> SampleItem:
    return SampleItem(
        prompt=values["prompt"],
        neg=str(values["neg"] or ""),
        width=_number(int, values["width"], f"{where}: width"),
        height=_number(int, values["height"], f"{where}: height"),
        seed=None if seed is None else _number(int, seed, f"{where}: seed"),
        guidance_scale=_number(float, values["guidance_scale"], f"{where}: guidance_scale"),
        sample_steps=_number(int, values["sample_steps"], f"{where}: sample_steps"),
        network_multiplier=_number(
            float, values["network_multiplier"], f"{where}: network_multiplier"
        ),
        guidance_rescale=_number(float, values["guidance_rescale"], f"{where}: guidance_rescale"),
    )


def _checkpoints(folder: Path, name: str, steps: int) -> dict[int, Path]:
    numbered = re.compile(re.escape(name) + r"_(\d{9})\.safetensors")
    found = {
        int(match[1]): path
        for path in folder.glob("*.safetensors")
        if (match := numbered.fullmatch(path.name))
    }
    final = folder / f"{name}.safetensors"
    return found | ({steps: final} if final.is_file() else {})


def _images(folder: Path) -> dict[tuple[int, int], Path]:
    images: dict[tuple[int, int], Path] = {}
    for path in sorted(
        folder.glob("*")
    ):  # by time: a sample that was painted twice counts as it was last
        if match := _SAMPLE_FILE.fullmatch(path.name):
            images[int(match["step"]), int(match["index"])] = path
    return images
