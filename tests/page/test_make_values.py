"""What the tabs of the page do, without a browser: their handlers on a store in memory."""

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
from fidelora.server.page.form import MAX_LORAS
from fidelora.server.page.lora_list import LoraList
from fidelora.server.page.make_tab import Make
from fidelora.server.page.match_tab import Match
from fidelora.server.page.pictures import PageFiles, Pictures
from fidelora.server.page.verifications import Verifier

TRIGGERS = {"a": "aaa", "b": "bbb", "c": ""}


class OwnLibrary(LoraList):
    """LoRAs with these triggers."""

    def trigger(self, names: list[str]) -> str:
        return next((TRIGGERS[name] for name in names if TRIGGERS[name]), "")


@pytest.fixture
def context(tmp_path):
    return context_in(tmp_path)


@pytest.fixture
def place(tmp_path):
    place = PageFiles(tmp_path / "page")
    place.empty()
    return place


@pytest.fixture
def make(context, place):
    library = OwnLibrary(context)
    with gr.Blocks():
        return Make(context, Pictures(context, place, library), library)


@pytest.fixture
def form(make):
    """Values of the form that make a request."""
    sliders = [1.0] * MAX_LORAS
    return [
        ["sks.safetensors"],
        *sliders,
        "sks",
        "a ball",
        "",
        "sd15",
        "ddpm",
        4,
        7,
        64,
        64,
        "1",
        1,
        "exact",
        "png",
    ]


def results(make, update):
    """An update by component; without those that stay as they are."""
    names = {
        id(component): name
        for name, component in vars(make).items()
        if not isinstance(component, list)
    }
    return {
        names[id(component)]: value
        for component, value in zip(make._results, update, strict=True)
        if value != gr.skip()
    }


# --- the form ----------------------------------------------------------------------------------------------------------


def changed(make, before, after, trigger, *multipliers):
    """Names and multipliers, and the trigger word, after another choice of LoRAs."""
    values = [*multipliers, *[1.0] * (MAX_LORAS - len(multipliers))]
    known, *sliders, trigger = make._loras_changed(("sd15", before), after, trigger, *values)
    assert known == ("sd15", after)
    shown = [slider for slider in sliders if slider["visible"]]
    return [
        (slider["label"].removeprefix("Multiplier of "), slider["value"]) for slider in shown
    ], trigger


def test_a_multiplier_stays_with_its_lora(make):
    assert changed(make, ["a", "b"], ["b"], "", 0.5, 1.25)[0] == [("b", 1.25)]
    assert changed(make, ["a", "b"], ["b", "a"], "", 0.5, 1.25)[0] == [("b", 1.25), ("a", 0.5)]
    assert changed(make, ["a"], ["c"], "", 0.5)[0] == [("c", 1.0)]
    assert changed(make, ["a"], [], "", 0.5)[0] == []


def test_a_trigger_word_that_nobody_wrote_goes_with_its_lora(make):
    assert changed(make, ["a"], ["b"], "aaa")[1] == "bbb"
    assert changed(make, ["a"], ["c"], "aaa")[1] == ""
    assert changed(make, [], ["b"], "")[1] == "bbb"
    assert changed(make, ["a"], ["b"], "own")[1] == "own"
    assert changed(make, ["a"], ["a", "b"], "aaa")[1] == "aaa"


# --- images ------------------------------------------------------------------------------------------------------------


def test_the_image_whose_recipe_is_shown_is_the_chosen_one(make, form, context, monkeypatch):
    """A new image is shown in the place of the one that was chosen before it."""
    monkeypatch.setattr(make_module, "_LOOK_EVERY_S", 0)
    worker = ByHand(context)

    async def made(shown, values):
        updates = []
        async for update in make._generate("", shown, *values):
            updates.append(results(make, update))
            if job := worker.claim_one():
                worker.succeed(job)
        return updates[-1]

    async def run():
        shown = (await made([], form))["shown"]
        return await made(shown, [*form[:-4], "2", *form[-3:]])

    last = asyncio.run(run())
    assert len(last["shown"]) == 2
    assert '"seed": 2' in last["recipe_text"]
    assert last["chosen"] == 0


def test_settings_of_an_image_that_is_not_there_are_not_used(make):
    assert "Choose an image." in make._use([], 3)[0].replace("&#46;", ".")


def test_an_image_that_is_larger_than_images_are_is_not_read(make, tmp_path):
    with (tmp_path / "x.png").open("wb") as file:
        file.truncate(64 * 2**20 + 1)
    assert "more than 67,108,864 bytes" in make._load_image(str(tmp_path / "x.png"))[0]


# --- reloading ---------------------------------------------------------------------------------------------------------


def test_while_a_request_is_followed_after_a_reload_there_is_no_second(
    make, form, context, monkeypatch
):
    monkeypatch.setattr(make_module, "_LOOK_EVERY_S", 0)

    async def run():
        async with aclosing(make._generate("", [], *form)) as first:
            job_id = results(make, await anext(first))["job"]
        async with aclosing(make._restore([[job_id, -1]])) as restored:
            begun = results(make, await anext(restored))
            assert begun["job"] == job_id
            assert begun["go"]["interactive"] is False
            async with aclosing(make._generate(job_id, [], *form)) as beside:
                refused = results(make, await anext(beside))
            assert list(refused) == ["progress"]
            assert "has not ended" in refused["progress"]
            assert len(context.store.list().jobs) == 1
            context.store.cancel(job_id, now())
            *_, last = [results(make, update) async for update in restored]
        assert last["go"]["interactive"] is True
        assert last["job"] == ""
        async with aclosing(make._generate(job_id, [], *form)) as second:
            assert results(make, await anext(second))["job"] not in ("", job_id)

    asyncio.run(run())


def test_a_request_that_was_removed_does_not_keep_the_form_closed(make):
    async def run():
        return [results(make, update) async for update in make._restore([["gone", -1]])]

    updates = asyncio.run(run())
    assert updates[0]["go"]["interactive"] is False
    assert updates[-1]["go"]["interactive"] is True
    assert updates[-1]["job"] == ""


# --- files -------------------------------------------------------------------------------------------------------------


def test_what_cannot_be_removed_is_told_and_the_rest_is_removed(place, monkeypatch):
    for name in ("a", "b"):
        (place.files / name).mkdir()
        os.utime(place.files / name, (0, 0))
    whole = shutil.rmtree

    def rmtree(path, **given):
        if path.name == "a":
            raise OSError(39, "Directory not empty")
        whole(path, **given)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    with capture_logs() as logs:
        place.clean()
    assert [path.name for path in place.files.iterdir()] == ["a"]
    assert [entry["event"] for entry in logs] == ["page_file_not_removed"]


def test_the_zip_is_removed_when_its_verification_has_ended(context, place):
    with gr.Blocks():
        match = Match(context, place, Verifier("cpu", 60, {}))
    archive = place.files / "x.zip"
    archive.write_bytes(b"no zip")

    async def run(step):
        return [update async for update in match._verify(None, str(archive), step, False)]

    assert "is no step" in asyncio.run(run("x"))[-1][0]
    assert archive.exists()
    last = asyncio.run(run("last"))[-1]
    assert "cannot be unpacked" in last[0]
    assert last[-1] is None
    assert not archive.exists()
