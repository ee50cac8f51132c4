"""Registry of model families.

A family of this project is a package beside this module and an entry in `_FAMILIES`. Other projects
add a family with an entry point in the group `fidelora.families` that refers to a `Family`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from types import MappingProxyType

from fidelora.errors import UnknownModelError
from fidelora.families.chroma.spec import CHROMA
from fidelora.families.flux.spec import FLEX1, FLUX, FLUX_CFG
from fidelora.families.flux2_klein.spec import FLUX2_KLEIN_4B
from fidelora.families.lumina2.spec import LUMINA2
from fidelora.families.qwen_image.spec import QWEN_IMAGE, QWEN_IMAGE_2512
from fidelora.families.sd.spec import SD15, SDXL
from fidelora.families.spec import Family
from fidelora.families.wan.spec import WAN21_1B, WAN21_14B, WAN22_14B_T2V
from fidelora.families.zimage.spec import ZIMAGE, ZIMAGE_DETURBO, ZIMAGE_TURBO

ENTRY_POINTS = "fidelora.families"

_FAMILIES = (
    SD15, SDXL, ZIMAGE, ZIMAGE_TURBO, ZIMAGE_DETURBO, FLUX, FLEX1, FLUX_CFG, CHROMA,
    FLUX2_KLEIN_4B, QWEN_IMAGE, QWEN_IMAGE_2512, LUMINA2, WAN21_1B, WAN21_14B,
    WAN22_14B_T2V,
)  # fmt: skip


def built_in_families() -> tuple[Family, ...]:
    """Return the families of this package."""
    return _FAMILIES


@cache
def all_families() -> Mapping[str, Family]:
    """Return all families by id: those of this package first, then those of entry points.

    Raises:
        TypeError: an entry point is not a `Family`.
        ValueError: two families have the same id.
    """
    by_id: dict[str, Family] = {}
    found = [
        (f"{ENTRY_POINTS}: {one.name}", one.load()) for one in entry_points(group=ENTRY_POINTS)
    ]
    for origin, family in [*(("fidelora", one) for one in _FAMILIES), *found]:
        if not isinstance(family, Family):
            raise TypeError(f"The entry point {origin} is a {type(family).__name__}, not a Family.")
        if family.id in by_id:
            raise ValueError(
                f"Two model families have the id {family.id!r}; the second is {origin}."
            )
        by_id[family.id] = family
    return MappingProxyType(by_id)


def get_family(model: str) -> Family:
    """Return the family with this id.

    Raises:
        UnknownModelError: there is no family with this id.
    """
    try:
        return all_families()[model]
    except KeyError:
        known = ", ".join(all_families())
        message = f"The model {model!r} is not supported; use one of {known}."
        raise UnknownModelError(message, field="model") from None
