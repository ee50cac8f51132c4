"""Scale of LoRA modules in the metadata that diffusers writes for PEFT. Does not import torch.

The metadata contains the `LoraConfig` of each part of the model, with the part's name before each
field: `unet.lora_alpha`, `text_encoder.use_rslora`. Source: `LoraLayer.update_layer` and
`get_pattern_key` of https://github.com/huggingface/peft, `_create_lora_config` of diffusers.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from fidelora.adapters.module_names import canonical_name
from fidelora.errors import AdapterFormatError, NonFiniteWeightsError
from fidelora.texts import read_json

_FIELDS = frozenset({"lora_alpha", "alpha_pattern", "use_rslora", "use_dora", "alpha", "r"})
_PLAIN_PATTERN = re.compile(r"\^?[\w.]+")
_MAX_PARTS = 16
"""Maximum number of parts in the metadata; pipelines of diffusers have up to 4. The limit bounds
the time of lookups: each module is compared with the names of all parts."""


@dataclass(frozen=True)
class PeftConfig:
    """The fields of one part's `LoraConfig` that affect results.

    Attributes:
        alpha: alpha of modules that no pattern matches; None if the metadata has none.
        alpha_pattern: alpha by the end of a module's path, or by the whole path after `^`.
        uses_rslora: True if the scale is alpha / sqrt(rank) instead of alpha / rank.
        uses_dora: True if the modules have magnitudes.
    """

    alpha: float | None = None
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    uses_rslora: bool = False
    uses_dora: bool = False

    @cached_property
    def _positions(self) -> Mapping[str, int]:
        """Position of each pattern; if several patterns match, the first one is used."""
        return {pattern: position for position, pattern in enumerate(self.alpha_pattern)}

    def alpha_of(self, path: str) -> float | None:
        """Return the alpha of the module with this path in its part."""
        # Each end of the path is looked up instead of comparing each pattern, because hostile
        # metadata can have 100,000 patterns.
        ends = (path[match.end() :] for match in re.finditer(r"\.", path))
        found = [one for one in (f"^{path}", path, *ends) if one in self.alpha_pattern]
        if not found:
            return self.alpha
        return self.alpha_pattern[min(found, key=self._positions.__getitem__)]


class PeftMetadata:
    """Scales in the metadata of an adapter file.

    Args:
        name: name of the file in error messages.

    Raises:
        AdapterFormatError: the metadata cannot be read.
        NonFiniteWeightsError: an alpha is not finite.
    """

    def __init__(self, metadata: Mapping[str, str], name: str) -> None:
        self._name = name
        self._configs: dict[str, PeftConfig] = {}
        self._differ = False
        if "lora_adapter_metadata" not in metadata:
            return
        try:
            fields: dict[str, dict[str, Any]] = defaultdict(dict)
            for key, value in read_json(metadata["lora_adapter_metadata"]).items():
                part, _, field_name = key.rpartition(".")
                if field_name in _FIELDS:
                    fields[part][field_name] = value
            self._configs = {part: _config(found) for part, found in fields.items()}
        except (AttributeError, TypeError, ValueError, OverflowError) as error:
            raise AdapterFormatError(
                f"{name} has lora_adapter_metadata that cannot be read; export it again."
            ) from error
        if len(fields) > _MAX_PARTS:
            raise AdapterFormatError(
                f"{name} has PEFT metadata for {len(fields):,} parts of the model; at most "
                f"{_MAX_PARTS} are accepted. Export it again."
            )
        self._differ = len(set(map(repr, self._configs.values()))) > 1
        for part, found in fields.items():
            if "alpha" in found and found["alpha"] != found.get("r"):
                raise AdapterFormatError(
                    f"{name} is a LoKr or LoHa of PEFT whose alpha {found['alpha']} and rank "
                    f"{found.get('r')} differ{f' in {part}' if part else ''}, which is not "
                    "supported. Multiply the weights by alpha / rank and set alpha to the rank."
                )
        for config in self._configs.values():
            alphas = [*config.alpha_pattern.values(), config.alpha or 0.0]
            if not all(map(math.isfinite, alphas)):
                raise NonFiniteWeightsError(
                    f"{name} has an alpha in its PEFT metadata that is not finite; export it again."
                )
            for pattern in config.alpha_pattern:
                if not _PLAIN_PATTERN.fullmatch(pattern):
                    raise AdapterFormatError(
                        f"{name} has the regular expression {pattern} in its PEFT metadata "
                        "(alpha_pattern), which is not supported; write the names of the modules."
                    )

    def alpha_of(self, module: str) -> float | None:
        """Return the alpha of a module that does not store one; None if it is the rank.

        Raises:
            AdapterFormatError: see `_find`.
        """
        config, path = self._find(module)
        return config.alpha_of(path)

    def divisor(self, module: str, rank: int) -> float:
        """Return the number by which PEFT divides alpha: the rank, or its root for rsLoRA."""
        return math.sqrt(rank) if self._find(module)[0].uses_rslora else rank

    def uses_dora(self, module: str) -> bool:
        """Return True if this module has a magnitude according to the metadata."""
        return self._find(module)[0].uses_dora

    def _find(self, module: str) -> tuple[PeftConfig, str]:
        """Return the configuration for a module, and the module's path in its part.

        Raises:
            AdapterFormatError: the metadata has no entry for the module's part, and its entries for
                other parts differ.
        """
        name = canonical_name(module)
        for part, config in self._configs.items():
            if part and name.startswith(f"{part}."):
                return config, name.removeprefix(f"{part}.")
        if "" in self._configs:
            return self._configs[""], name.partition(".")[2] or name
        if self._differ:
            raise AdapterFormatError(
                f"{self._name} has PEFT metadata for {' and '.join(self._configs)}, but none for "
                f"{module}; export it again."
            )
        return next(iter(self._configs.values()), PeftConfig()), name.partition(".")[2] or name


def _config(fields: Mapping[str, Any]) -> PeftConfig:
    pattern = fields.get("alpha_pattern") or {}
    return PeftConfig(
        float(fields["lora_alpha"]) if "lora_alpha" in fields else None,
        {str(key): float(value) for key, value in pattern.items()},
        bool(fields.get("use_rslora")),
        bool(fields.get("use_dora")),
    )
