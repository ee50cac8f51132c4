"""Strict parsing of the keys of adapter files: a file with an unknown key is refused.

Keys are `<module>.<part>`. `targets.py` finds the base model's module; the parts define the kind:

* LoRA: `lora_down.weight`, `lora_up.weight`, `alpha` (AI Toolkit, kohya), or `lora_A.weight`,
  `lora_B.weight` (PEFT);
* LoKr: `lokr_w1` or `lokr_w1_a` `lokr_w1_b`, `lokr_w2` or `lokr_w2_a` `lokr_w2_b`, `alpha`;
* LoHa: `hada_w1_a` `hada_w1_b` `hada_w2_a` `hada_w2_b`, `alpha` (LyCORIS);
* DoRA: `lora_down.weight`, `lora_up.weight`, `magnitude` (AI Toolkit, which stores no alpha of a
  DoRA).

The tensors of a textual-inversion embedding have fixed keys without a module (`embedding_file.py`).
A file contains an embedding, modules, or both.

This module uses only the header of a file, and does not import torch.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from fidelora.embedding_file import EMBEDDING_KEYS, MAX_TOKENS, token_count, tokens_of
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

_DORA = "which is not supported; use a DoRA in the format of AI Toolkit (magnitude)"
_TUCKER = "uses the Tucker decomposition ({}), which is not supported; export the LoRA without it"
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
"""Key suffixes of known formats that are not supported, and the end of the error message."""

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
    """Return the keys by module and part: `{module: {part: key}}`; empty for an embedding.

    Every key of the file is assigned to a part, and every module is complete. The keys of an
    embedding belong to no module.

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


def trigger_text(adapters: Iterable[AdapterRef], trigger: str) -> str:
    """Return the text that replaces `[trigger]` in prompts of images with these adapters.

    If `trigger` is the word of an embedding, the text consists of all tokens of that embedding, as
    in the trainer: `sks sks_1 sks_2`. If `trigger` is empty, the first embedding is used. Any other
    trigger is returned unchanged.

    Raises:
        WeightsFileError: the embedding's file is not a valid .safetensors file.
    """
    for ref in adapters:
        if ref.word is not None and trigger in ("", ref.word):
            if ref.file is not None and ref.file.sha256 == ref.sha256:
                header = ref.file.header
            elif ref.path is not None:
                header = read_file_header(ref.path)
            else:
                return ref.word
            return " ".join(tokens_of(ref.word, token_count(header)))
    return trigger


def trainer_version(metadata: Mapping[str, str]) -> tuple[int, ...] | None:
    """Return the version of AI Toolkit in the `software` metadata; None for other programs."""
    try:
        software = json.loads(metadata.get("software", "null"))
        if software["name"] != "ai-toolkit":
            return None
        return tuple(int(number) for number in re.findall(r"\d+", software["version"])[:3]) or None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def noise_of_trainer(metadata: Mapping[str, str]) -> Noise:
    """Return the kind of half-precision noise that the trainer of this file drew for its samples.

    AI Toolkit before 0.11.2 came with torch <= 2.11, which draws `legacy` noise.
    """
    version = trainer_version(metadata)
    return "legacy" if version is not None and version < (0, 11, 2) else "modern"


def noise_of_file(path: Path) -> Noise:
    """Return `noise_of_trainer` for an adapter file.

    Raises:
        WeightsFileError: the file is not a valid .safetensors file.
    """
    return noise_of_trainer(read_file_header(path).metadata)


def noise_of_adapter(ref: AdapterRef) -> Noise:
    """Return `noise_of_trainer` for an adapter; `modern` if `ref` has neither a file nor a path.

    The file is not opened again if `ref.file` is set.

    Raises:
        WeightsFileError: the adapter's file is not a valid .safetensors file.
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
    for key, info in header.tensors.items():
        if info.dtype not in _FLOATS and not key.endswith(".alpha"):
            raise AdapterFormatError(
                f"{name} stores {key} as {info.dtype}; only F16, BF16, F32 and F64 are accepted."
            )
        if 0 in info.shape or (key.endswith(".alpha") and math.prod(info.shape) != 1):
            raise AdapterFormatError(
                f"{name} has the tensor {key} with the shape {list(info.shape)}, which is not "
                "valid; export it again."
            )

    _check_embedding(header, name)


def _check_embedding(header: Header, name: str) -> None:
    found = {key: info.shape for key, info in header.tensors.items() if key in EMBEDDING_KEYS}
    if any(not 1 <= len(shape) <= 2 for shape in found.values()):
        raise AdapterFormatError(
            f"{name} has an embedding of the shape {list(next(iter(found.values())))}; the shape "
            "must be [tokens, width]."
        )
    counts = {shape[0] if len(shape) == 2 else 1 for shape in found.values()}
    if len(counts) > 1 or max(counts, default=0) > MAX_TOKENS:
        raise AdapterFormatError(
            f"{name} has an embedding of {' and '.join(map(str, sorted(counts)))} tokens; an "
            f"embedding has the same number for all text encoders, at most {MAX_TOKENS}."
        )
    bundled = next((key for key in header.tensors if key.startswith("bundle_emb.")), None)
    if bundled is not None:
        raise AdapterFormatError(
            f"{name} contains an embedding in the format of kohya ({bundled}), which is not "
            "supported; save the embedding as a file of its own, with the tensor emb_params."
        )
    key, info = next(iter(header.tensors.items()))
    if len(header.tensors) == 1 and "." not in key and not found and 1 <= len(info.shape) <= 2:
        raise AdapterFormatError(
            f"{name} is an embedding in the format of diffusers (its only tensor is {key}), which "
            "is not supported; rename the tensor to emb_params."
        )


def _group(header: Header, name: str) -> dict[str, dict[str, str]]:
    modules: dict[str, dict[str, str]] = defaultdict(dict)
    unknown: list[str] = []
    for key in header.tensors:
        if key in EMBEDDING_KEYS:
            continue
        if refused := _suffix(key, _REFUSED_PARTS):
            raise AdapterFormatError(f"{name} {_REFUSED_PARTS[refused]} ({key}).")
        suffix = _suffix(key, _PARTS)
        if suffix is None:
            unknown.append(key)
            continue
        module, part = key.removesuffix("." + suffix), _PARTS[suffix]
        if part in modules[module]:
            raise AdapterFormatError(
                f"{name} has two tensors for the same part of {module}: "
                f"{modules[module][part]} and {key}; export it again."
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
            else "has keys that no supported adapter format uses"
        )
        raise AdapterFormatError(f"{name} {what}: {some(unknown)}.")
    for module, parts in modules.items():
        if frozenset(parts) - {"alpha"} not in _KINDS:
            raise AdapterFormatError(
                f"{name} is incomplete: {module} has only {some(sorted(parts.values()))}."
            )
    return dict(modules)


def _suffix(key: str, suffixes: Iterable[str]) -> str | None:
    return next((suffix for suffix in suffixes if key.endswith("." + suffix)), None)


def peft_alpha(metadata: Mapping[str, str], name: str) -> float | None:
    """Return the alpha in PEFT's metadata, which applies to all modules; None if there is none.

    None means alpha = rank. kohya stores one alpha per module instead.

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
