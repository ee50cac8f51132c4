"""Writing of adapter files in the naming of kohya or PEFT.

Only names, metadata and alphas can be new; all other tensors are copied byte for byte. The parts of
a module have the names that `tensor_names.modules_of` gives them. A module of any format that can
be read can therefore be written, if the target format has names for its parts.

Sources of the names: `networks/lora.py` of https://github.com/kohya-ss/sd-scripts and LyCORIS
(kohya); `save_lora_weights` of diffusers (PEFT).
"""

from __future__ import annotations

import json
import struct
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fidelora.errors import AdapterConversionError
from fidelora.families import Family, Part
from fidelora.texts import listed

TargetFormat = Literal["kohya", "peft"]

_SUFFIXES: Mapping[TargetFormat, Mapping[str, str]] = {
    "kohya": {
        "down": "lora_down.weight", "up": "lora_up.weight", "alpha": "alpha",
        "lokr_w1": "lokr_w1", "lokr_w1_a": "lokr_w1_a", "lokr_w1_b": "lokr_w1_b",
        "lokr_w2": "lokr_w2", "lokr_w2_a": "lokr_w2_a", "lokr_w2_b": "lokr_w2_b",
        "hada_w1_a": "hada_w1_a", "hada_w1_b": "hada_w1_b",
        "hada_w2_a": "hada_w2_a", "hada_w2_b": "hada_w2_b",
        "hada_t1": "hada_t1", "hada_t2": "hada_t2", "lokr_t2": "lokr_t2",
        "mid": "lora_mid.weight", "magnitude": "dora_scale", "dora_scale": "dora_scale",
        "a1": "a1.weight", "a2": "a2.weight", "b1": "b1.weight", "b2": "b2.weight",
        "oft_blocks": "oft_blocks", "rescale": "rescale", "ia3": "weight", "on_input": "on_input",
        "diff": "diff", "diff_b": "diff_b", "w_norm": "w_norm", "b_norm": "b_norm",
    },
    # The alpha of PEFT is in the metadata. diffusers cannot load LoHa, or LoKr with an alpha.
    "peft": {
        "down": "lora_A.weight", "up": "lora_B.weight", "up_bias": "lora_B.bias",
        "magnitude": "lora_magnitude_vector", "peft_magnitude": "lora_magnitude_vector",
    },
}  # fmt: skip
"""Key suffix by part; a part that is missing here cannot be expressed."""

_RANK_PARTS = ("down", "lokr_w2_b", "lokr_w1_b", "hada_w1_b")
"""Parts whose first dimension is the rank."""

_MAGNITUDES = {"magnitude", "peft_magnitude"}
"""Parts that PEFT loads only with `use_dora`."""

_PEFT_METADATA = "lora_adapter_metadata"
_STALE_METADATA = (_PEFT_METADATA, "sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
"""Metadata that describes the names or bytes of the original file."""

_DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_ALIGNMENT_BYTES = 8  # the header is padded to a multiple, as the `safetensors` library does


@dataclass(frozen=True, eq=False)
class ModuleParts:
    """One module of an adapter.

    Attributes:
        name: name of the module in the original file, for messages.
        part: part of the base model.
        path: path of the module in this part, as diffusers and transformers name it.
        kind: `lora`, `dora`, ...
        tensors: the module's tensors as stored, by name (`down`, `up`, ...; see `formats.py`).
        scale: alpha / rank.
        original_path: path in the original code, which kohya's trainer uses for this family; empty
            if it uses `path`.
    """

    name: str
    part: Part
    path: str
    kind: str
    tensors: Mapping[str, Tensor]
    scale: float
    original_path: str = ""

    @property
    def has_rank(self) -> bool:
        """True if the module has factors with a rank, so that its alpha has a meaning."""
        return any(part in self.tensors for part in _RANK_PARTS)

    @property
    def rank(self) -> int:
        """Inner dimension of the factors; only for modules that have one (not a whole LoKr)."""
        return next(len(self.tensors[part]) for part in _RANK_PARTS if part in self.tensors)

    @property
    def alpha(self) -> float:
        """Alpha: the scale times the rank."""
        # The stored value is exact; the product can differ from it in the last bit.
        stored = self.tensors.get("alpha")
        if stored is not None and float(stored) / self.rank == self.scale:
            return float(stored)
        return self.scale * self.rank


@dataclass(frozen=True, eq=False)
class NamedTensors:
    """Content of an adapter file.

    Attributes:
        tensors: by key.
        metadata: text fields.
        notes: sentences for the user.
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    notes: tuple[str, ...] = ()


def in_format(
    to: TargetFormat, family: Family, modules: Sequence[ModuleParts], metadata: Mapping[str, str]
) -> NamedTensors:
    """Return the content of a file in the target format.

    Args:
        metadata: metadata of the original file. It is kept, except for fields that describe the
            original names and bytes.

    Raises:
        AdapterConversionError: the target format cannot express the adapter; the message names the
            modules.
    """
    suffixes = _SUFFIXES[to]
    for kind, names in _inexpressible(modules, suffixes).items():
        raise AdapterConversionError(
            f"The {to} format cannot express modules of the kind {kind} ({listed(names)}). Use the "
            "original file, or another format."
        )
    if to == "peft":
        _check_dora(modules)
    kept = {name: text for name, text in metadata.items() if name not in _STALE_METADATA}
    tensors: dict[str, Tensor] = {}
    notes: list[str] = []
    rounded: list[str] = []
    for module in modules:
        name = (_kohya_name if to == "kohya" else _peft_name)(module, family)
        for part, tensor in module.tensors.items():
            if part in suffixes:
                # kohya's magnitude is [out, 1], that of AI Toolkit and PEFT is [out].
                is_column = to == "kohya" and part == "magnitude"
                if part == "alpha" and "scalar" in module.tensors:
                    tensor = _alpha(module, rounded)
                elif part == "alpha" and float(tensor) == 0 != module.alpha:
                    # AI Toolkit reads 0 as the rank, but other programs as no effect.
                    tensor = torch.tensor(module.alpha)
                tensors[f"{name}.{suffixes[part]}"] = tensor[:, None] if is_column else tensor
        # A missing alpha means the rank. kohya's LoRAs always have one; others only if it matters.
        is_needed = "down" in module.tensors or module.scale != 1
        if to == "kohya" and is_needed and "alpha" not in module.tensors:
            tensors[f"{name}.alpha"] = _alpha(module, rounded)
    if rounded:
        notes.append(
            f"{len(rounded)} alphas were rounded to float32, so their modules differ in the last "
            f"bits: {listed(rounded)}."
        )
    if to == "peft":
        kept[_PEFT_METADATA] = json.dumps(_peft_config(modules), sort_keys=True)
        if any(module.scale != 1 for module in modules):
            notes.append(
                "The alphas are in the metadata, which diffusers reads since version 0.34. Older "
                "versions use alpha = rank, so they apply the LoRA with another strength."
            )
    if any("magnitude" in module.tensors for module in modules):
        notes.append(
            "AI Toolkit applies a DoRA differently from other programs if the multiplier is not 1."
        )
    return NamedTensors(tensors, {"format": "pt", **kept}, tuple(notes))


def _alpha(module: ModuleParts, rounded: list[str]) -> Tensor:
    """Return alpha in float32; add the module to `rounded` if this is not the exact value."""
    alpha = torch.tensor(module.alpha)
    if float(alpha) != module.alpha:
        rounded.append(f"{module.alpha!r} of {module.name}")
    return alpha


def _inexpressible(
    modules: Sequence[ModuleParts], suffixes: Mapping[str, str]
) -> dict[str, list[str]]:
    """Return the names of modules that the format cannot express, by kind."""
    found: dict[str, list[str]] = defaultdict(list)
    for module in modules:
        # AI Toolkit scales only a part of a DoRA's change; other programs scale all of it.
        is_scaled_dora = "magnitude" in module.tensors and module.scale != 1
        # The scalar of LyCORIS becomes a part of alpha, which needs a rank.
        known = {"alpha", "scalar"} if module.has_rank else {"alpha"}
        if is_scaled_dora or module.tensors.keys() - suffixes.keys() - known:
            found[module.kind].append(module.name)
    return found


def _check_dora(modules: Sequence[ModuleParts]) -> None:
    """Check that each part of the base model has only DoRA modules or none.

    `use_dora` in PEFT's metadata applies to all modules of a part.

    Raises:
        AdapterConversionError: a part has both.
    """
    kinds: dict[str, set[bool]] = defaultdict(set)
    for module in modules:
        kinds[module.part.name].add(bool(module.tensors.keys() & _MAGNITUDES))
    if mixed := [name for name, found in kinds.items() if len(found) > 1]:
        raise AdapterConversionError(
            f"The peft format cannot express both DoRA and other modules in {mixed[0]}. Use the "
            "original file, or the kohya format."
        )


def _kohya_name(module: ModuleParts, family: Family) -> str:
    prefix = next((p for p in module.part.adapter_prefixes if p.startswith("lora_")), None)
    if module.part.fused_names is not None:
        raise AdapterConversionError(
            f"The kohya format has one name for several modules of {family.title} (query, key and "
            "value), and joining them is not supported; use peft."
        )
    if prefix is None:
        raise AdapterConversionError(
            f"The kohya format has no names for modules of {family.title}; use peft."
        )
    return prefix + (module.original_path or _full_path(module)).replace(".", "_")


def _peft_name(module: ModuleParts, family: Family) -> str:
    if module.part.accepted_names is not None:
        raise AdapterConversionError(
            f"diffusers splits modules of {family.title}, so the peft format cannot express them. "
            "Use the original file, or the kohya format."
        )
    if module.part.library not in ("diffusers", "transformers"):
        raise AdapterConversionError(
            f"The peft format has no names for modules of {family.title}; use kohya."
        )
    return f"{module.part.name}.{_full_path(module)}"


def _full_path(module: ModuleParts) -> str:
    """Return the path with the optional prefix, as in adapter files."""
    prefix = module.part.optional_prefix
    return prefix + module.path.removeprefix(prefix)


def _peft_config(modules: Sequence[ModuleParts]) -> dict[str, Any]:
    """Return the arguments of PEFT's `LoraConfig`, with the name of the part before each field.

    The most frequent rank and alpha are the defaults of a part; other modules are in its patterns.
    The optional prefix of paths is left out: PEFT compares the ends of paths, and the installed
    transformers may lack the prefix.
    """
    config: dict[str, Any] = {}
    for part in dict.fromkeys(module.part.name for module in modules):
        paths = {
            module.path.removeprefix(module.part.optional_prefix): module
            for module in modules
            if module.part.name == part
        }
        ranks = {path: module.rank for path, module in paths.items()}
        alphas = {path: _whole(module.alpha) for path, module in paths.items()}
        rank, alpha = _most_frequent(ranks), _most_frequent(alphas)
        fields = {
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {path: one for path, one in ranks.items() if one != rank},
            "alpha_pattern": {path: one for path, one in alphas.items() if one != alpha},
            "target_modules": sorted(paths),
            "use_dora": any(module.tensors.keys() & _MAGNITUDES for module in paths.values()),
        }
        # Versions of PEFT before 0.14 do not have this field.
        if any("up_bias" in module.tensors for module in paths.values()):
            fields["lora_bias"] = True
        config |= {f"{part}.{name}": value for name, value in fields.items()}
    return config


def _most_frequent(values: Mapping[str, float]) -> float:
    counts = Counter(values.values())
    return max(counts, key=lambda value: (counts[value], value))


def _whole(number: float) -> float:
    """Return an integer if `number` is whole, because PEFT declares alphas as integers."""
    return int(number) if number.is_integer() else number


def file_bytes(content: NamedTensors) -> bytes:
    """Return a .safetensors file, always with the same bytes for the same content.

    The `safetensors` library writes the metadata in random order; here it is sorted. As in that
    library, tensors of wider dtypes come first, so that each begins at a multiple of its item size.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(content.metadata.items()))}
    bodies: list[bytes] = []
    position = 0
    for key, tensor in sorted(
        content.tensors.items(), key=lambda item: (-item[1].element_size(), item[0])
    ):
        body = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        header[key] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + len(body)],
        }
        bodies.append(body)
        position += len(body)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    return b"".join([struct.pack("<Q", len(text)), text, *bodies])
