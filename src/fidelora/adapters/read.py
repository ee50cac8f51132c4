"""Reading of adapter files, with checks of the header (`tensor_names.py`), values and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from fidelora.adapter_file import AdapterFile
from fidelora.adapters.deltas import Delta, DoraDelta, LohaDelta, LokrDelta, LoraDelta, scale_of
from fidelora.adapters.tensor_names import kind_of, modules_of, peft_alpha, trainer_version
from fidelora.embedding_file import EMBEDDING_KEYS
from fidelora.errors import AdapterFormatError, NonFiniteWeightsError, WeightsFileError

_FACTORISED_SINCE = (0, 10, 25)
"""First version of AI Toolkit with a factorised live path of LoKr (`LokrDelta.is_factorised`)."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter in memory.

    Attributes:
        sha256: of the file, in hex.
        name: file name without suffix, for error messages.
        deltas: delta by module name as spelled in the file, in the order of the file's keys.
        metadata: text fields of the file.
        alpha: alpha of DoRA modules, which comes from the recipe because DoRA files do not store
            it; None if the recipe does not set it.
        embedding: vectors [tokens, width] by key of the file (`emb_params`, ...); empty for a file
            without an embedding.
        tensors_sha256: see `AdapterFile`.
    """

    sha256: str
    name: str
    deltas: Mapping[str, Delta]
    metadata: Mapping[str, str]
    alpha: float | None = None
    embedding: Mapping[str, Tensor] = field(default_factory=dict)
    tensors_sha256: str = ""

    @property
    def is_embedding(self) -> bool:
        """True if the file contains only an embedding."""
        return bool(self.embedding) and not self.deltas

    def with_alpha(self, alpha: float) -> Adapter:
        """Return the same adapter with its DoRA modules scaled by `alpha` / rank.

        Raises:
            AdapterFormatError: it has no DoRA modules; files of other kinds contain their alpha.
        """
        if not any(delta.is_dora for delta in self.deltas.values()):
            raise AdapterFormatError(
                f"{self.name} is not a DoRA: its alpha is in its file; leave out alpha."
            )
        deltas = {module: delta.with_alpha(alpha) for module, delta in self.deltas.items()}
        return replace(self, deltas=deltas, alpha=alpha)

    @property
    def size_bytes(self) -> int:
        """Size of the tensors in memory."""
        tensors = [tensor for delta in self.deltas.values() for tensor in delta.tensors()]
        return sum(tensor.nbytes for tensor in (*tensors, *self.embedding.values()))


def open_adapter(path: Path) -> AdapterFile:
    """Open the adapter at `path`; its body is read only if every key of the header is valid.

    Raises:
        AdapterNotFoundError: there is no such file.
        WeightsFileError: not a valid .safetensors file (web page, truncated, damaged, ...).
        PickleRefusedError: it is a pickle.
        AdapterFormatError: a valid file, but not an adapter of a supported kind.
    """
    return AdapterFile.open(path, check=lambda header: modules_of(header, path.name))


def read_adapter(source: Path | AdapterFile) -> Adapter:
    """Read an adapter; its hash and its tensors come from one read of the file.

    Raises:
        AdapterNotFoundError, WeightsFileError, PickleRefusedError, AdapterFormatError: see
            `open_adapter`.
        AdapterChangedError: the content of `source` is no longer kept, and its file has changed.
        NonFiniteWeightsError: some weights are NaN or infinite.
    """
    file = source if isinstance(source, AdapterFile) else open_adapter(source)
    return adapter_of(file, stored_tensors(file))


def stored_tensors(file: AdapterFile) -> dict[str, Tensor]:
    """Return all tensors by key, in the dtypes of the file.

    `file` does not keep its content afterwards (`AdapterFile.take_content`).

    Raises:
        AdapterChangedError, WeightsFileError: the content is not kept and cannot be read again.
    """
    try:
        return safetensors.torch.load(file.take_content())
    except SafetensorError as error:
        raise WeightsFileError(f"{file.name} is not a valid .safetensors file: {error}.") from error


def adapter_of(file: AdapterFile, tensors: Mapping[str, Tensor]) -> Adapter:
    """Return the adapter that `file` contains.

    Args:
        tensors: result of `stored_tensors(file)`.

    Raises:
        AdapterFormatError: `file` is not an adapter of a supported kind.
        NonFiniteWeightsError: some weights are NaN or infinite.
    """
    modules = modules_of(file.header, file.name)
    tensors = {key: tensor.to(torch.float32) for key, tensor in tensors.items()}
    embedding = {
        key: tensors[key].reshape(-1, tensors[key].shape[-1])
        for key in sorted(tensors.keys() & EMBEDDING_KEYS)
    }
    _check_finite(tensors, {**modules, "embedding": {key: key for key in embedding}}, file.name)
    default_alpha = peft_alpha(file.header.metadata, file.name)
    deltas = {
        module: _delta(
            {part: tensors[key] for part, key in parts.items()}, default_alpha, module, file.name
        )
        for module, parts in modules.items()
    }
    version = trainer_version(file.header.metadata)
    if version is not None and version >= _FACTORISED_SINCE:
        deltas = {
            module: replace(delta, is_factorised=True) if isinstance(delta, LokrDelta) else delta
            for module, delta in deltas.items()
        }
    return Adapter(
        file.sha256,
        Path(file.name).stem,
        deltas,
        file.header.metadata,
        embedding=embedding,
        tensors_sha256=file.tensors_sha256,
    )


def _check_finite(
    tensors: Mapping[str, Tensor], modules: Mapping[str, Mapping[str, str]], name: str
) -> None:
    for parts in modules.values():
        for part, key in parts.items():
            # For LoKr modules with whole factors, the trainer stores an unused alpha of 1e10, which
            # is infinite in float16.
            if part == "alpha" and {"lokr_w1", "lokr_w2"} <= parts.keys():
                continue
            if not torch.isfinite(tensors[key]).all():
                raise NonFiniteWeightsError(
                    f"{name} has NaN or infinity in {key}: training diverged or the file is "
                    "damaged; use an earlier checkpoint."
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
            raise AdapterFormatError(
                f"{name} has factors of {module} that cannot be multiplied; export it again."
            )
        return whole

    if kind in ("lora", "dora"):
        down, up = tensors["down"], tensors["up"]
        if (
            down.dim() not in (2, 4)
            or up.dim() != down.dim()
            or up.shape[1:] != (down.shape[0], *[1] * (up.dim() - 2))
        ):
            raise AdapterFormatError(
                f"{name} has shapes of {module} that are not valid for a LoRA: "
                f"down {list(down.shape)}, up {list(up.shape)}."
            )
        if kind == "lora":
            return LoraDelta(scale_of(alpha, down.shape[0]), down, up)
        if down.dim() != 2 or tensors["magnitude"].shape != (up.shape[0],):
            raise AdapterFormatError(
                f"{name} has shapes of {module} that are not valid for a DoRA, which is supported "
                "for linear modules only, with one magnitude per output."
            )
        return DoraDelta(scale_of(alpha, down.shape[0]), down, up, tensors["magnitude"])
    if kind == "loha":
        (w1_a, w1_b), (w2_a, w2_b) = factors("hada_w1"), factors("hada_w2")
        return LohaDelta(scale_of(alpha, w1_b.shape[0]), (w1_a, w1_b), (w2_a, w2_b))
    w1, w2 = factors("lokr_w1"), factors("lokr_w2")
    if w1[0].dim() != 2 or w2[0].dim() not in (2, 4):
        raise AdapterFormatError(f"{name} has shapes of {module} that are not valid for a LoKr.")
    if len(w1) == len(w2) == 1:
        # Both factors are whole: the trainer's scale is 1, and the stored alpha is unused.
        return LokrDelta(1.0, w1, w2)
    rank = w2[1].shape[0] if len(w2) == 2 else w1[1].shape[0]
    return LokrDelta(scale_of(alpha, rank), w1, w2)
