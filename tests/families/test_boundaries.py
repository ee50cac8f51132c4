"""Model families are independent of each other, and other code does not name their parts."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import fidelora
from fidelora.families import all_families

SOURCE = Path(fidelora.__file__).parent
FAMILIES = {path.parent.name: path.parent for path in (SOURCE / "families").glob("*/spec.py")}
# Words that are keys of files or of an API, not parts of a model.
ALLOWED = {
    ("images/a1111_prompt.py", "unet"),  # `<lora:name:te=1:unet=1>`
    ("explain/web_ui_text.py", "unet"),  # the same tag
    ("loras/describe.py", "text_encoder"),  # prefixes of tensor names in LoRA files
    ("api/recipes.py", "transformer"),  # a field of the API
    ("server/page/form.py", "transformer"),  # the same field
    ("server/page/snippets.py", "transformer"),  # the same field
    ("cli/inspect.py", "text_encoder"),  # a key of its JSON
    ("engine/model.py", "text_encoder"),  # a role
    ("engine/first_image.py", "text_encoder"),  # the same
    ("weights/configs.py", "text_encoder"),  # how model_index.json begins the names of encoders
}


def imported_names(code: str) -> Iterator[str]:
    """Yield the full name of everything that the code imports."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (one.name for one in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports are not resolved here"
            yield from (f"{node.module}.{one.name}" for one in node.names)


def test_no_family_imports_another():
    for name, folder in FAMILIES.items():
        others = [f"fidelora.families.{other}." for other in FAMILIES if other != name]
        for path in folder.rglob("*.py"):
            imported = [f"{one}." for one in imported_names(path.read_text(encoding="utf-8"))]
            assert imported or path.name == "__init__.py", path
            assert not [one for one in imported if one.startswith(tuple(others))], path


def test_code_outside_families_does_not_name_their_parts():
    parts = {part.name for family in all_families().values() for part in family.parts} - {"vae"}
    found = set()
    for path in SOURCE.rglob("*.py"):
        name = path.relative_to(SOURCE).as_posix()
        if name.startswith("families/"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and node.value in parts:
                found.add((name, node.value))
            if (
                isinstance(node, ast.Attribute)
                and node.attr in parts
                and node.attr != "text_encoder"
            ):
                found.add((name, node.attr))
    assert found == ALLOWED
