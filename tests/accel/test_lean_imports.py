"""Imports of an engine without `torch.distributed` and torch's compiler."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import pytest
from tests.support import TINY_BASE, TINY_FLUX, TINY_SDXL, TINY_ZIMAGE

from fidelora import Engine, Recipe
from fidelora.families import get_family

MODELS = {
    "sd15": TINY_BASE,
    "sdxl": TINY_SDXL,
    "flux": TINY_FLUX,
    "zimage": TINY_ZIMAGE,
}

MAKE_IMAGE = """
import hashlib, json, sys
import torch
from fidelora import Recipe
from fidelora.cli.console import make_engine

recipes = [Recipe(**settings) for settings in json.loads(sys.argv[1])]
engine = make_engine("cpu", first=recipes[0])
images = [engine.generate(recipe).pixels for recipe in recipes]
print(json.dumps({
    "images": [hashlib.sha256(pixels.tobytes()).hexdigest() for pixels in images],
    "loaded": [name for name in ("sympy", "torch._dynamo") if name in sys.modules],
    "distributed": torch.distributed.is_available(),
}))
"""

IMPORT_ALL = """
from fidelora.accel.lean_imports import lean_imports

with lean_imports():
    from fidelora.engine.model import import_family
    from fidelora.families import all_families
    for family in all_families().values():
        import_family(family)
import sys
assert "torch._dynamo" not in sys.modules
import torch
print(torch.compile(torch.sin, backend="eager")(torch.zeros(1)).item())
"""

LOAD_COMPILER = """
import sys
from fidelora.accel.lean_imports import lean_imports

with lean_imports():
    import torch
    assert torch._dynamo.allow_in_graph(len) is len
    assert torch.compiler.disable(len) is len
    {use}
    assert torch._dynamo.__spec__.origin.endswith("__init__.py")
    assert torch._dynamo is sys.modules["torch._dynamo"]
    assert type(torch._dynamo).__name__ == "module"
assert torch._dynamo is sys.modules["torch._dynamo"]
print(torch.compile(torch.sin, backend="eager")(torch.zeros(1)).item())
"""
OTHER_USES = (
    "assert torch._dynamo.config.recompile_limit > 0",
    "from torch._dynamo.trace_rules import is_callable_allowed",
    "import torch._dynamo.trace_rules as rules; assert rules.__spec__.origin",
)


def run(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("model", MODELS)
def test_every_sampler_gives_the_same_bits_after_lean_imports(model):
    """Some samplers need libraries that are optional elsewhere, such as SciPy for `k_lms`."""
    settings = {
        "model": model,
        "base_model": str(MODELS[model]),
        "prompt": "a ball",
        "width": 64,
        "height": 64,
        "steps": 2,
    }
    each = [settings | {"sampler": sampler} for sampler in get_family(model).samplers]
    found = json.loads(run(MAKE_IMAGE, json.dumps(each)))
    engine = Engine(device="cpu")
    images = [engine.generate(Recipe(**one)).pixels for one in each]
    assert found == {
        "images": [hashlib.sha256(pixels.tobytes()).hexdigest() for pixels in images],
        "loaded": [],
        "distributed": True,
    }


def test_all_families_can_be_imported_and_the_rest_afterwards():
    assert run(IMPORT_ALL) == "0.0\n"


@pytest.mark.parametrize("use", OTHER_USES, ids=("attribute", "from a module", "module"))
def test_any_use_of_the_compiler_except_decorators_loads_it(use):
    assert run(LOAD_COMPILER.format(use=use)) == "0.0\n"
