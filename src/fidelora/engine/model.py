"""A base model in memory: its parts on their device, ready for adapters."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from accelerate.hooks import UserCpuOffloadHook
from torch import nn

from fidelora.accel import Offload
from fidelora.accel.compiled import compile_parts
from fidelora.accel.device import TORCH_DTYPES
from fidelora.accel.fast_path import FastPath, fast_path
from fidelora.accel.offload import place_parts
from fidelora.accel.packed import pack
from fidelora.accel.prepack import prepack
from fidelora.accel.quantized import quantize, quantized_bytes
from fidelora.adapters.merge import MergedAdapters
from fidelora.adapters.targets import Targets
from fidelora.families import Family, get_family
from fidelora.families.protocols import Denoiser, Guidance, Latents, Size, Text
from fidelora.recipe import Recipe
from fidelora.weights.files import BaseFiles
from fidelora.weights.strict import allocate_weights, build_part, part_class


class ModelKey(NamedTuple):
    """The recipe fields that determine a loaded base model."""

    model: str
    base_model: str
    variant: str
    config: str
    vae: str
    dtype: str
    vae_dtype: str
    text_encoder_dtype: str
    fidelity: str
    quantization: str
    text_encoder_quantization: str

    @classmethod
    def of(cls, recipe: Recipe) -> ModelKey:
        """Return the key of the base model that `recipe` needs."""
        return cls(*(getattr(recipe, name) for name in cls._fields))

    def find_files(self, cache_dir: Path | None = None) -> BaseFiles:
        """Find the files of the base model.

        Raises:
            BaseModelError, WeightsFileError: a file is missing, damaged or unsuitable.
        """
        return BaseFiles.find(
            get_family(self.model),
            self.base_model,
            variant=self.variant,
            config=self.config,
            decoder=self.vae,
            cache_dir=cache_dir,
        )


@dataclass(eq=False)
class LoadedModel:
    """A loaded base model.

    Attributes:
        files: files of the base model.
        device: device on which the parts compute.
        parts: parts by name, each in the dtype of the model's key. In `fast`, the denoiser and the
            decoder are packed or compiled. On the CPU, some modules of the denoiser store their
            weight in a special form (`AcceptsWeight`).
        text, denoiser, latents: the family's implementations of the protocols `Text`, `Denoiser`
            and `Latents`.
        targets: the weights that adapters can change.
        merged: the adapters that are merged into those weights.
        hooks: hooks that offload the parts with offload mode `model`.
        fast_path: implementation that computes `fast`; None in `exact`.
        sha256: content hash of the base model (`ContentHashes.sha256_of`); empty until
            `LoadedModels` sets it.
    """

    files: BaseFiles
    device: torch.device
    parts: Mapping[str, nn.Module]
    text: Text
    denoiser: Denoiser
    latents: Latents
    targets: Targets
    merged: MergedAdapters
    hooks: list[UserCpuOffloadHook]
    fast_path: FastPath | None = None
    sha256: str = ""
    _warm: set[tuple[object, ...]] = field(default_factory=set)

    @property
    def family(self) -> Family:
        """The family of the base model."""
        return self.files.family

    @property
    def size_bytes(self) -> int:
        """Size of all weights in bytes."""
        parts = self.parts.values()
        plain = sum(weight.nbytes for part in parts for weight in part.parameters())
        return plain + sum(quantized_bytes(part) for part in parts)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype in which the denoisers compute."""
        module: Any = self.parts[self.family.part("denoiser").name]
        return cast(torch.dtype, module.dtype)

    def warm_up(self, images: int, guidance: Guidance, size: Size, dtype: torch.dtype) -> None:
        """Compile the denoiser for batches of `images` images; do nothing if not `COMPILED`."""
        negative = self.denoiser.uses_negative(guidance)
        key = (images, negative, size)
        if self.fast_path is FastPath.COMPILED and key not in self._warm:
            blank = [self.text.blank(size, negative=negative)] * images
            denoise = self.denoiser.prepare(blank, guidance, size, dtype)
            shape = self.latents.shape(size)
            latents = torch.zeros(images, *shape[1:], device=self.device)
            denoise(latents, torch.tensor(500, device=self.device))
            self._warm.add(key)

    def offload_parts(self) -> None:
        """Move offloaded parts back to the CPU, where adapters are merged."""
        for hook in self.hooks:
            hook.offload()


def load_model(
    key: ModelKey,
    files: BaseFiles,
    device: torch.device,
    *,
    offload: Offload = "none",
) -> LoadedModel:
    """Load a base model.

    Weights that adapters can change are uninitialised until `merged.apply` writes them.

    Args:
        files: result of `key.find_files()`.
        device: device on which the model computes.
        offload: `none` keeps all parts in the device's memory, `model` only the part in use,
            `sequential` only the layer in use.

    Raises:
        BaseModelError, WeightsFileError: a file is missing, damaged or unsuitable.
        DeviceError: `fast` is not supported on this device, or not with this offload mode.
    """
    family = files.family
    path = fast_path(family, device, offload) if key.fidelity == "fast" else None
    configs, weights = files.read()
    dtypes = {part.name: TORCH_DTYPES[getattr(key, part.precision)] for part in family.parts}
    parts: dict[str, nn.Module] = {}
    pristine = {}
    for part in family.parts:
        packed = path is FastPath.PACKED and part.role != "text_encoder"
        dtype = None if packed else dtypes[part.name]  # `pack` reads the file's tensors
        kind: Any = getattr(key, part.quantization) if part.quantization else "none"
        rounds = part.rounds_buffers and (kind == "none" or part.rounds_quantized_buffers)
        parts[part.name], pristine[part.name] = build_part(
            replace(part, rounds_buffers=rounds), configs[part.name], weights.pop(part.name), dtype
        )
        if kind != "none":
            is_written = not part.adapter_prefixes  # the others get their weights from `merged`
            quantize(parts[part.name], kind, part.whole_layers, has_weights=is_written)
    denoisers = [parts[part.name] for part in family.denoisers]
    decoder = parts[family.part("decoder").name]
    in_place = _accelerate_on_cpu(family, denoisers, decoder, path, device, offload)
    for module in parts.values():
        allocate_weights(module)
    model = LoadedModel(
        files=files,
        device=device,
        parts=parts,
        text=_implementation(family.text)(family, parts, files.tokenizers, device),
        denoiser=_implementation(family.denoiser)(*denoisers),
        latents=_implementation(family.latents)(family, denoisers[0], decoder),
        # Must be created before offloading replaces parameters by placeholders.
        targets=(targets := Targets(family, parts, pristine)),
        merged=MergedAdapters(targets),
        hooks=[],
        fast_path=path,
    )
    if not in_place:  # parameters without data cannot be moved
        model.hooks += place_parts(parts.values(), device, offload)
    if path is FastPath.COMPILED:
        for denoiser in denoisers:
            compile_parts(denoiser, [decoder])
    return model


def import_family(family: Family) -> None:
    """Import everything that `load_model` and the images of a family need.

    `load_model` would import it otherwise. Imports are faster inside `fast_imports`.
    """
    for part in family.parts:
        part_class(part)
    for name in (family.text, family.denoiser, family.latents):
        _implementation(name)


def expected_bytes(key: ModelKey, files: BaseFiles) -> int:
    """Return the maximum memory, in bytes, that the weights of a base model will take.

    Raises:
        WeightsFileError: a file is damaged.
    """
    counts = files.parameter_counts()
    total = 0
    for part in files.family.parts:
        size = TORCH_DTYPES[getattr(key, part.precision)].itemsize
        if part.role == "decoder":
            size = torch.float32.itemsize  # some decoders are upcast
        total += counts[part.name] * size
    return total


def _accelerate_on_cpu(
    family: Family,
    denoisers: Sequence[nn.Module],
    decoder: nn.Module,
    path: FastPath | None,
    device: torch.device,
    offload: Offload,
) -> bool:
    """Pack or prepack modules on the CPU; return True if the parts must stay where they are."""
    if path is FastPath.PACKED:
        for denoiser in denoisers:
            pack(denoiser, adapters_follow=True)
        pack(decoder, adapters_follow=False)
        return True
    # Compiled models are not prepacked, because the compiler would have to trace these modules.
    if path is None and device.type == "cpu" and offload == "none":
        for denoiser in denoisers if "prepacked" in family.accelerations else ():
            prepack(denoiser)
        return True
    return False


def _implementation(name: str) -> Any:
    """Return the class that "module:class" names."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)
