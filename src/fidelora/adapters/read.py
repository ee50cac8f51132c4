"""Reading of adapter files, with checks of the header (`tensor_names.py`), values and shapes."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from fidelora.adapter_file import AdapterFile
from fidelora.adapters.build import Module, Scaling
from fidelora.adapters.deltas import Delta, LokrDelta
from fidelora.adapters.lycoris_deltas import FullDelta
from fidelora.adapters.peft_metadata import PeftMetadata
from fidelora.adapters.tensor_names import is_from_trainer, modules_of, trainer_version
from fidelora.embedding_file import embedding_tensors
from fidelora.errors import AdapterFormatError, NonFiniteWeightsError, WeightsFileError
from fidelora.texts import listed

_FACTORISED_SINCE = (0, 10, 25)
"""First version of AI Toolkit with a factorised live path of LoKr (`LokrDelta.is_factorised`)."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter in memory.

    Attributes:
        sha256: sha256 of the file in hex.
        name: file name without suffix, for error messages.
        deltas: delta of the weight by module name as spelled in the file, in the order of the
            file's keys.
        biases: change of the bias by module name; most files have none.
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
    biases: Mapping[str, FullDelta] = field(default_factory=dict)

    @property
    def is_embedding(self) -> bool:
        """True if the file contains only an embedding."""
        return bool(self.embedding) and not self.modules

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of all modules that the adapter changes, as spelled in the file."""
        return tuple(dict.fromkeys((*self.deltas, *self.biases)))

    def with_alpha(self, alpha: float) -> Adapter:
        """Return the same adapter with its DoRA modules scaled by `alpha` / rank.

        Raises:
            AdapterFormatError: it has no DoRA modules; files of other kinds contain their alpha.
        """
        if not any(delta.is_dora for delta in self.deltas.values()):
            raise AdapterFormatError(
                f"{self.name} is not a DoRA of AI Toolkit: its alpha is in its file; leave out "
                "alpha."
            )
        deltas = {module: delta.with_alpha(alpha) for module, delta in self.deltas.items()}
        return replace(self, deltas=deltas, alpha=alpha)

    @property
    def size_bytes(self) -> int:
        """Size of the tensors and the metadata in memory."""
        deltas = (*self.deltas.values(), *self.biases.values())
        tensors = [tensor for delta in deltas for tensor in delta.tensors()]
        texts = sum(map(sys.getsizeof, self.metadata.values()))  # hostile files have up to 32 MiB
        return texts + sum(tensor.nbytes for tensor in (*tensors, *self.embedding.values()))


def zero_alpha_note(adapter: Adapter) -> str | None:
    """Return a sentence about modules whose alpha is 0; None if there are none."""
    idle = [module for module, delta in adapter.deltas.items() if delta.scale == 0]
    if not idle:
        return None
    return (
        f"{len(idle)} of {len(adapter.modules)} modules have an alpha or scalar of 0 "
        f"({listed(idle)}), so they have no effect, as in AUTOMATIC1111, ComfyUI and diffusers. If "
        "the program that trained the adapter reads 0 as the rank, remove the alpha."
    )


def open_adapter(path: Path) -> AdapterFile:
    """Open the adapter at `path`; its body is read only if every key of the header is valid.

    Raises:
        AdapterNotFoundError: the file does not exist.
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
        raise WeightsFileError(
            f"{file.name} is not a valid .safetensors file: {error}. Download or export it again."
        ) from error


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
        part: tensors[key].reshape(-1, tensors[key].shape[-1])
        for part, key in sorted(embedding_tensors(file.header).items())
    }
    _check_finite(tensors, {**modules, "embedding": embedding_tensors(file.header)}, file.name)
    metadata = file.header.metadata
    scaling = Scaling(PeftMetadata(metadata, file.name), zero_is_rank=is_from_trainer(metadata))
    deltas: dict[str, Delta] = {}
    biases: dict[str, FullDelta] = {}
    for name, parts in modules.items():
        module = Module(
            {part: tensors[key] for part, key in parts.items()}, name, file.name, scaling
        )
        if (delta := module.delta()) is not None:
            deltas[name] = delta
        if (bias := module.bias()) is not None:
            biases[name] = bias
    version = trainer_version(metadata)
    if version is not None and version >= _FACTORISED_SINCE:
        deltas = {
            module: replace(delta, is_factorised=True) if isinstance(delta, LokrDelta) else delta
            for module, delta in deltas.items()
        }
    return Adapter(
        file.sha256,
        Path(file.name).stem,
        deltas,
        metadata,
        embedding=embedding,
        tensors_sha256=file.tensors_sha256,
        biases=biases,
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
