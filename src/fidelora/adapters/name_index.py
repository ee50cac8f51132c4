"""Lookup of a base model's modules by the names in adapter files. Does not import torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TypeVar

from fidelora.adapters.module_names import canonical_name
from fidelora.families import Family, Part
from fidelora.families.spec import Stage

_Found = TypeVar("_Found")

_DENOISER_PREFIXES = ("diffusion_model.", "transformer.", "lycoris_", "lora_transformer_", "")
"""Prefixes that adapter files of any family may have, as in ComfyUI: those of ComfyUI, diffusers,
SimpleTuner and OneTrainer, and none (DiffSynth-Studio, PEFT)."""


@dataclass(frozen=True)
class Share:
    """Share of a target's rows that is a module of its own in some adapter files.

    Attributes:
        index: index of the share among `sizes`, which are those of `StackedDelta`.
    """

    target: str
    index: int
    sizes: tuple[int, ...]


class NameIndex:
    """Modules of one base model by the names that adapter files use.

    Adapter files flatten a module's path with underscores
    (`lora_unet_down_blocks_0_attentions_0_proj_in`) or keep its dots
    (`unet.down_blocks.0.attentions.0.proj_in`, PEFT). Both are looked up in the flattened form, and
    so are the names of other code where a family defines them (`Part.other_names`,
    `Part.fused_names`, `Part.accepted_names`).
    """

    def __init__(self, family: Family) -> None:
        self._family = family
        self._names_by_flat: dict[str, tuple[str, ...]] = {}  # several: see `Part.fused_names`
        self._shares_by_flat: dict[str, Share] = {}  # see `Part.accepted_names`

    def add(self, part: Part, layers: Collection[str], norms: Collection[str]) -> None:
        """Add the modules of a part.

        Args:
            layers: paths of the linear and convolutional modules.
            norms: paths of the norms.
        """
        others = part.other_names([*layers, *norms]) if part.other_names else {}
        for path in (*layers, *norms):
            name = f"{part.name}.{path}"
            for spelling in filter(None, (path, others.get(path))):
                flat = _flatten(part, spelling)
                other = self._names_by_flat.setdefault(flat, (name,))
                assert other == (name,), f"{name} and {other} have the same flattened name"
        for fused, paths in (part.fused_names(layers) if part.fused_names else {}).items():
            several = tuple(f"{part.name}.{path}" for path in paths)
            self._names_by_flat[_flatten(part, fused)] = several
        accepted = part.accepted_names(layers) if part.accepted_names else {}
        for path, names in accepted.items():
            name = f"{part.name}.{path}"
            sizes = Counter(names)
            for index, spelling in enumerate(sizes):
                flat = _flatten(part, spelling)
                if len(sizes) == 1:
                    self._names_by_flat[flat] = (name,)
                else:
                    self._shares_by_flat[flat] = Share(name, index, tuple(sizes.values()))

    def find_names(self, module: str, stage: Stage | None = None) -> tuple[str, ...]:
        """Return part and path of each module that an adapter file calls `module`.

        There are several if the file uses the name of a module of the original code that consists
        of these modules (`Part.fused_names`). There is none if the name is unknown.

        Args:
            stage: leaves out the denoisers of other stages; None for all.
        """
        return self._find(module, self._names_by_flat, stage) or ()

    def find_share(self, module: str, stage: Stage | None = None) -> Share | None:
        """Return the share of a module that an adapter file calls `module`; None if unknown.

        Args:
            stage: as in `find_names`.
        """
        return self._find(module, self._shares_by_flat, stage)

    def _find(
        self, module: str, by_flat: Mapping[str, _Found], stage: Stage | None
    ) -> _Found | None:
        """Return the entry of `by_flat` for a name in an adapter file; None if there is none."""
        module = canonical_name(module)
        for part in self._family.parts:
            if stage is not None and part.stage not in (None, stage):
                continue
            others = _DENOISER_PREFIXES if part.role == "denoiser" else ()
            for prefix in (*part.adapter_prefixes, *others):
                if module.startswith(prefix):
                    flat = _flatten(part, module.removeprefix(prefix))
                    if flat in by_flat:
                        return by_flat[flat]
        return None


def _flatten(part: Part, path: str) -> str:
    """Return the key under which a module of this part is looked up."""
    flat = path.replace(".", "_")
    if part.optional_prefix:
        flat = flat.removeprefix(part.optional_prefix.replace(".", "_"))
    return f"{part.name}:{flat}"
