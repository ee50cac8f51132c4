"""Event handlers of the tabs without a browser, on a store in memory."""

from __future__ import annotations

import asyncio
import os
import shutil
from contextlib import aclosing

import gradio as gr
import pytest
from structlog.testing import capture_logs
from tests.server.http_support import ByHand, context_in, now

from fidelora.server.page import make_tab as make_module
from fidelora.server.page.form import LABELS, MAX_LORAS, build_request
from fidelora.server.page.lora_list import LoraList
from fidelora.server.page.make_tab import MakeTab
from fidelora.server.page.match_tab import MatchTab
from fidelora.server.page.pictures import PageFiles, Pictures
from fidelora.server.page.verifications import Verifier

TRIGGERS = {"a": "aaa", "b": "bbb", "c": ""}


class FakeLoraList(LoraList):
    """LoRAs with the trigger words of `TRIGGERS`."""

    def trigger(self, paths: list[str]) -> str:
        return next((TRIGGERS[path] for path in paths if TRIGGERS[path]), "")


@pytest.fixture
def context(tmp_path):
    return context_in(tmp_path)


@pytest.fixture
def page_files(tmp_path):
    page_files = PageFiles(tmp_path / "page")
    page_files.empty()
    return page_files


@pytest.fixture
def make(context, page_files):
    lora_list = FakeLoraList(context)
    with gr.Blocks():
        return MakeTab(context, Pictures(context, page_files, lora_list), lora_list)


FIELDS = {
    "trigger_word": "sks",
    "prompt": "a ball",
    "neg": "",
    "model": "sd15",
    "sampler": "ddpm",
    "sample_steps": 4,
    "guidance_scale": 7,
    "width": 64,
    "height": 64,
    "fidelity": "exact",
    "output_format": "png",
}


def form_values(seed="1"):
    """Values of the form's inputs that make a valid request."""
    fields = [FIELDS[name] for name in LABELS]
    return [["sks.safetensors"], *[1.0] * MAX_LORAS, seed, 1, *fields]


def results(make, update):
    """Return an update by output name, without the outputs that keep their value."""
    named = zip(make._outputs, update, strict=True)
    return {name: value for name, value in named if value != gr.skip()}


# --- the form ------------------------------------------------------------------------------


def test_form_values_become_a_request(make):
    request = build_request(make.form.read(form_values()))
    item = request.prompts[0]
    assert [(lora.path, lora.network_multiplier) for lora in request.loras] == [
        ("sks.safetensors", 1.0)
    ]
    assert {
        name: getattr(request if name in type(request).model_fields else item, name)
        for name in FIELDS
    } == FIELDS
    assert item.seed == 1


def changed(make, before, after, trigger, *multipliers):
    """Return paths and multipliers, and the trigger word, after a change of the LoRAs."""
    values = [*multipliers, *[1.0] * (MAX_LORAS - len(multipliers))]
    handled, *sliders, trigger = make.form.update_loras(("sd15", before), after, trigger, *values)
    assert handled == ("sd15", after)
    shown = [slider for slider in sliders if slider["visible"]]
    return [
        (slider["label"].removeprefix("Multiplier of "), slider["value"]) for slider in shown
    ], trigger


def test_a_multiplier_stays_with_its_lora(make):
    assert changed(make, ["a", "b"], ["b"], "", 0.5, 1.25)[0] == [("b", 1.25)]
    assert changed(make, ["a", "b"], ["b", "a"], "", 0.5, 1.25)[0] == [("b", 1.25), ("a", 0.5)]
    assert changed(make, ["a"], ["c"], "", 0.5)[0] == [("c", 1.0)]
    assert changed(make, ["a"], [], "", 0.5)[0] == []


def test_an_unedited_trigger_word_follows_its_lora(make):
    assert changed(make, ["a"], ["b"], "aaa")[1] == "bbb"
    assert changed(make, ["a"], ["c"], "aaa")[1] == ""
    assert changed(make, [], ["b"], "")[1] == "bbb"
    assert changed(make, ["a"], ["b"], "own")[1] == "own"
    assert changed(make, ["a"], ["a", "b"], "aaa")[1] == "aaa"


# --- images -------------------------------------------------------------------------------


def test_a_new_image_becomes_the_selected_one(make, context, monkeypatch):
    """The snippets shown are those of the newest image, not of the image selected before."""
    monkeypatch.setattr(make_module, "_POLL_S", 0)
    worker = ByHand(context)

    async def made(shown, values):
        updates = []
        async for update in make._generate("", shown, *values):
            updates.append(results(make, update))
            if job := worker.claim_one():
                worker.succeed(job)
        return updates[-1]

    async def run():
        shown = (await made([], form_values()))["shown"]
        return await made(shown, form_values(seed="2"))

    last = asyncio.run(run())
    assert len(last["shown"]) == 2
    assert '"seed": 2' in last["recipe"]
    assert last["selected"] == 0


def test_settings_of_a_missing_image_are_refused(make):
    assert "Choose an image." in make._use_settings([], 3)[0].replace("&#46;", ".")


def test_an_image_above_the_size_limit_is_refused(make, tmp_path):
    with (tmp_path / "x.png").open("wb") as file:
        file.truncate(64 * 2**20 + 1)
    assert "at most 67,108,864 bytes" in make._load_image(str(tmp_path / "x.png"))[0]


# --- reloading ----------------------------------------------------------------------------


def test_while_a_job_is_followed_after_a_reload_no_second_one_starts(make, context, monkeypatch):
    monkeypatch.setattr(make_module, "_POLL_S", 0)

    async def run():
        async with aclosing(make._generate("", [], *form_values())) as first:
            job_id = results(make, await anext(first))["job"]
        async with aclosing(make._restore([[job_id, -1]])) as restored:
            begun = results(make, await anext(restored))
            assert begun["job"] == job_id
            assert begun["generate"]["interactive"] is False
            async with aclosing(make._generate(job_id, [], *form_values())) as beside:
                refused = results(make, await anext(beside))
            assert list(refused) == ["progress"]
            assert "is still running" in refused["progress"]
            assert len(context.store.list().jobs) == 1
            context.store.cancel(job_id, now())
            *_, last = [results(make, update) async for update in restored]
        assert last["generate"]["interactive"] is True
        assert last["job"] == ""
        async with aclosing(make._generate(job_id, [], *form_values())) as second:
            assert results(make, await anext(second))["job"] not in ("", job_id)

    asyncio.run(run())


def test_a_removed_job_does_not_keep_the_form_disabled(make):
    async def run():
        return [results(make, update) async for update in make._restore([["gone", -1]])]

    updates = asyncio.run(run())
    assert updates[0]["generate"]["interactive"] is False
    assert updates[-1]["generate"]["interactive"] is True
    assert updates[-1]["job"] == ""


# --- files --------------------------------------------------------------------------------


def test_an_entry_that_cannot_be_removed_is_logged_and_skipped(page_files, monkeypatch):
    for name in ("a", "b"):
        (page_files.files / name).mkdir()
        os.utime(page_files.files / name, (0, 0))
    whole = shutil.rmtree

    def rmtree(path, **given):
        if path.name == "a":
            raise OSError(39, "Directory not empty")
        whole(path, **given)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    with capture_logs() as logs:
        page_files.clean()
    assert [path.name for path in page_files.files.iterdir()] == ["a"]
    assert [entry["event"] for entry in logs] == ["page file not removed"]


def test_the_zip_is_removed_after_its_verification(context, page_files):
    with gr.Blocks():
        match = MatchTab(context, page_files, Verifier("cpu", 60, {}))
    archive = page_files.files / "x.zip"
    archive.write_bytes(b"no zip")

    async def run(step):
        return [update async for update in match._verify(None, str(archive), step, False)]

    assert "is not a step" in asyncio.run(run("x"))[-1][0]
    assert archive.exists()
    last = asyncio.run(run("last"))[-1]
    assert "cannot be unpacked" in last[0]
    assert last[-1] is None
    assert not archive.exists()
