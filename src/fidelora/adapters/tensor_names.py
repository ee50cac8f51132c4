"""Strict parsing of the keys of adapter files: a file with an unknown key is refused.

Keys are `<module>.<part>`. `targets.py` finds the base model's module; the parts define the kind:

* LoRA: `lora_down.weight`, `lora_up.weight`, `alpha` (AI Toolkit, kohya), or `lora_A.weight`,
  `lora_B.weight` (PEFT);
* LoKr: `lokr_w1` or `lokr_w1_a` `lokr_w1_b`, `lokr_w2` or `lokr_w2_a` `lokr_w2_b`, `alpha`;
* LoHa: `hada_w1_a` `hada_w1_b` `hada_w2_a` `hada_w2_b`, `alpha` (LyCORIS);
* DoRA: `lora_down.weight`, `lora_up.weight`, `magnitude` (AI Toolkit, which writes no alpha then).

Only the header is used, and no torch.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from fidelora.errors import AdapterFormatError, NonFiniteWeightsError, some
from fidelora.recipe import AdapterRef, Noise
from fidelora.safetensors_header import Header, read_file_header

MAX_ADAPTER_BYTES = 4 * 2**30
_FLOATS = {"F16", "BF16", "F32", "F64"}

_PARTS = {
    "alpha": "alpha",
    "lora_down.weight": "down", "lora_A.weight": "down", "lora_A.default.weight": "down",
    "lora_up.weight": "up", "lora_B.weight": "up", "lora_B.default.weight": "up",
    "lokr_w1": "lokr_w1", "lokr_w1_a": "lokr_w1_a", "lokr_w1_b": "lokr_w1_b",
    "lokr_w2": "lokr_w2", "lokr_w2_a": "lokr_w2_a", "lokr_w2_b": "lokr_w2_b",
    "magnitude": "magnitude",
    "hada_w1_a": "hada_w1_a", "hada_w1_b": "hada_w1_b",
    "hada_w2_a": "hada_w2_a", "hada_w2_b": "hada_w2_b",
}  # fmt: skip

_DORA = "which is not supported; only that of AI Toolkit (magnitude) is"
_TUCKER = "uses the Tucker decomposition ({}), which is not supported; export it without"
_REFUSED_PARTS = {
    "dora_scale": f"is a DoRA in the format of kohya and LyCORIS, {_DORA}",
    "lora_magnitude_vector": f"is a DoRA in the format of PEFT, {_DORA}",
    "lora_mid.weight": _TUCKER.format("lora_mid"),
    "lokr_t2": _TUCKER.format("lokr_t2"),
    "hada_t1": _TUCKER.format("hada_t1"),
    "hada_t2": _TUCKER.format("hada_t2"),
    "diff": "stores weight differences (diff), which is not supported; extract a LoRA from it",
    "diff_b": "stores bias differences (diff_b), which is not supported; extract a LoRA from it",
}
"""Suffixes of known formats that are not supported, and the error message."""

_KINDS = {
    frozenset({"down", "up"}): "lora",
    frozenset({"down", "up", "magnitude"}): "dora",
    frozenset({"lokr_w1", "lokr_w2"}): "lokr",
    frozenset({"lokr_w1", "lokr_w2_a", "lokr_w2_b"}): "lokr",
    frozenset({"lokr_w1_a", "lokr_w1_b", "lokr_w2"}): "lokr",
    frozenset({"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"}): "lokr",
    frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}): "loha",
}


def modules_of(header: Header, name: str) -> dict[str, dict[str, str]]:
    """Return module -> part -> key; every key is assigned and every module is complete.

    Args:
        name: name of the file in error messages.

    Raises:
        AdapterFormatError: the file is not an adapter of a supported kind.
    """
    _check_header(header, name)
    return _group(header, name)


def kind_of(parts: Iterable[str]) -> str:
    """Return the kind of a module with these parts: `lora`, `dora`, `lokr` or `loha`."""
    return _KINDS[frozenset(parts) - {"alpha"}]


def trainer_version(metadata: Mapping[str, str]) -> tuple[int, ...] | None:
    """Return AI Toolkit's version in the `software` metadata; None if another program wrote it."""
    try:
        software = json.loads(metadata.get("software", "null"))
        if software["name"] != "ai-toolkit":
            return None
        return tuple(int(number) for number in re.findall(r"\d+", software["version"])[:3]) or None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def noise_of_trainer(metadata: Mapping[str, str]) -> Noise:
    """Return how the trainer of this file drew half-precision noise for its samples.

    Trainers before 0.11.2 came with torch <= 2.11.
    """
    version = trainer_version(metadata)
    return "legacy" if version is not None and version < (0, 11, 2) else "modern"


def noise_of_file(path: Path) -> Noise:
    """Return `noise_of_trainer` for an adapter file.

    Raises:
        WeightsFileError: it is not a sound .safetensors file.
    """
    return noise_of_trainer(read_file_header(path).metadata)


def noise_of_adapter(ref: AdapterRef) -> Noise:
    """Return `noise_of_trainer` for an adapter, without opening its file again if `ref` has it.

    Without file and path it is `modern`.

    Raises:
        WeightsFileError: its file is not a sound .safetensors file.
    """
    if ref.file is not None and ref.file.sha256 == ref.sha256:
        return noise_of_trainer(ref.file.header.metadata)
    return noise_of_file(ref.path) if ref.path else "modern"


def _check_header(header: Header, name: str) -> None:
    if header.file_bytes > MAX_ADAPTER_BYTES:
        raise AdapterFormatError(
            f"{name} has {header.file_bytes:,} bytes: it is a whole model, not an adapter."
        )
    if not header.tensors:
        raise AdapterFormatError(f"{name} has no tensors; export it again.")
    if "emb_params" in header.tensors:
        raise AdapterFormatError(
            f"{name} is a textual-inversion embedding, not a LoRA; embeddings are not supported."
        )
    for key, info in header.tensors.items():
        if info.dtype not in _FLOATS and not key.endswith(".alpha"):
            raise AdapterFormatError(
                f"{name} stores {key} as {info.dtype}; only F16, BF16, F32 and F64 are accepted."
            )
        if 0 in info.shape or (key.endswith(".alpha") and math.prod(info.shape) != 1):
            raise AdapterFormatError(
                f"{name} gives {key} the shape {list(info.shape)}, which is not valid for it."
            )


def _group(header: Header, name: str) -> dict[str, dict[str, str]]:
    modules: dict[str, dict[str, str]] = defaultdict(dict)
    unknown: list[str] = []
    for key in header.tensors:
        if refused := _suffix(key, _REFUSED_PARTS):
            raise AdapterFormatError(f"{name} {_REFUSED_PARTS[refused]} ({key}).")
        suffix = _suffix(key, _PARTS)
        if suffix is None:
            unknown.append(key)
            continue
        module, part = key.removesuffix("." + suffix), _PARTS[suffix]
        if part in modules[module]:
            raise AdapterFormatError(
                f"{name} gives {module} two tensors for the same part: "
                f"{modules[module][part]} and {key}."
            )
        modules[module][part] = key

    if unknown:
        looks_whole = any(
            key.startswith(("model.diffusion_model.", "cond_stage_model.", "down_blocks."))
            for key in unknown
        )
        what = (
            "is a whole model, not an adapter"
            if looks_whole
            else "has keys of no supported adapter format"
        )
        raise AdapterFormatError(f"{name} {what}: {some(unknown)}.")
    for module, parts in modules.items():
        if frozenset(parts) - {"alpha"} not in _KINDS:
            raise AdapterFormatError(
                f"{name} is incomplete at {module}: it has only {some(sorted(parts.values()))}."
            )
    return dict(modules)


def _suffix(key: str, suffixes: Iterable[str]) -> str | None:
    return next((suffix for suffix in suffixes if key.endswith("." + suffix)), None)


def peft_alpha(metadata: Mapping[str, str], name: str) -> float | None:
    """Return the alpha of all modules in PEFT's metadata; None if there is none (alpha = rank).

    kohya stores one alpha per module instead.

    Raises:
        AdapterFormatError: the metadata cannot be read, or describes an unsupported variant.
        NonFiniteWeightsError: the alpha is not finite.
    """
    if "lora_adapter_metadata" not in metadata:
        return None
    try:
        config = json.loads(metadata["lora_adapter_metadata"])
        variants = [
            key
            for key, value in config.items()
            if key.endswith(("use_rslora", "use_dora")) and value
        ]
        patterns = [
            key
            for key, value in config.items()
            if key.endswith(("alpha_pattern", "rank_pattern")) and value
        ]
        alphas = {float(value) for key, value in config.items() if key.endswith("lora_alpha")}
    except (AttributeError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise AdapterFormatError(
            f"{name} has lora_adapter_metadata that cannot be read; export it again."
        ) from error
    if variants:
        raise AdapterFormatError(
            f"{name} has {variants[0]} in its PEFT metadata; that kind of LoRA is not supported."
        )
    if not all(map(math.isfinite, alphas)):
        raise NonFiniteWeightsError(
            f"{name} has an alpha in its PEFT metadata that is not finite; export it again."
        )
    if patterns or len(alphas) > 1:
        raise AdapterFormatError(
            f"{name} has several alphas in its PEFT metadata, which is not supported."
        )
    return alphas.pop() if alphas else None
