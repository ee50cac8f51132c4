"""Strict parsing of the keys of adapter files: a file with an unknown key is refused.

Keys are `<module>.<suffix>`. `targets.py` finds the base model's module, and `formats.py` defines
the parts and the kinds of modules. The tensors of a textual-inversion embedding have keys without a
module (`embedding_file.py`). A file contains an embedding, modules, or both.

This module uses only the header of a file, and does not import torch.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from fidelora.adapters.formats import find_kind, name_of_other_file, refusal, split_key
from fidelora.embedding_file import (
    MAX_TOKENS,
    embedding_tensors,
    is_counter,
    token_count,
    tokens_of,
)
from fidelora.errors import AdapterFormatError
from fidelora.recipe import AdapterRef, Noise
from fidelora.safetensors_header import Header, read_file_header
from fidelora.texts import listed

MAX_ADAPTER_BYTES = 4 * 2**30  # larger files are whole models
_FLOATS = {"F8_E4M3", "F8_E5M2", "F16", "BF16", "F32", "F64"}
_OTHER_ENCODERS = frozenset({
    *("t5", "t5xxl", "t5_out", "llama", "llama_out", "qwen", "qwen_out", "gemma", "gemma_out"),
    *("qwen3_4b", "qwen3_8b", "gemma2_2b", "umt5xxl", "mistral", "mistral_out"),
})  # fmt: skip
"""Keys of embeddings for text encoders other than CLIP, in OneTrainer and ComfyUI."""
_MAX_CLIP_WIDTH = 1280  # width of CLIP-bigG; T5 and language models are wider
_WHOLE_MODEL = ("model.diffusion_model.", "cond_stage_model.", "down_blocks.")
_ANY_TYPE = (".alpha", ".scalar", ".on_input")
"""Suffixes of tensors with one number, which may have any type."""


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


def is_from_trainer(metadata: Mapping[str, str]) -> bool:
    """Return True if AI Toolkit wrote a file with this metadata."""
    try:
        name: object = json.loads(metadata.get("software", "null"))["name"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return False
    return name == "ai-toolkit"


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
            f"{name} has {header.file_bytes:,} bytes: it is a whole model, not an adapter. Use it "
            "as the base model."
        )
    if not header.tensors:
        raise AdapterFormatError(f"{name} has no tensors; export it again.")
    for key, info in header.tensors.items():
        if is_counter(key, header):
            continue
        is_single = key.endswith(_ANY_TYPE)
        if info.dtype not in _FLOATS and not is_single:
            if refusal(key):
                _refuse([key], name)
            raise AdapterFormatError(
                f"{name} stores {key} as {info.dtype}; only F8, F16, BF16, F32 and F64 are "
                "accepted. Export it as F16 or F32."
            )
        if 0 in info.shape and name_of_other_file(key):
            _refuse([key], name)
        if 0 in info.shape or (is_single and math.prod(info.shape) != 1):
            raise AdapterFormatError(
                f"{name} has the tensor {key} with the shape {list(info.shape)}, which is not "
                "valid; export it again."
            )
    _check_embedding(header, name)


def _check_embedding(header: Header, name: str) -> None:
    found = [header.tensors[key].shape for key in embedding_tensors(header).values()]
    if any(not 1 <= len(shape) <= 2 for shape in found):
        raise AdapterFormatError(
            f"{name} has an embedding of the shape {list(found[0])}; the shape must be "
            "[tokens, width]. Export it again."
        )
    counts = {shape[0] if len(shape) == 2 else 1 for shape in found}
    if len(counts) > 1 or max(counts, default=0) > MAX_TOKENS:
        raise AdapterFormatError(
            f"{name} has an embedding of {' and '.join(map(str, sorted(counts)))} tokens. The "
            f"number must be the same for all text encoders, and at most {MAX_TOKENS}. Export it "
            "again."
        )
    if wide := _wide_embedding(header):
        raise AdapterFormatError(
            f"{name} contains an embedding for the text encoder {wide}, which is not supported; "
            "only embeddings for CLIP can be used."
        )
    bundled = next((key for key in header.tensors if key.startswith("bundle_emb.")), None)
    if bundled is not None:
        raise AdapterFormatError(
            f"{name} contains an embedding in the format of kohya ({bundled}), which is not "
            "supported; save the embedding as a file of its own, with the tensor emb_params."
        )
    output = next((key for key in header.tensors if key in ("clip_l_out", "clip_g_out")), None)
    if output is not None:
        raise AdapterFormatError(
            f"{name} is an embedding of OneTrainer with a vector for the output of the text "
            f"encoder ({output}), which is not supported; train it without an output embedding."
        )


def _wide_embedding(header: Header) -> str:
    """Return the key of an embedding for another text encoder than CLIP; "" if there is none."""
    for key, info in header.tensors.items():
        if key in _OTHER_ENCODERS and info.shape and info.shape[-1] > _MAX_CLIP_WIDTH:
            return key.removesuffix("_out")
    return ""


def _group(header: Header, name: str) -> dict[str, dict[str, str]]:
    modules: dict[str, dict[str, str]] = defaultdict(dict)
    unknown: list[str] = []
    embedding = set(embedding_tensors(header).values())
    if other := next(filter(name_of_other_file, header.tensors), None):
        _refuse([other], name)
    ia3 = {key.removesuffix(".on_input") for key in header.tensors if key.endswith(".on_input")}
    for key in header.tensors:
        if key in embedding or is_counter(key, header):
            continue
        found = split_key(key, is_ia3=key.removesuffix(".weight") in ia3)
        if found is None:
            unknown.append(key)
            continue
        module, part = found
        if part in modules[module]:
            raise AdapterFormatError(
                f"{name} has two tensors for the same part of {module}: "
                f"{modules[module][part]} and {key}; export it again."
            )
        modules[module][part] = key

    if unknown:
        _refuse(unknown, name, len(header.tensors))
    for module, parts in modules.items():
        if find_kind(parts) is None:
            raise AdapterFormatError(
                f"{name} is incomplete: {module} has only {listed(sorted(parts.values()))}. Export "
                "the file again."
            )
    return dict(modules)


def _refuse(unknown: Sequence[str], name: str, total: int = 0) -> NoReturn:
    """Raise an error for keys that no supported format has; it names the format if it is known.

    Args:
        total: number of all keys in the file.
    """
    is_other = any(map(name_of_other_file, unknown))
    if not is_other and any(key.startswith(_WHOLE_MODEL) for key in unknown):
        raise AdapterFormatError(
            f"{name} is a whole model, not an adapter: {listed(unknown)}. Use it as the base model."
        )
    for key in unknown:
        if reason := refusal(key):
            raise AdapterFormatError(f"{name} {reason} ({key}).")
    if len(unknown) == total and all(map(_is_plain_parameter, unknown)):
        raise AdapterFormatError(
            f"{name} is a model or a part of one, not an adapter: {listed(unknown)}. If it is a "
            "checkpoint of a supported model, use it as the base model."
        )
    if len(unknown) > 1 and not any("." in key for key in unknown):
        raise AdapterFormatError(
            f"{name} has tensors without the name of a module ({listed(unknown)}). If they are "
            "embeddings, save each in a file of its own."
        )
    raise AdapterFormatError(
        f"{name} has keys that no supported adapter format uses: {listed(unknown)}. Convert it to "
        "the format of kohya or diffusers."
    )


def _is_plain_parameter(key: str) -> bool:
    return "." in key and key.endswith((".weight", ".bias", ".scale", ".running_mean"))
