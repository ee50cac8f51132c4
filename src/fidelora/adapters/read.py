"""An adapter's file as tensors: header first (`keys.py`), then the body, then finite values and shapes that fit together."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from fidelora.adapters.deltas import Delta, DoraDelta, LohaDelta, LokrDelta, LoraDelta
from fidelora.adapters.tensor_names import kind_of, modules_of, peft_alpha
from fidelora.errors import (
    AdapterFormatError,
    AdapterNotFoundError,
    NonFiniteWeightsError,
    WeightsFileError,
)
from fidelora.safetensors_header import read_header, refuse_pickle


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter in memory.

    Attributes:
        sha256: of the file's bytes, in hex.
        name: what messages call it.
        deltas: by the module's name as the file spells it, in the order of the file's keys.
        metadata: the file's own text fields.
        alpha: what its DoRA modules, whose files have none, were given; None if nobody said.
    """

    sha256: str
    name: str
    deltas: Mapping[str, Delta]
    metadata: Mapping[str, str]
    alpha: float | None = None

    def with_alpha(self, alpha: float) -> Adapter:
        """The same adapter, its DoRA modules scaled by `alpha` / rank.

        Raises:
            AdapterFormatError: it has none; every other kind has its alpha in the file.
        """
        if not any(isinstance(delta, DoraDelta) for delta in self.deltas.values()):
            raise AdapterFormatError(
                f"{self.name} is no DoRA: its alpha is in its file, and no other can be given."
            )
        deltas = {
            module: replace(delta, scale=_scale(alpha, delta.down.shape[0]))
            if isinstance(delta, DoraDelta)
            else delta
            for module, delta in self.deltas.items()
        }
        return replace(self, deltas=deltas, alpha=alpha)

    @property
    def size_bytes(self) -> int:
        """Of the tensors in memory."""
        return sum(tensor.nbytes for delta in self.deltas.values() for tensor in delta.tensors())


def read_adapter(path: Path) -> Adapter:
    """Read the adapter at `path`; the hash and the tensors come from one and the same read of the file.

    Raises:
        AdapterNotFoundError: no file there.
        WeightsFileError: not a sound .safetensors file (a web page, truncated, damaged, too large a header, ...).
        PickleRefusedError: a pickle.
        AdapterFormatError: sound, but not an adapter of a kind that can be applied.
        NonFiniteWeightsError: NaN or infinity among its weights.
    """
    if path.is_dir():
        raise AdapterNotFoundError(
            f"{path} is a folder, not an adapter file; name the .safetensors file in it."
        )
    try:
        with path.open("rb") as file:
            refuse_pickle(path)
            header = read_header(file, path.name)
            modules = modules_of(
                header, path.name
            )  # the body is read only if every key makes sense
            file.seek(0)
            content = file.read()
    except FileNotFoundError:
        raise AdapterNotFoundError(f"There is no adapter file {path}; check the path.") from None
    except OSError as error:
        raise WeightsFileError(f"{path} cannot be read: {error.strerror or error}.") from error

    try:
        tensors = safetensors.torch.load(content)
    except SafetensorError as error:  # the file changed between the two reads
        raise WeightsFileError(f"{path.name} is not a sound .safetensors file: {error}.") from error
    tensors = {key: tensor.to(torch.float32) for key, tensor in tensors.items()}
    _check_finite(tensors, modules, path.name)
    default_alpha = peft_alpha(header.metadata, path.name)
    deltas = {
        module: _delta(
            {part: tensors[key] for part, key in parts.items()}, default_alpha, module, path.name
        )
        for module, parts in modules.items()
    }
    return Adapter(hashlib.sha256(content).hexdigest(), path.stem, deltas, header.metadata)


def _check_finite(
    tensors: Mapping[str, Tensor], modules: Mapping[str, Mapping[str, str]], name: str
) -> None:
    for parts in modules.values():
        for part, key in parts.items():
            # The trainer stores an alpha of 1e10, infinite in fp16, in whole LoKr modules, where it has no meaning.
            if part == "alpha" and {"lokr_w1", "lokr_w2"} <= parts.keys():
                continue
            if not torch.isfinite(tensors[key]).all():
                raise NonFiniteWeightsError(
                    f"{name} holds NaN or infinity in {key}: training diverged there or the file is damaged; "
                    "use an earlier checkpoint."
                )


def _delta(
    tensors: Mapping[str, Tensor], default_alpha: float | None, module: str, name: str
) -> Delta:
    kind = kind_of(tensors)
    alpha = float(tensors["alpha"]) if "alpha" in tensors else default_alpha

    def factors(stem: str) -> tuple[Tensor, ...]:
        whole = (
            (tensors[stem],) if stem in tensors else (tensors[f"{stem}_a"], tensors[f"{stem}_b"])
        )
        if len(whole) == 2 and (
            whole[0].dim() != 2 or whole[1].dim() != 2 or whole[0].shape[1] != whole[1].shape[0]
        ):
            raise AdapterFormatError(f"{name} has factors at {module} that cannot be multiplied.")
        return whole

    if kind in ("lora", "dora"):
        down, up = tensors["down"], tensors["up"]
        if (
            down.dim() not in (2, 4)
            or up.dim() != down.dim()
            or up.shape[1:] != (down.shape[0], *[1] * (up.dim() - 2))
        ):
            raise AdapterFormatError(
                f"{name} has shapes at {module} that make no LoRA: down {list(down.shape)}, up {list(up.shape)}."
            )
        if kind == "lora":
            return LoraDelta(_scale(alpha, down.shape[0]), down, up)
        if down.dim() != 2 or tensors["magnitude"].shape != (up.shape[0],):
            raise AdapterFormatError(
                f"{name} has shapes at {module} that make no DoRA: that is for linear modules, with a magnitude for each output."
            )
        return DoraDelta(_scale(alpha, down.shape[0]), down, up, tensors["magnitude"])
    if kind == "loha":
        (w1_a, w1_b), (w2_a, w2_b) = factors("hada_w1"), factors("hada_w2")
        return LohaDelta(_scale(alpha, w1_b.shape[0]), (w1_a, w1_b), (w2_a, w2_b))
    w1, w2 = factors("lokr_w1"), factors("lokr_w2")
    if w1[0].dim() != 2 or w2[0].dim() not in (2, 4):
        raise AdapterFormatError(f"{name} has shapes at {module} that make no LoKr.")
    if len(w1) == len(w2) == 1:
        return LokrDelta(
            1.0, w1, w2
        )  # both whole: the trainer's scale is 1 and the stored alpha has no meaning
    rank = w2[1].shape[0] if len(w2) == 2 else w1[1].shape[0]
    return LokrDelta(_scale(alpha, rank), w1, w2)


def _scale(alpha: float | None, rank: int) -> float:
    """Alpha / rank; no alpha, or one of 0, means alpha = rank (as in the trainer)."""
    return alpha / rank if alpha else 1.0
