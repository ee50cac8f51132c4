"""Requests without LoRAs, queues, uploads, keyboard and contrast, in a browser."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import expect
from tests.page.browser_support import pixels
from tests.server.serve_support import Server
from tests.support import GOLDEN_JOBS, MINIATURE_LORA

EMBEDDING = GOLDEN_JOBS / "embed" / "zrkk.safetensors"
SLOW = {"steps": 150, "width": 512, "height": 512}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    data = tmp_path_factory.mktemp("requests")
    (data / "loras").mkdir()
    for name in ("one", "other"):
        shutil.copyfile(MINIATURE_LORA, data / "loras" / f"{name}.safetensors")
    started = Server(
        data,
        "fidelora:miniature",
        FIDELORA_PAGE="true",
        OMP_NUM_THREADS="1",
        HF_HUB_OFFLINE="1",
    )
    started.ready()
    yield started
    started.close()


def statuses(server):
    """Return the statuses of the newest four requests, newest first."""
    return [one["status"] for one in server.call("/v1/requests?limit=4")["requests"]]


def test_an_image_without_a_lora_is_made_and_its_snippets_reproduce_it(
    visitor, server, tmp_path, monkeypatch
):
    expect(visitor["head"]).to_contain_text("Base model: fidelora:miniature (Stable Diffusion 1.5)")
    for side in ("width", "height"):  # the size that this base model was trained at
        expect(visitor.field(side)).to_have_value("128")
    expect(visitor.field("preset")).to_have_value("128 x 128 (1:1)")
    visitor.generate("a red star")
    image = pixels(visitor.file(visitor.images(1)[0]))
    expect(visitor["gallery"]).to_contain_text("seed 7 · no LoRA")
    texts = {}
    for tab, element in (("Request", "request"), ("Python", "python")):
        visitor.page.get_by_role("tab", name=tab, exact=True).click()
        texts[element] = visitor[element].locator(".cm-content").inner_text()
    expect(visitor["request"]).to_contain_text("POST /v1/replay")
    accepted = server.call("/v1/replay", json.loads(texts["request"]))
    made = server.wait(accepted["request_id"], "succeeded")
    result = server.call(f"/v1/requests/{made['request_id']}/result")
    monkeypatch.chdir(tmp_path)
    exec(compile(texts["python"], "copied", "exec"), {})
    (saved,) = (tmp_path / "pictures").iterdir()
    for file in (result["outputs"]["images"][0]["file_path"], saved):
        assert np.array_equal(pixels(Path(file).read_bytes()), image)
    visitor["use"].click()
    expect(visitor["loaded"]).to_contain_text("this server makes the same image again")


def test_several_requests_queue_up_and_are_canceled(visitor, server):
    canceled = visitor["progress"].get_by_text("Canceled.")
    visitor.generate("star number 0", **SLOW)
    expect(visitor["cancel"]).to_be_enabled()
    for number in (1, 2, 3):
        visitor.generate(f"star number {number}", **SLOW)
        expect(visitor["waiting"]).to_contain_text(f"star number {number}")
    expect(visitor["progress"]).to_contain_text("star number 0")
    expect(visitor["error"].locator(".message")).to_have_count(0)
    visitor["waiting"].get_by_title("Cancel “star number 3”").click()
    expect(canceled).to_have_count(1)
    expect(visitor["waiting"]).not_to_contain_text("star number 3")
    assert statuses(server)[0] == "canceled"
    visitor["cancel"].click()
    expect(canceled).to_have_count(2)
    expect(visitor["progress"].locator("progress")).to_be_visible()
    assert statuses(server) == ["canceled", "in_queue", "in_progress", "canceled"]
    visitor["cancel-all"].click()
    expect(canceled).to_have_count(4)
    expect(visitor["cancel"]).to_be_disabled()
    expect(visitor["cancel-all"]).not_to_be_visible()
    assert statuses(server) == ["canceled"] * 4

    visitor.generate("a red star", seed=1)
    visitor.images(1)
    visitor["generate"].dblclick()
    images = visitor.images(2)
    visitor.wait_until_done()
    expect(visitor["progress"]).not_to_contain_text("Canceled.")
    with visitor.page.expect_download() as download:
        visitor["download-all"].get_by_role("link", name="Download all 2 images").click()
    with zipfile.ZipFile(download.value.path()) as packed:
        packed_images = [packed.read(name) for name in packed.namelist()]
    assert packed_images == [visitor.file(image) for image in images]


def test_seeds_sizes_and_prompts_are_reused(visitor):
    visitor["random-seed"].click()
    expect(visitor.field("seed")).to_have_value("")
    expect(visitor["reuse-seed"]).to_be_disabled()
    visitor.field("negative").fill("blurry")
    visitor.generate("a red star", seed="")
    visitor.images(1)
    visitor["reuse-seed"].click()
    expect(visitor.field("seed")).not_to_have_value("")
    expect(visitor["gallery"]).to_contain_text(f"seed {visitor.field('seed').input_value()} ·")

    visitor.choose("preset", "96 x 176")
    expect(visitor.field("width")).to_have_value("96")
    expect(visitor.field("height")).to_have_value("176")
    visitor.field("width").fill("97")
    expect(visitor.field("preset")).to_have_value("Custom")

    visitor.open()
    visitor.images(1)
    visitor.choose("history", "a red star")
    expect(visitor.field("prompt")).to_have_value("a red star")
    expect(visitor.field("negative")).to_have_value("blurry")
    visitor.trouble = [one for one in visitor.trouble if "AbortError" not in one]


def test_loras_and_embeddings_are_dropped_uploaded_and_named(visitor, server, tmp_path):
    dropped, same_name = tmp_path / "new LoRA.safetensors", tmp_path / "a" / "new LoRA.safetensors"
    shutil.copyfile(MINIATURE_LORA, dropped)
    visitor.drop(dropped)
    expect(visitor["loaded"]).to_contain_text("Added uploads/new LoRA.safetensors.")
    expect(visitor["multiplier-0"]).to_contain_text("Multiplier of uploads/new LoRA.safetensors")
    assert visitor.field("trigger").input_value() == "sks"

    with visitor.page.expect_file_chooser() as chooser:
        visitor["upload"].click()
    chooser.value.set_files(EMBEDDING)
    expect(visitor["loras"]).to_contain_text("embedding, 4 tokens · trigger zrkk")
    expect(visitor["multiplier-1"]).not_to_be_visible()
    paths = {one["path"] for one in server.call("/v1/loras")["loras"]}
    assert {"uploads/new LoRA.safetensors", "uploads/zrkk.safetensors"} <= paths

    same_name.parent.mkdir()
    shutil.copyfile(EMBEDDING, same_name)
    visitor.drop(same_name, onto="#prompt")
    expect(visitor["loaded"].get_by_role("alert")).to_contain_text(
        "Another LoRA is called new LoRA.safetensors"
    )
    visitor.open()
    visitor.field("prompt").fill("a photo of zrkk")
    visitor.field("negative").focus()
    expect(visitor["named-embedding"]).to_contain_text("the word of the embedding uploads/zrkk")
    visitor["use-embedding"].click()
    expect(visitor["loras"]).to_contain_text("trigger zrkk")
    expect(visitor["named-embedding"]).not_to_be_visible()
    visitor.trouble = [one for one in visitor.trouble if "AbortError" not in one]


def test_the_lora_list_closes_after_each_choice_and_with_escape(visitor):
    box = visitor.field("loras")
    box.click()
    visitor["loras"].get_by_role("option", name="one.safetensors").click()
    expect(visitor["multiplier-0"]).to_be_visible()
    expect(visitor["loras"].get_by_role("option")).to_have_count(0)
    box.click()
    expect(visitor["loras"].get_by_role("option").first).to_be_visible()
    visitor.page.keyboard.type("other")
    expect(visitor["loras"].get_by_role("option")).to_have_count(1)
    visitor.page.keyboard.press("Enter")
    expect(visitor["multiplier-1"]).to_be_visible()
    expect(visitor["loras"].get_by_role("option")).to_have_count(0)
    expect(box).to_be_focused()
    visitor.page.keyboard.press("ArrowDown")
    expect(visitor["loras"].get_by_role("option").first).to_be_visible()
    visitor.page.keyboard.press("Escape")
    expect(visitor["loras"].get_by_role("option")).to_have_count(0)


def test_control_and_enter_click_the_main_button_of_the_tab(visitor):
    for name, value in (("width", "128"), ("height", "128"), ("steps", "3")):
        visitor.field(name).fill(value)
    visitor.field("prompt").fill("a red star")
    visitor.page.keyboard.press("Control+Enter")
    visitor.images(1)
    assert visitor.field("prompt").input_value() == "a red star"
    visitor.page.get_by_role("tab", name="Compare").click()
    visitor.field("multipliers").press("Control+Enter")
    expect(visitor["progress-compare"]).to_contain_text("Choose at least one checkpoint.")
    visitor.page.get_by_role("tab", name="Match").click()
    visitor.field("step").press("Control+Enter")
    expect(visitor["verdict"]).to_contain_text("Choose a training run")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_enough_contrast(visit, scheme):
    visitor = visit(color_scheme=scheme).open()
    visitor.generate("a red star", lora="one.safetensors", steps="")
    expect(visitor["error"]).to_contain_text("Steps is empty")
    visitor["generate"].hover()
    for tab in ("Make", "Match", "Compare"):
        visitor.page.get_by_role("tab", name=tab).click()
        assert visitor.unreadable_texts() == [], tab


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_code_of_a_recipe_has_enough_contrast(visit, scheme):
    visitor = visit(color_scheme=scheme).open()
    visitor.generate("a red star")
    visitor.wait_until_done()
    for tab, element in (
        ("Recipe", "recipe"),
        ("Request", "request"),
        ("CLI", "command"),
        ("Python", "python"),
    ):
        visitor.page.get_by_role("tab", name=tab, exact=True).click()
        expect(visitor[element].locator(".cm-line").first).to_be_visible()
        assert visitor.unreadable_texts() == [], tab
