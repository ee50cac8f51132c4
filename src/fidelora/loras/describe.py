"""Summaries of adapter files: kind, ranks, trigger, step.

Only headers are read, so that hundreds of files can be listed quickly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fidelora.adapters.formats import kind_of
from fidelora.adapters.tensor_names import modules_of
from fidelora.embedding_file import embedding_tensors, embedding_word, token_count
from fidelora.errors import AdapterError, WeightsFileError
from fidelora.safetensors_header import Header, read_file_header
from fidelora.texts import read_json

_TEXT_ENCODER = ("lora_te", "text_encoder", "text_model.", "te_", "clip_l.", "clip_g.")
_MAX_TEXT = 200  # characters of each text from the metadata
_MAX_STEP = 10**15  # larger numbers in metadata are not training steps


@dataclass(frozen=True)
class AdapterSummary:
    """Summary of an adapter's header.

    Attributes:
        kind: `lora`, `dora`, `lokr`, `loha`, `glora`, `oft`, `ia3`, `full`, `norm`, `embedding`,
            several of them joined by `+`; empty if the file is not an adapter.
        modules: number of modules of the base model that the adapter changes.
        ranks: distinct ranks, ascending; empty if no module has a rank (LoKr with whole factors).
        dtypes: dtypes of the tensors, spelled as in the file (`F16`, `BF16`, `F32`).
        text_encoder: True if the adapter also changes the text encoder.
        trigger: trigger word in the trainer's metadata, or the word of an embedding; empty if none.
        step, epoch: training step and epoch in the metadata; None if not in the metadata.
        base: version of the base model in the metadata (`sd_1.5`); empty if none.
        trainer: name and version of the program that wrote the file; empty if not in the metadata.
        problems: reasons why the file cannot be used, as sentences; only those that the header
            shows.
        tokens: number of tokens of an embedding; 0 for a file without an embedding.
    """

    kind: str
    modules: int
    ranks: tuple[int, ...]
    dtypes: tuple[str, ...]
    text_encoder: bool
    size_bytes: int
    trigger: str
    step: int | None
    epoch: int | None
    base: str
    trainer: str
    problems: tuple[str, ...]
    tokens: int = 0


def describe_adapter(path: Path) -> AdapterSummary:
    """Read the header of the file at `path`; errors become problems of the summary."""
    try:
        header = read_file_header(path)
    except WeightsFileError as error:
        size_bytes = path.stat().st_size if path.is_file() else 0
        return AdapterSummary(
            "", 0, (), (), False, size_bytes, "", None, None, "", "", (str(error),)
        )
    return describe_header(header, path.name)


def describe_header(header: Header, name: str) -> AdapterSummary:
    """Return the summary of a valid header; `name` is the name of the file in problems."""
    try:
        modules, problems = modules_of(header, name), ()
    except AdapterError as error:
        modules, problems = {}, (str(error),)  # type: ignore[assignment]
    metadata = header.metadata
    step, epoch = _training(metadata)
    kinds = {kind_of(parts) for parts in modules.values()}
    keys = [key for parts in modules.values() for key in parts.values()]
    if any("dora_scale" in parts for parts in modules.values()):
        kinds.add("dora")
    if not problems and (found := embedding_tensors(header).values()):
        kinds.add("embedding")
        keys += found
    return AdapterSummary(
        kind="+".join(sorted(kinds)),
        modules=len(modules),
        ranks=tuple(
            sorted(
                {rank for parts in modules.values() if (rank := _rank(parts, header)) is not None}
            )
        ),
        dtypes=tuple(sorted({header.tensors[key].dtype for key in keys})),
        text_encoder=any(module.startswith(_TEXT_ENCODER) for module in modules),
        size_bytes=header.file_bytes,
        trigger=(embedding_word(header, name) if not problems else None) or _trigger(metadata),
        step=step,
        epoch=epoch,
        base=metadata.get("ss_base_model_version", "")[:_MAX_TEXT],
        trainer=_software(metadata),
        problems=problems,
        tokens=0 if problems else token_count(header),
    )


def _rank(parts: Mapping[str, str], header: Header) -> int | None:
    """Return the inner dimension of a module's factors; None if it has whole factors."""
    if "a2" in parts:
        shapes = [header.tensors[parts[part]].shape for part in ("a1", "a2")]
        return min((number for shape in shapes for number in shape[:2]), default=None)
    for part in ("down", "lokr_w2_b", "lokr_w1_b", "hada_w1_b"):
        if part in parts and header.tensors[parts[part]].shape:
            return header.tensors[parts[part]].shape[0]
    return None


def _json(metadata: Mapping[str, str], field: str) -> dict[str, Any]:
    """Return the JSON object in a metadata field; an empty dict if the field has no JSON object."""
    try:
        value = read_json(metadata.get(field, "{}"))
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _training(metadata: Mapping[str, str]) -> tuple[int | None, int | None]:
    """Return step and epoch from AI Toolkit's `training_info`, else from kohya's fields.

    The trainer stores the step of an embedding in a field of its own.
    """
    info = _json(metadata, "training_info") or {
        "step": metadata.get("ss_steps", metadata.get("step")),
        "epoch": metadata.get("ss_epoch"),
    }
    return _whole_number(info.get("step")), _whole_number(info.get("epoch"))


def _whole_number(value: object) -> int | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value if abs(value) < _MAX_STEP else None
    return (
        int(value)
        if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 16
        else None
    )


def _trigger(metadata: Mapping[str, str]) -> str:
    """Return the trigger word; AI Toolkit stores it as the only tag of all training images."""
    names = ("ss_trigger_word", "trigger_word", "modelspec.trigger_phrase")
    if word := next(filter(None, (metadata.get(name, "").strip() for name in names)), ""):
        return word[:_MAX_TEXT]
    tags = _json(metadata, "ss_tag_frequency")
    words = [word for counts in tags.values() if isinstance(counts, dict) for word in counts]
    return words[0][:_MAX_TEXT] if len(words) == 1 else ""


def _software(metadata: Mapping[str, str]) -> str:
    software = _json(metadata, "software")
    name, version = software.get("name"), software.get("version")
    return " ".join(str(part) for part in (name, version) if part)[:_MAX_TEXT]
