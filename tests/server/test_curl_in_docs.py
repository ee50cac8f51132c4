"""The commands with curl in the README, run against a server."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image
from tests.server.serve_support import Server
from tests.support import LORA

from fidelora.images.read import read_origin

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "docs" / "how-to" / "openai-clients.md"]

pytestmark = pytest.mark.skipif(
    any(shutil.which(program) is None for program in ("bash", "curl", "sed", "base64")),
    reason="needs curl, sed and base64",
)


def commands(page: Path, word: str) -> str:
    """Return the shell block of a page that contains `word`, for a small image."""
    pattern = re.compile(r"^```console\n(.*?)^```", re.MULTILINE | re.DOTALL)
    (block,) = [match[1] for match in pattern.finditer(page.read_text()) if word in match[1]]
    return block.replace("512", "64")


def run(server: Server, script: str, folder: Path) -> str:
    local = re.sub(r"(http://)?(127\.0\.0\.1|localhost):8000", server.url, script)
    done = subprocess.run(
        ["bash", "-ec", local], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_one_command_writes_a_png_file(tiny_server, tmp_path, page):
    shutil.copy(LORA, tmp_path / "sks.safetensors")
    upload = next(
        line for line in commands(PAGES[0], "curl -F").splitlines() if line.startswith("curl -F")
    )
    run(tiny_server, upload, tmp_path)
    script = commands(page, "base64 -d").replace('"loras"', '"size": "64x64", "loras"')
    output = run(tiny_server, script, tmp_path)
    content = (tmp_path / "grass.png").read_bytes()
    with Image.open(io.BytesIO(content)) as image:
        assert (image.format, image.size) == ("PNG", (64, 64)), output
    recipe = read_origin(content).recipe
    assert recipe is not None
    assert (recipe.prompt, len(recipe.adapters)) == ("sks on grass", 1)


def test_the_command_writes_no_image_if_the_request_is_refused(tiny_server, tmp_path):
    script = commands(PAGES[1], "base64 -d").replace("sks.safetensors", "missing.safetensors")
    assert "'missing.safetensors' is not in the adapter folder" in run(
        tiny_server, script, tmp_path
    )
    assert not (tmp_path / "grass.png").exists()


def test_an_unfinished_image_is_not_written_to_a_file(tiny_server, tmp_path):
    block = commands(PAGES[0], "REQUEST_ID").replace("REQUEST_ID", "0" * 32)
    fetch = "\n".join(block.splitlines()[-2:])
    assert fetch.startswith("curl -s --fail-with-body -o bicycle.png")
    assert "REQUEST_NOT_FOUND" in run(tiny_server, fetch, tmp_path)
    assert not (tmp_path / "bicycle.png").exists()
