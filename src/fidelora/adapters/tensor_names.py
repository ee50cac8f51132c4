"""What the keys of an adapter's file mean, strictly: every key has a meaning here, or the file is refused with the reason.

Keys are `<module>.<part>`. Which module of the base model `<module>` is, `targets.py` finds out; the parts tell the kind:

* LoRA: `lora_down.weight`, `lora_up.weight`, `alpha` (AI Toolkit, kohya), or `lora_A.weight`, `lora_B.weight` (PEFT);
* LoKr: `lokr_w1` or `lokr_w1_a` `lokr_w1_b`, `lokr_w2` or `lokr_w2_a` `lokr_w2_b`, `alpha`;
* LoHa: `hada_w1_a` `hada_w1_b` `hada_w2_a` `hada_w2_b`, `alpha` (LyCORIS);
* DoRA: `lora_down.weight`, `lora_up.weight`, `magnitude` (AI Toolkit, which writes no alpha then).

All of this is in the file's header: no tensor is read, and torch is not needed.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from fidelora.errors import AdapterFormatError, NonFiniteWeightsError, some
from fidelora.recipe import Noise
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
    "hada_w1_a": "hada_w1_a", "hada_w1_b": "hada_w1_b", "hada_w2_a": "hada_w2_a", "hada_w2_b": "hada_w2_b",
}  # fmt: skip

_REFUSED_PARTS = {
    "dora_scale": "is a DoRA in the form of kohya and LyCORIS, which is not supported; that of AI Toolkit (magnitude) is",
    "lora_magnitude_vector": "is a DoRA in the form of PEFT, which is not supported; that of AI Toolkit (magnitude) is",
    "lora_mid.weight": "uses the Tucker decomposition (lora_mid), which is not supported; export it without",
    "lokr_t2": "uses the Tucker decomposition (lokr_t2), which is not supported; export it without",
    "hada_t1": "uses the Tucker decomposition (hada_t1), which is not supported; export it without",
    "hada_t2": "uses the Tucker decomposition (hada_t2), which is not supported; export it without",
    "diff": "stores whole weight differences (diff), which is not supported; extract a LoRA from it",
    "diff_b": "stores whole bias differences (diff_b), which is not supported; extract a LoRA from it",
}

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
    """Module -> part -> key, with every key placed and every module complete.

    Raises:
        AdapterFormatError: sound, but not an adapter of a kind that can be applied; `name` is what the message calls the file.
    """
    _check_header(header, name)
    return _group(header, name)


def kind_of(parts: Iterable[str]) -> str:
    """`lora`, `dora`, `lokr` or `loha`: what a module with these parts is."""
    return _KINDS[frozenset(parts) - {"alpha"}]


def trainer_version(metadata: Mapping[str, str]) -> tuple[int, ...] | None:
    """The version of AI Toolkit that wrote a file, from its `software` metadata; None if another program or none is named."""
    try:
        software = json.loads(metadata.get("software", "null"))
        if software["name"] != "ai-toolkit":
            return None
        return tuple(int(number) for number in re.findall(r"\d+", software["version"])[:3]) or None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def noise_of_trainer(metadata: Mapping[str, str]) -> Noise:
    """How previews beside this file drew their half-precision noise: trainers before 0.11.2 came with torch <= 2.11."""
    version = trainer_version(metadata)
    return "legacy" if version is not None and version < (0, 11, 2) else "modern"


def noise_of_file(path: Path) -> Noise:
    """`noise_of_trainer` of an adapter's file.

    Raises:
        WeightsFileError: it is not a sound .safetensors file.
    """
    return noise_of_trainer(read_file_header(path).metadata)


def _check_header(header: Header, name: str) -> None:
    if header.file_bytes > MAX_ADAPTER_BYTES:
        raise AdapterFormatError(
            f"{name} has {header.file_bytes:,} bytes: it is a whole model rather than an adapter."
        )
    if not header.tensors:
        raise AdapterFormatError(
            f"{name} holds no tensors at all: nothing was saved in it; export it again."
        )
    if "emb_params" in header.tensors:
        raise AdapterFormatError(
            f"{name} is a textual-inversion embedding, not a LoRA; embeddings are not supported yet."
        )
    for key, info in header.tensors.items():
        if info.dtype not in _FLOATS and not key.endswith(".alpha"):
            raise AdapterFormatError(
                f"{name} stores {key} as {info.dtype}; only F16, BF16, F32 and F64 are accepted."
            )
        if 0 in info.shape or (key.endswith(".alpha") and math.prod(info.shape) != 1):
            raise AdapterFormatError(
                f"{name} gives {key} the shape {list(info.shape)}, which means nothing for it."
            )


def _group(header: Header, name: str) -> dict[str, dict[str, str]]:
    """Module -> part -> key, with every key placed and every module complete."""
    modules: dict[str, dict[str, str]] = defaultdict(dict)
    unknown: list[str] = []
    for key in header.tensors:
        if refused := _ending(key, _REFUSED_PARTS):
            raise AdapterFormatError(f"{name} {_REFUSED_PARTS[refused]} ({key}).")
        ending = _ending(key, _PARTS)
        if ending is None:
            unknown.append(key)
            continue
        module, part = key.removesuffix("." + ending), _PARTS[ending]
        if part in modules[module]:
            raise AdapterFormatError(
                f"{name} gives {module} two tensors for the same part ({modules[module][part]} and {key})."
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
            else "has keys that no adapter format here knows"
        )
        raise AdapterFormatError(f"{name} {what}: {some(unknown)}.")
    for module, parts in modules.items():
        if frozenset(parts) - {"alpha"} not in _KINDS:
            raise AdapterFormatError(
                f"{name} is incomplete at {module}: it has only {some(sorted(parts.values()))}."
            )
    return dict(modules)


def _ending(key: str, endings: Iterable[str]) -> str | None:
    return next((ending for ending in endings if key.endswith("." + ending)), None)


def peft_alpha(metadata: Mapping[str, str], name: str) -> float | None:
    """The alpha that PEFT keeps for all modules in the metadata, where kohya keeps one beside each module; None: as the rank."""
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
            f"{name} has lora_adapter_metadata that cannot be read: export it again."
        ) from error
    if variants:
        raise AdapterFormatError(
            f"{name} says {variants[0]} in its PEFT metadata: that kind of LoRA is not supported."
        )
    if not all(map(math.isfinite, alphas)):
        raise NonFiniteWeightsError(
            f"{name} has an alpha that is no finite number in its PEFT metadata; export it again."
        )
    if patterns or len(alphas) > 1:
        raise AdapterFormatError(
            f"{name} has different alphas for different modules in its PEFT metadata; that is not supported."
        )
    return alphas.pop() if alphas else None
