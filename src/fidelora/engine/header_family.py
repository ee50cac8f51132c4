"""Model families that an adapter fits, by its header. Does not import torch.

A server uses this when a file is uploaded or listed. Names and shapes are compared with
`module_shapes.json`, which `tools.module_shapes` generates from the default base of each family.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fidelora.adapters.name_index import NameIndex
from fidelora.adapters.tensor_names import modules_of
from fidelora.embedding_file import embedding_tensors
from fidelora.engine.other_families import made_for_other, other_family
from fidelora.families import Family, all_families, get_family
from fidelora.safetensors_header import Header
from fidelora.texts import listed

SHAPES_FILE = Path(__file__).parent / "module_shapes.json"
"""Groups `[pattern, shape, numbers]` by family id: `#` in a pattern stands for a number, and each
entry of `numbers` gives one module. Norms have an empty shape. A family with the same modules as
another one has the id of that family instead of groups."""


@dataclass(frozen=True)
class HeaderFit:
    """Which of some models an adapter fits.

    Attributes:
        models: ids of the models that it fits.
        problem: sentence about an adapter that fits none of them; empty if it fits one.
    """

    models: tuple[str, ...]
    problem: str


@dataclass(frozen=True)
class _Counts:
    """Number of modules that exist in a family, and of those whose known sizes are the same."""

    matched: int
    same_shapes: int


@dataclass(frozen=True)
class ModuleTable:
    """Names and shapes of the modules of a family's default base that adapters can change."""

    names: NameIndex
    shapes: Mapping[str, tuple[int, ...]]


def fit_header(header: Header, name: str, models: Sequence[str]) -> HeaderFit:
    """Return which of these models an adapter fits, by the names and shapes of its modules.

    Models of families that are not in the table (those of other packages) fit. Shapes decide only
    between families: a base model that is smaller than its family's default one has other shapes.

    Args:
        name: name of the file.
        models: ids of model families, such as those of a server's base models.

    Raises:
        AdapterFormatError: the file is not an adapter of a supported kind.
    """
    modules = modules_of(header, name)
    if not modules:
        keys = set(embedding_tensors(header))
        fitting = tuple(one for one in models if _embedding_keys(get_family(one)) == keys)
        others = [one for one in all_families() if _embedding_keys(get_family(one)) == keys]
        return HeaderFit(fitting, "" if fitting else _problem(others, models, "an embedding"))
    sizes = {module: _sizes(parts, header) for module, parts in modules.items()}
    made_for = header.metadata.get("ss_base_model_version", "")
    counts = {one: _count(sizes, _table(one)) for one in all_families() if one in _groups()}
    total = len(modules)
    lacking = _without_parts(sizes, [one for one in counts if counts[one].matched == total])
    counts = {one: found for one, found in counts.items() if one not in lacking}
    named = [one for one in counts if made_for in get_family(one).adapter_base_versions]
    whole = [one for one, found in counts.items() if found.same_shapes == total]
    title = ""
    if not whole:
        versions = [one for model in counts for one in get_family(model).adapter_base_versions]
        widths = {module: size[1] or 0 for module, size in sizes.items()}
        title = other_family(made_for, widths, versions)
    fitting = tuple(
        one
        for one in models
        if one not in lacking
        and (one not in counts or (not title and _fits(one, counts, total, named, whole)))
    )
    if fitting or title:
        certain = tuple(one for one in fitting if one in named)
        return HeaderFit(certain or fitting, "" if fitting else f"It {made_for_other(title)}")
    most = max(found.matched for found in counts.values())
    likely = [one for one, found in counts.items() if found.matched == most and most * 2 > total]
    return HeaderFit((), _problem(named or whole or likely, models, "an adapter"))


def _without_parts(modules: Iterable[str], complete: Sequence[str]) -> set[str]:
    """Return the families without a part, such as a second text encoder, that the modules are in.

    A smaller base model can lack modules of its family's default one, but it has the same parts.

    Args:
        complete: families in which all modules exist.
    """
    if not complete:
        return set()
    needed = [
        {name.split(".", 1)[0] for module in modules for name in names.find_names(module)}
        for names in (_table(model).names for model in complete)
    ]
    own = {one: {part.name for part in family.parts} for one, family in all_families().items()}
    return {one for one, parts in own.items() if all(some - parts for some in needed)}


def _fits(
    model: str,
    counts: Mapping[str, _Counts],
    total: int,
    named: Sequence[str],
    whole: Sequence[str],
) -> bool:
    """Return True if an adapter of `total` modules fits a family; see `check_family`.

    A base model that is not its family's default one can have other shapes, and other modules.
    Therefore most modules suffice where the metadata names the family, or nothing names another.

    Args:
        named: families that the metadata names.
        whole: families in which all modules exist with their shapes.
    """
    own = counts[model]
    if model in named or not (named or whole):
        return own.matched * 2 > total
    if own.matched < total:
        return False
    if named:
        other = counts[named[0]]
        return other.matched < total or own.same_shapes == total > other.same_shapes
    return model in whole


def _problem(found: Sequence[str], models: Sequence[str], kind: str) -> str:
    """Return a sentence about an adapter that fits none of `models`.

    Args:
        found: families that the adapter is probably for; those in `models` are not named.
        kind: `an adapter` or `an embedding`.
    """
    has = listed([f"{get_family(one).title} ({one})" for one in models])
    found = [one for one in found if one not in models]
    if not found:
        return (
            f"It does not fit any model of this server: {has}. `fidelora inspect` shows which "
            "modules do not match."
        )
    model = found[0]
    spec = get_family(model)
    others = f" (or {listed(found[1:])})" if len(found) > 1 else ""
    return (
        f"It is {kind} for {spec.title}, and this server has no such base model; it has {has}. "
        f"Start the server with `--base-model {model}=BASE`{others} or set it in "
        f'FIDELORA_BASE_MODEL. A request with "model": "{model}" otherwise downloads '
        f"{spec.base_model}."
    )


def _embedding_keys(family: Family) -> set[str]:
    return {part.embedding_key for part in family.text_encoders if part.embedding_key}


def _count(sizes: Mapping[str, tuple[int | None, int | None]], table: ModuleTable) -> _Counts:
    matched = same = 0
    for module, (rows, columns) in sizes.items():
        targets = table.names.find_names(module)
        if share := table.names.find_share(module):
            targets, height = (share.target,), share.sizes[share.index]
        elif targets:
            height = sum(table.shapes[one][0] for one in targets if table.shapes[one])
        else:
            continue
        shape = table.shapes[targets[0]]
        width = shape[1] if shape else None  # norms have no width
        matched += 1
        same += all(one is None or one == own for one, own in ((rows, height), (columns, width)))
    return _Counts(matched, same)


def _sizes(parts: Mapping[str, str], header: Header) -> tuple[int | None, int | None]:
    """Return rows and columns of the weight that a module changes; None if not known.

    The columns of a convolution are its input channels.
    """
    for first, second in (("up", "down"), ("hada_w1_a", "hada_w1_b"), ("diff", "diff")):
        if first in parts and second in parts:
            rows = header.tensors[parts[first]].shape
            columns = header.tensors[parts[second]].shape
            if len(rows) > 1 and len(columns) > 1 and "mid" not in parts:
                return rows[0], columns[1]
    return None, None


@cache
def _groups() -> Mapping[str, Sequence[tuple[str, Sequence[int], str]]]:
    stored = json.loads(SHAPES_FILE.read_text(encoding="utf-8"))
    return {model: stored[one] if isinstance(one, str) else one for model, one in stored.items()}


@cache
def _table(model: str) -> ModuleTable:
    """Return the table of a family that is in the file."""
    family = get_family(model)
    shapes: dict[str, tuple[int, ...]] = {}
    for pattern, shape, numbers in _groups()[model]:
        for one in numbers.split(" "):
            given = iter(one.split("."))
            shapes[re.sub("#", lambda _: next(given), pattern)] = tuple(shape)  # noqa: B023
    index = NameIndex(family)
    for part in family.parts:
        if part.adapter_prefixes:
            prefix = f"{part.name}."
            own = {name.removeprefix(prefix): shape for name, shape in shapes.items()
                   if name.startswith(prefix)}  # fmt: skip
            index.add(
                part,
                [path for path, shape in own.items() if shape],
                [path for path, shape in own.items() if not shape],
            )
    return ModuleTable(index, shapes)
