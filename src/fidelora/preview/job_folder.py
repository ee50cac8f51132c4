"""A training job's folder: what it was told to do, what it saved, and what it painted."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml

from fidelora.errors import JobFolderError
from fidelora.recipe import Dtype, Prediction

_DTYPES: Mapping[str, Dtype] = {
    "float32": "float32", "float": "float32", "fp32": "float32", "single": "float32",
    "bfloat16": "bfloat16", "bf16": "bfloat16",
    "float16": "float16", "fp16": "float16", "half": "float16",
}  # fmt: skip

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


@dataclass(frozen=True)
class TrainingJob:
    """What a job's folder says.

    Attributes:
        checkpoints: by step; the file of the last step is the one without a number.
        images: by step and index of the sample item.
        steps: how many the training was told to do; the last samples carry this number.
        seed, walk_seed: of the sample block.
    """

    folder: Path
    name: str
    trigger_word: str
    base_model: str
    dtype: Dtype
    vae_dtype: Dtype
    text_encoder_dtype: Dtype
    prediction: Prediction
    sampler: str
    seed: int
    walk_seed: bool
    image_format: str
    steps: int
    samples: tuple[SampleItem, ...]
    checkpoints: Mapping[int, Path]
    images: Mapping[tuple[int, int], Path]

    @property
    def sampled_steps(self) -> tuple[int, ...]:
        """The steps of which there are images, in order."""
        return tuple(sorted({step for step, _ in self.images}))


def read_job(folder: Path) -> TrainingJob:
    """Read the folder of a training job.

    Raises:
        JobFolderError: it is not one, or its configuration cannot be read.
    """
    if not folder.is_dir():
        raise JobFolderError(f"There is no folder {folder}; give the output folder of a training job.")
    process, name = _process(folder)
    train, model, sample = (_block(process, key) for key in ("train", "model", "sample"))
    base_model = model.get("name_or_path")
    if not isinstance(base_model, str):
        raise JobFolderError(f"The job in {folder} names no base model (model.name_or_path).")
    dtype = _dtype(train.get("dtype", "float32"), "train.dtype")
    steps = int(train.get("steps", 1000))
    return TrainingJob(
        folder=folder,
        name=name,
        trigger_word=str(process.get("trigger_word") or ""),
        base_model=base_model,
        dtype=dtype,
        vae_dtype=_dtype(model.get("vae_dtype", dtype), "model.vae_dtype"),
        text_encoder_dtype=_dtype(model.get("te_dtype", dtype), "model.te_dtype"),
        prediction="v_prediction" if model.get("is_v_pred") else "epsilon",
        sampler=str(sample.get("sampler", "ddpm")),
        seed=int(sample.get("seed", 0)),
        walk_seed=bool(sample.get("walk_seed", False)),
        image_format=str(sample.get("format", "jpg")),
        steps=steps,
        samples=tuple(_items(sample)),
        checkpoints=_checkpoints(folder, name, steps),
        images=_images(folder / "samples"),
    )


def _process(folder: Path) -> tuple[Mapping[str, Any], str]:
    """The job's own block of its configuration, and its name."""
    path = next((folder / name for name in ("config.yaml", ".job_config.json") if (folder / name).is_file()), None)
    if path is None:
        raise JobFolderError(f"{folder} has no config.yaml: it is not the output folder of an AI Toolkit job.")
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise JobFolderError(f"{path} cannot be read as YAML: {str(error).splitlines()[0]}.") from error
    try:
        config = document["config"]
        process = config["process"][0]
        name = config["name"]
    except (TypeError, KeyError, IndexError):
        raise JobFolderError(f"{path} is no AI Toolkit configuration: it has no config.name and config.process.") from None
    if not isinstance(process, dict):
        raise JobFolderError(f"{path} is no AI Toolkit configuration: config.process holds no settings.")
    meta_name = (document.get("meta") or {}).get("name")
    return process, str(name).replace("[name]", str(meta_name or name))


def _block(process: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    block = process.get(key) or {}
    if not isinstance(block, dict):
        raise JobFolderError(f"The job's {key} block is not a group of settings.")
    return block


def _dtype(name: object, where: str) -> Dtype:
    if str(name) in get_args(Dtype) or str(name) in _DTYPES:
        return _DTYPES[str(name)]
    raise JobFolderError(f"The job's {where} is {name!r}, which is no precision that is known here.")


def _items(sample: Mapping[str, Any]) -> list[SampleItem]:
    """The sample items, with the trainer's own defaults for files (not those of its user interface, which writes all)."""
    block = {"width": 512, "height": 512, "neg": False, "guidance_scale": 7, "sample_steps": 20, "network_multiplier": 1} | {
        key: value for key, value in sample.items() if key != "samples"
    }
    raw = sample.get("samples", [{"prompt": prompt} for prompt in sample.get("prompts") or []])
    items: list[SampleItem] = []
    for item in raw or []:
        values = block | {"seed": None} | item
        try:
            items.append(
                SampleItem(
                    prompt=str(values["prompt"]),
                    neg=str(values["neg"] or ""),
                    width=int(values["width"]),
                    height=int(values["height"]),
                    seed=None if values["seed"] is None else int(values["seed"]),
                    guidance_scale=float(values["guidance_scale"]),
                    sample_steps=int(values["sample_steps"]),
                    network_multiplier=float(values["network_multiplier"]),
                )
            )
        except (KeyError, TypeError, ValueError) as error:
            raise JobFolderError(f"Item {len(items)} of the job's sample block cannot be read: {error}.") from error
    return items


def _checkpoints(folder: Path, name: str, steps: int) -> dict[int, Path]:
    numbered = re.compile(re.escape(name) + r"_(\d{9})\.safetensors")
    found = {int(match[1]): path for path in folder.glob("*.safetensors") if (match := numbered.fullmatch(path.name))}
    final = folder / f"{name}.safetensors"
    return found | ({steps: final} if final.is_file() else {})


def _images(folder: Path) -> dict[tuple[int, int], Path]:
    images: dict[tuple[int, int], Path] = {}
    for path in sorted(folder.glob("*")):  # by time: a sample that was painted twice counts as it was last
        if match := _SAMPLE_FILE.fullmatch(path.name):
            images[int(match["step"]), int(match["index"])] = path
    return images
