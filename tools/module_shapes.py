"""Generate the names and shapes of the modules that adapters can change, for each model family.

python -m tools.module_shapes    writes the file (part of `make reference`)

The server reads this file to recognise the family of a LoRA by its header, without torch.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict

from fidelora.engine.adapter_family import default_targets
from fidelora.engine.header_family import SHAPES_FILE
from fidelora.families.registry import built_in_families

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def shapes_text() -> str:
    """Return the contents of the file; see `fidelora.engine.header_family.ModuleTable`.

    Each line has the names that differ only in numbers. Families with equal tables share one.
    """
    tables: dict[str, list[list[object]]] = {}
    lines = []
    for family in built_in_families():
        groups = _groups(family.id)
        same = next((one for one, other in tables.items() if other == groups), None)
        if same is not None:
            lines.append(f"{json.dumps(family.id)}: {json.dumps(same)}")
            continue
        tables[family.id] = groups
        rows = ",\n".join(json.dumps(group) for group in groups)
        lines.append(f"{json.dumps(family.id)}: [\n{rows}\n]")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _groups(model: str) -> list[list[object]]:
    """Return `[pattern, shape, numbers]` for each group of modules of a family's default base."""
    targets = default_targets(model)
    shapes = {name: list(target.weight.shape) for name, target in targets.by_name.items()}
    norms: dict[str, list[int]] = {
        name.rpartition(".")[0]: [] for name, one in targets.vectors.items() if not one.module
    }
    found: dict[tuple[str, tuple[int, ...]], list[str]] = defaultdict(list)
    for name, shape in (shapes | norms).items():
        found[_NUMBER.sub("#", name), tuple(shape)].append(".".join(_NUMBER.findall(name)))
    return [
        [pattern, list(shape), " ".join(numbers)] for (pattern, shape), numbers in found.items()
    ]


def main() -> None:
    """Write the file."""
    SHAPES_FILE.write_text(shapes_text(), encoding="utf-8")


if __name__ == "__main__":
    main()
