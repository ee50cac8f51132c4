"""Configuration file of a training run: reading it safely, its training process, and values."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import yaml

from fidelora.errors import TrainingRunError
from fidelora.recipe import Dtype
from fidelora.training.folder_hints import MAX_LISTED_FILES, config_advice

CONFIG_NAMES = ("config.yaml", ".job_config.json")
"""File names of the configuration, the preferred one first."""

MAX_CONFIG_BYTES = 2**20  # the trainer's configurations have a few thousand bytes
_MAX_EXPANDED_SIZE = 4 * 2**20  # characters of a YAML document with all aliases expanded
_NODE_SIZE = 16  # characters that each value adds to the expanded size, besides its text
_MAX_VALUES = 20_000  # keys and values of a YAML document; parsing one takes about 40 microseconds
_MAX_NUMBER_LENGTH = 100  # characters; parsing 1:1:1:1... takes quadratic time
MAX_NAME_LENGTH = 200  # characters; the name is part of file names and replaces every [name]

_TRAINER_BLOCKS = (("model", "sample", "train"), ("model", "sample"), ("model",))
"""Sets of blocks by which a training process is recognised, the strictest set first. Processes that
only generate images have no `train` block."""

# PyYAML raises the last three types if a value does not match its tag.
_READ_ERRORS = (
    OSError,
    ValueError,
    yaml.YAMLError,
    RecursionError,
    ArithmeticError,
    AttributeError,
    LookupError,
)


_DTYPES: Mapping[str, Dtype] = {
    "float32": "float32", "float": "float32", "fp32": "float32", "single": "float32",
    "bfloat16": "bfloat16", "bf16": "bfloat16",
    "float16": "float16", "fp16": "float16", "half": "float16",
}  # fmt: skip

_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True)
class RunConfig:
    """The configuration of a training run.

    Attributes:
        process: the training process, with `[name]` replaced everywhere.
        name: name of the run.
        notes: sentences about the choice of the process; empty if there was no choice.
    """

    process: Mapping[str, Any]
    name: str
    notes: tuple[str, ...] = ()


def read_config(folder: Path) -> RunConfig:
    """Read the configuration in a run folder.

    Raises:
        TrainingRunError: the configuration is missing, unreadable, or without a training process.
    """
    path, named = _find_config(folder)
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise TrainingRunError(
                f"{path} is not an AI Toolkit configuration: "
                f"it has more than {MAX_CONFIG_BYTES:,} bytes."
            )
        document = _read_document(path)
    except _READ_ERRORS as error:
        raise TrainingRunError(f"{path} cannot be read: {_reason(error, path)}.") from error
    try:
        config = document["config"]
        processes, name = config["process"], config["name"]
        first = processes[0]
    except (TypeError, KeyError, IndexError):
        raise TrainingRunError(
            f"{path} is not an AI Toolkit configuration: config.name or config.process is missing."
        ) from None
    if not isinstance(name, str | int) or not isinstance(processes, list):
        raise TrainingRunError(
            f"{path} is not an AI Toolkit configuration: config.name or config.process is invalid."
        )
    if len(str(name)) > MAX_NAME_LENGTH:
        raise TrainingRunError(
            f"{path} is not an AI Toolkit configuration: "
            f"config.name has more than {MAX_NAME_LENGTH} characters."
        )
    process, notes = (first, ()) if len(processes) == 1 else _training_process(path, processes)
    if not isinstance(process, dict):
        raise TrainingRunError(
            f"{path} is not an AI Toolkit configuration: config.name or config.process is invalid."
        )
    # The trainer replaces [name] everywhere before it reads anything. It saves config.yaml after
    # that, but .job_config.json is written before.
    replaced: Mapping[str, Any] = _replace_name(process, str(name))
    return RunConfig(replaced, str(name), (*named, *notes))


def _find_config(folder: Path) -> tuple[Path, tuple[str, ...]]:
    """Return the configuration in a folder, and a note if it does not have the trainer's name.

    Raises:
        TrainingRunError: the folder has no configuration, or several and none has the trainer's
            name.
    """
    for name in CONFIG_NAMES:
        if (folder / name).is_file():
            return folder / name, ()
    others = sorted(
        path
        for path in islice(folder.iterdir(), MAX_LISTED_FILES)
        if path.is_file() and _is_config_name(path)
    )
    if len(others) == 1:
        note = f"The folder has no config.yaml, so the configuration is read from {others[0].name}."
        return others[0], (note,)
    raise TrainingRunError(
        f"{folder} has no config.yaml; give the output folder of an AI Toolkit training run."
        + config_advice(folder, [path.name for path in others])
    )


def _is_config_name(path: Path) -> bool:
    """Return True if a file can be a copy of a configuration under another name."""
    name = path.name.lower()
    is_json = name in ("config.json", "job_config.json")
    is_yaml = name.endswith((".yaml", ".yml", ".yaml.txt")) and name != "aitk_meta.yaml"
    return is_json or is_yaml


def read_yaml(text: str) -> Any:
    """Parse a YAML document with limits on its number of values and its expanded aliases.

    Aliases cannot be rejected altogether, because the trainer writes some.

    Raises:
        ValueError: the document has too many values, the expanded document or a number is too long,
            or an alias is recursive.
        yaml.YAMLError: the document is invalid.
    """
    loader = _LimitedLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _expanded_size(node, {}) > _MAX_EXPANDED_SIZE:
            raise ValueError("its expanded aliases are too long")
        return loader.construct_document(node)
    finally:
        loader.dispose()


class _LimitedLoader(yaml.SafeLoader):
    """A loader that stops at too many values, because parsing them would take seconds."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._values = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._values += 1
        if self._values > _MAX_VALUES:
            raise ValueError(f"it has more than {_MAX_VALUES:,} values")
        return super().compose_node(parent, index)


def read_small_yaml(path: Path) -> Any:
    """Return the content of a YAML file; None if it is missing, too large or invalid."""
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            return None
        return read_yaml(path.read_text(encoding="utf-8-sig"))
    except _READ_ERRORS:
        return None


def _read_document(path: Path) -> Any:
    text = _decoded(path.read_bytes())
    return json.loads(text) if path.suffix.lower() == ".json" else read_yaml(text)


def _decoded(content: bytes) -> str:
    """Return the text of a configuration in UTF-8, or in UTF-16 with a byte order mark."""
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if is_utf16 else "utf-8-sig")


def _reason(error: Exception, path: Path) -> str:
    """Return the reason why a file cannot be read, with the line where that is known."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        mark = error.problem_mark
        advice = ""
        if "escape" in error.problem:  # of "C:\\Users"
            advice = "; write Windows paths without quotes, or with / instead of \\"
        return f"{error.problem} (line {mark.line + 1}, column {mark.column + 1}){advice}"
    if isinstance(error, yaml.reader.ReaderError):
        before = _decoded(path.read_bytes())[: error.position]
        if "\0" in before + chr(error.character):
            return "it is not UTF-8 text; save it as UTF-8"
        line = before.count("\n") + 1
        return f"{str(error).splitlines()[0]} (line {line})"
    if isinstance(error, UnicodeDecodeError):
        line = error.object[: error.start].count(b"\n") + 1
        return f"it is not UTF-8 text (line {line}); save it as UTF-8"
    return (str(error) or type(error).__name__).splitlines()[0]


def _training_process(path: Path, processes: list[Any]) -> tuple[Any, tuple[str, ...]]:
    """Return the training process of a configuration with several processes, and notes on it.

    All processes of a configuration use the same output folder. If several of them train, the last
    one wrote the newest files.

    Raises:
        TrainingRunError: no process trains a model.
    """
    trainers: list[int] = []
    for blocks in _TRAINER_BLOCKS:
        trainers = [
            index
            for index, process in enumerate(processes)
            if isinstance(process, dict) and all(process.get(block) for block in blocks)
        ]
        if trainers:
            break
    if not trainers:
        kinds = ", ".join(f"process {_title(processes, index)}" for index in range(len(processes)))
        raise TrainingRunError(
            f"{path} has no process with a model block ({kinds}), so it is not the configuration "
            "of a training run; give the output folder of a training run."
        )
    if len(trainers) == 1:
        return processes[trainers[0]], ()
    listed = ", ".join(_title(processes, index) for index in trainers)
    note = (
        f"The configuration has {len(trainers)} training processes: {listed}. "
        f"The settings of the last one, process {trainers[-1] + 1}, are used for all samples."
    )
    return processes[trainers[-1]], (note,)


def _title(processes: list[Any], index: int) -> str:
    process = processes[index]
    kind = process.get("type") if isinstance(process, dict) else None
    return f"{index + 1} (type {kind})" if isinstance(kind, str) else f"{index + 1}"


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
    """Replace `[name]` in all values, and turn all keys to text, as they are in JSON."""
    if isinstance(value, str):
        return value.replace("[name]", name)
    if isinstance(value, dict):
        return {str(key): _replace_name(inner, name) for key, inner in value.items()}
    return [_replace_name(inner, name) for inner in value] if isinstance(value, list) else value


def block_of(process: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return a block of the process; empty if it is missing.

    Raises:
        TrainingRunError: it is not a mapping.
    """
    block = process.get(key) or {}
    if not isinstance(block, dict):
        raise TrainingRunError(f"The {key} block of the configuration must be a mapping.")
    return block


def number_of(kind: Callable[[Any], _Number], value: object, where: str) -> _Number:
    """Convert a value to a number.

    Args:
        where: the setting, for the error message.

    Raises:
        TrainingRunError: the value is not a number.
    """
    try:
        return kind(value)
    except (TypeError, ValueError, OverflowError):
        raise TrainingRunError(
            f"The configuration has {where} {value!r}, which is not a usable number."
        ) from None


def dtype_of(name: object, where: str) -> Dtype:
    """Return the dtype that the trainer's name means.

    Args:
        where: the setting, for the error message.

    Raises:
        TrainingRunError: the name is not that of a supported dtype.
    """
    if isinstance(name, str) and name in _DTYPES:
        return _DTYPES[name]
    raise TrainingRunError(
        f"The configuration has {where} {name!r}, which is not supported; "
        "use float32, bfloat16 or float16."
    )
