"""The model families by id. A family is added with one file beside this one and one entry in `_FAMILIES`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from fidelora.errors import UnknownModelError
from fidelora.families.sd.sd15 import SD15
from fidelora.families.sd.sdxl import SDXL
from fidelora.families.spec import Family

_FAMILIES = (SD15, SDXL)
_by_id: dict[str, Family] = {}


def register(spec: Family) -> None:
    """Add a family.

    Raises:
        ValueError: its id is taken.
    """
    if spec.id in _by_id:
        raise ValueError(f"the model id {spec.id!r} is registered already")
    _by_id[spec.id] = spec


def get_family(model_id: str) -> Family:
    """The family of this id.

    Raises:
        UnknownModelError: there is none.
    """
    try:
        return _by_id[model_id]
    except KeyError:
        known = ", ".join(_by_id)
        raise UnknownModelError(
            f"There is no model {model_id!r}; the models are: {known}.", field="model"
        ) from None


def all_families() -> Mapping[str, Family]:
    """All families by id, in the order of their registration."""
    return MappingProxyType(_by_id)


for _family in _FAMILIES:
    register(_family)
