"""Run folders of AI Toolkit: configuration, checkpoints and samples of a training run."""

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

MAX_CONFIG_BYTES = 2**20  # the trainer's configurations have a few thousand bytes
_MAX_EXPANDED_SIZE = 4 * 2**20  # characters of a YAML document with all aliases expanded
_NODE_SIZE = 16  # characters that each value adds to the expanded size, besides its text
_MAX_NUMBER_LENGTH = 100  # characters; parsing 1:1:1:1... takes quadratic time
_MAX_NAME_LENGTH = 200  # characters; the name is part of file names and replaces every [name]

_Number = TypeVar("_Number", int, float)

_SAMPLE_FILE = re.compile(r"\d+__(?P<step>\d{9})_(?P<index>\d+)\.(jpg|jpeg|png|webp)")


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
        steps: configured training steps; the last samples and the last checkpoint have this step.
        checkpoints: by step; the file of the last step has no number in its name.
        images: samples, by step and index of the sample item.
        dora_alpha: alpha of a DoRA, which its file does not contain; None for other adapter types
            or if unknown.
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
        """Steps with samples, in ascending order."""
        return tuple(sorted({step for step, _ in self.images}))

    def adapter(self, step: int) -> AdapterRef:
        """Return the adapter of the checkpoint of a step.

        Raises:
            WeightsFileError: the file is invalid or cannot be read.
        """
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
    process, name = _read_config(folder)
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
    for name in spec.samples.required:
        if not model.get(name, True):
            raise JobFolderError(
                f"The training run omits one of two text encoders (model.{name}), "
                "which is not supported."
            )
    return spec.id


def _dora_alpha(network: Mapping[str, Any]) -> float | None:
    if str(network.get("type", "")).lower() != "dora":
        return None
    alpha = network.get("linear_alpha", network.get("alpha", 1.0))  # the trainer's own default
    return None if alpha is None else _number(float, alpha, "network.linear_alpha")


def _read_config(folder: Path) -> tuple[Mapping[str, Any], str]:
    """Return the process block of the configuration, and the name of the run."""
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
            f"{folder} has no config.yaml; set the output folder of an AI Toolkit training run."
        )
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise JobFolderError(
                f"{path} is not an AI Toolkit configuration: "
                f"it has more than {MAX_CONFIG_BYTES:,} bytes."
            )
        text = path.read_text(encoding="utf-8")
        document = json.loads(text) if path.suffix == ".json" else _read_yaml(text)
    # PyYAML raises the last three types if a value does not match its tag.
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
            f"{path} is not an AI Toolkit configuration: config.name or config.process is missing."
        ) from None
    if not isinstance(process, dict) or not isinstance(name, str | int):
        raise JobFolderError(
            f"{path} is not an AI Toolkit configuration: config.name or config.process is invalid."
        )
    if len(str(name)) > _MAX_NAME_LENGTH:
        raise JobFolderError(
            f"{path} is not an AI Toolkit configuration: "
            f"config.name has more than {_MAX_NAME_LENGTH} characters."
        )
    # The trainer replaces [name] everywhere before it reads anything. It saves config.yaml after
    # that, but .job_config.json is written before.
    named: Mapping[str, Any] = _replace_name(process, str(name))
    return named, str(name)


def _read_yaml(text: str) -> Any:
    """Parse a YAML document with a limit on the size of its expanded aliases.

    Aliases cannot be rejected altogether, because the trainer writes some.

    Raises:
        ValueError: the expanded document or a number is too long, or an alias is recursive.
        yaml.YAMLError: the document is invalid.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _expanded_size(node, {}) > _MAX_EXPANDED_SIZE:
            raise ValueError("its expanded aliases are too long")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _expanded_size(node: yaml.Node, sizes: dict[yaml.Node, int | None]) -> int:
    """Return the size of a node with its aliases expanded; `sizes` caches it by node."""
    if node in sizes:
        size = sizes[node]
        if size is None:
            raise ValueError("one of its aliases is recursive")
        return size
    sizes[node] = None  # in progress
    if isinstance(node, yaml.ScalarNode):
        is_number = node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
        if is_number and len(node.value) > _MAX_NUMBER_LENGTH:
            raise ValueError("one of its numbers is too long")
        size = len(node.value)
    elif isinstance(node, yaml.MappingNode):
        size = sum(
            _expanded_size(key, sizes) + _expanded_size(value, sizes) for key, value in node.value
        )
    else:
        size = sum(_expanded_size(value, sizes) for value in node.value)
    sizes[node] = size = size + _NODE_SIZE
    return size


def _replace_name(value: Any, name: str) -> Any:
    if isinstance(value, str):
        return value.replace("[name]", name)
    if isinstance(value, dict):
        return {key: _replace_name(inner, name) for key, inner in value.items()}
    return [_replace_name(inner, name) for inner in value] if isinstance(value, list) else value


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


def _items(sample: Mapping[str, Any]) -> list[SampleItem]:
    """Return the sample items, with the trainer's defaults for configuration files.

    The trainer's user interface has other defaults, but writes all values.
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
            "sample.samples or sample.prompts is not a list of items with a prompt each; "
            "correct the configuration."
        )
    # The trainer ignores guidance_rescale of an item.
    rescale = {"guidance_rescale": block["guidance_rescale"]}
    return [
        _item(block | item | rescale, item.get("seed"), f"sample.samples[{index}]")
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
    # File names begin with a timestamp: the last image of a sample replaces earlier ones.
    for path in sorted(folder.glob("*")):
        if match := _SAMPLE_FILE.fullmatch(path.name):
            images[int(match["step"]), int(match["index"])] = path
    return images
