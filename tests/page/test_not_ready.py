"""The page and /docs in a browser, on a server whose base model cannot be loaded."""

from __future__ import annotations

import shutil

import pytest
from playwright.sync_api import expect
from tests.server.serve_support import Server
from tests.support import LORA, TINY_BASE


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    data = tmp_path_factory.mktemp("broken")
    (data / "loras").mkdir()
    shutil.copyfile(LORA, data / "loras" / "sks.safetensors")
    base = shutil.copytree(TINY_BASE, data / "base")
    (base / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"<html>")
    started = Server(data, base, FIDELORA_PAGE="true", HF_HUB_OFFLINE="1")
    yield started
    started.close()


def test_a_banner_has_the_reason_until_the_base_is_repaired(visit, server):
    visitor = visit().open()
    banner = visitor["not-ready"]
    expect(banner).to_contain_text("No images can be made at the moment")
    expect(banner).to_contain_text("is a web page")
    visitor.generate("a ball", lora="sks.safetensors")
    expect(visitor["error"]).to_contain_text("is a web page")
    shutil.copytree(TINY_BASE, server.data / "base", dirs_exist_ok=True)
    expect(banner).to_be_hidden()


def test_the_description_of_the_api_works_without_a_network(visit, server):
    visitor = visit()
    visitor.page.goto(f"{server.url}/docs")
    expect(visitor.page.get_by_text("/v1/inference", exact=True)).to_be_visible()
    visitor.page.get_by_text("/health", exact=True).click()
    visitor.page.get_by_role("button", name="Try it out").click()
    visitor.page.get_by_role("button", name="Execute").click()
    expect(visitor.page.locator(".live-responses-table")).to_contain_text("healthy")
