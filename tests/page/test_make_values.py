"""Event handlers of the tabs without a browser, on a store in memory."""

from __future__ import annotations

import asyncio
import html
import os
import shutil
import time
from typing import Any

import gradio as gr
import pytest
from structlog.testing import capture_logs
from tests.server.http_support import ManualWorker, context_in, now
from tests.support import GOLDEN_JOBS, LORA

from fidelora.errors import UsageError
from fidelora.jobs.job import new_job
from fidelora.recipe import Recipe
from fidelora.server import job_watcher
from fidelora.server.access import UNRESTRICTED
from fidelora.server.page.form import LABELS, MAX_LORAS, build_request
from fidelora.server.page.lora_list import LoraList
from fidelora.server.page.make_tab import MakeTab
from fidelora.server.page.match_messages import verdict
from fidelora.server.page.match_tab import MatchTab
from fidelora.server.page.pictures import PageFiles, Pictures
from fidelora.server.page.request_queue import Session
from fidelora.server.page.visitor import acting_for
from fidelora.server.verifier import Outcome, Verifier

EMBEDDING = GOLDEN_JOBS / "embed" / "zrkk.safetensors"
TRIGGERS = {"a": "aaa", "b": "bbb", "c": ""}


class FakeLoraList(LoraList):
    """LoRAs with the trigger words of `TRIGGERS`."""

    def trigger(self, paths: list[str]) -> str:
        return next((TRIGGERS[path] for path in paths if TRIGGERS.get(path)), "")


@pytest.fixture(autouse=True)
def without_keys():
    """Run the handlers for the visitor of a server without keys."""
    with acting_for(UNRESTRICTED):
        yield


@pytest.fixture
def context(tmp_path, request):
    return context_in(tmp_path, **getattr(request, "param", {}))


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
    "emphasis": "none",
    "model": "sd15",
    "sampler": "ddpm",
    "sample_steps": 4,
    "guidance_scale": 7,
    "width": 64,
    "height": 64,
    "num_frames": 1,
    "fps": 16,
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
    } == FIELDS | {"num_frames": None, "fps": None}  # hidden, because the model makes images
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


# --- requests and images ------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(job_watcher, "POLL_INTERVAL_S", 0.002)


async def sent(make, session, seed="1", history=()):
    """Send the form; returns its updates."""
    return results(make, await make._generate(session, list(history), *form_values(seed)))


async def followed(make, session, act=lambda: None):
    """Follow the session's requests to their end; returns the merged updates."""
    merged: dict[str, Any] = {}
    async for update in make._follow(session):
        merged |= results(make, update)
        act()
    return merged


def test_requests_queue_up_and_all_their_images_are_shown(make, context):
    """The snippets shown are those of the newest image, not of the image selected before."""
    session, worker = Session(), ManualWorker(context)

    def work():
        if job := worker.claim_one():
            worker.succeed(job)

    async def run():
        first = await sent(make, session)
        assert first["cancel"]["interactive"]
        assert not first["cancel_all"]["visible"]
        second = await sent(make, session, seed="2")
        assert second["cancel_all"]["visible"]
        assert len(second["remembered"]) == 2
        session.selected = 1
        return await followed(make, session, work)

    last = asyncio.run(run())
    assert len(session.shown) == 2
    assert session.pending == []
    assert last["remembered"] == session.shown
    assert '"seed": 2' in last["recipe"]
    assert session.selected == 0
    assert "all 2 images" in last["download"]
    assert not last["cancel"]["interactive"]
    assert not last["cancel_all"]["visible"]
    assert "Done in" in html.unescape(last["progress"])


def test_a_refused_form_keeps_the_pending_requests(make, context):
    session = Session()

    async def run():
        await sent(make, session)
        return await sent(make, session, seed="x")

    refused = asyncio.run(run())
    assert list(refused) == ["error"]
    assert "is not a whole number" in html.unescape(refused["error"])
    assert len(session.pending) == len(context.store.list().jobs) == 1


@pytest.mark.parametrize("context", [{"queue_size": 2}], indirect=True)
def test_a_full_queue_is_reported_beside_the_button(make, context):
    async def run():
        return await sent(make, Session())

    for _ in range(2):
        context.store.add(new_job((Recipe(prompt="a"),), now()))
    assert "queue is full" in html.unescape(asyncio.run(run())["error"])


def test_sent_prompts_are_remembered_once_each(make):
    async def run():
        history = [("old", ""), (FIELDS["prompt"], FIELDS["neg"])]
        return await sent(make, Session(), history=history)

    update = asyncio.run(run())
    assert update["stored_history"] == [(FIELDS["prompt"], FIELDS["neg"]), ("old", "")]
    assert update["history"]["choices"] == [("a ball", 0), ("old", 1)]
    prompt = make._use_prompt(1, update["stored_history"])[1:]
    assert prompt == ["old", ""]
    for index, stored in ((None, []), (0, "x"), (2, [["a", "b"]]), (0, [["a", 1]])):
        assert make._use_prompt(index, stored) == [gr.skip()] * 3


def test_settings_of_a_missing_image_are_refused(make):
    message = make._use_settings(Session(selected=3))[0]
    assert "Choose an image." in html.unescape(message)


def test_an_image_above_the_size_limit_is_refused(make, tmp_path):
    with (tmp_path / "x.png").open("wb") as file:
        file.truncate(64 * 2**20 + 1)
    assert "at most 67,108,864 bytes" in html.unescape(
        make.loader.load_image(tmp_path / "x.png")[0]
    )


def test_a_recipe_of_a_family_without_base_model_is_refused(make):
    with pytest.raises(UsageError, match=r"made with .*XL.* for Stable Diffusion 1\.5"):
        make.loader.show_recipe(Recipe(prompt="a", model="sdxl"), "png")


# --- uploads ------------------------------------------------------------------------------


def dropped(make, *files, chosen=()):
    """Drop files; returns the message and the chosen LoRAs."""
    values = (("sd15", list(chosen)), list(chosen), "", *[1.0] * MAX_LORAS)
    zone, *update = make.loader.take([str(file) for file in files], *values)
    assert zone is None
    by_output = dict(zip(map(id, make.form.outputs), update, strict=True))
    message = html.unescape(by_output[id(make.prompts.loaded)])
    return message, by_output[id(make.prompts.loras)]


def test_dropped_loras_are_stored_and_chosen(make, context, page_files):
    files = []
    for name, source in (("a.safetensors", LORA), ("b.SAFETENSORS", EMBEDDING)):
        files.append(page_files.files / name)
        shutil.copyfile(source, files[-1])
    broken = page_files.files / "broken.safetensors"
    broken.write_bytes(b"no header")
    message, loras = dropped(make, *files, broken, chosen=["c"])
    assert "Added uploads/a.safetensors, uploads/b.SAFETENSORS." in message
    assert "broken.safetensors" in message
    assert loras["value"] == ["c", "uploads/a.safetensors", "uploads/b.SAFETENSORS"]
    assert not any(file.exists() for file in (*files, broken))
    assert (context.settings.loras / "uploads" / "a.safetensors").is_file()


@pytest.mark.parametrize(
    ("context", "expected"),
    [
        ({}, "uploads/flux.safetensors was stored. It is an adapter for FLUX.1, and this server"),
        (
            {"base_model": "sd15=a,flux=b"},
            "Added uploads/a.safetensors (for Stable Diffusion 1.5).",
        ),
        ({"base_model": "sd15=a,flux=b"}, "Added uploads/flux.safetensors (for FLUX.1)."),
    ],
    indirect=["context"],
)
def test_the_model_of_a_dropped_lora_is_said_at_once(make, page_files, expected):
    flux = GOLDEN_JOBS / "flux_bf16_save_f32" / "flux_bf16_save_f32.safetensors"
    for name, source in (("a.safetensors", LORA), ("flux.safetensors", flux)):
        shutil.copyfile(source, page_files.files / name)
    message, _ = dropped(make, *page_files.files.glob("*.safetensors"))
    assert expected in message


def test_a_lora_above_the_size_limit_is_refused(make, context, page_files):
    file = page_files.files / "x.safetensors"
    with file.open("wb") as opened:
        opened.truncate(context.settings.lora_max_mb * 2**20 + 1)
    message, loras = dropped(make, file)
    assert "is too large" in message
    assert loras["value"] == []


@pytest.mark.parametrize(
    ("name", "words"), [("run.zip", "drop the zip of a training run on the tab Match"),
                        ("a.ckpt", "Drop a LoRA (.safetensors), or an image or video")]
)  # fmt: skip
def test_other_dropped_files_are_refused_with_what_to_do(make, page_files, name, words):
    file = page_files.files / name
    file.write_bytes(b"PK")
    message, _ = dropped(make, file)
    assert words in message
    assert not file.exists()


def test_an_image_is_not_dropped_together_with_other_files(make, page_files):
    files = [page_files.files / "a.png", page_files.files / "b.png"]
    assert "Drop an image alone" in dropped(make, *files)[0]


def test_an_embedding_in_the_prompt_is_offered_and_has_no_multiplier(make, context):
    shutil.copyfile(EMBEDDING, context.settings.loras / "zrkk.safetensors")
    row, text, path = make.form._find_embedding("a photo of zrkk.", [])
    assert row["visible"]
    assert "contains zrkk, the word of the embedding zrkk.safetensors" in html.unescape(text)
    for prompt, chosen in (("zrkk", [path]), ("zrkks", []), ("a ball", [])):
        assert not make.form._find_embedding(prompt, chosen)[0]["visible"]
    sliders = make.prompts.sliders([(path, 0.5), ("sks.safetensors", 0.5)])
    assert [slider["visible"] for slider in sliders[:2]] == [False, True]
    assert [slider["value"] for slider in sliders[:2]] == [1.0, 0.5]


# --- reloading ----------------------------------------------------------------------------


def test_after_a_reload_pending_requests_are_followed_and_more_can_be_sent(make, context):
    session = Session()

    async def run():
        await sent(make, session)
        (job_id,) = session.pending
        reloaded = Session()
        gone = "0" * 32
        entries = [[job_id, -1], [gone, -1], [gone, 0], [1, 2], "x", [job_id], ["<b>", -1]]
        restored = results(make, await make._restore(reloaded, entries, [["a ball", ""]]))
        assert restored["history"]["choices"] == [("a ball", 0)]
        assert reloaded.pending == [job_id, gone]
        second = await sent(make, reloaded, seed="2")
        assert second["cancel"]["interactive"]
        context.store.cancel(job_id, now())
        context.store.cancel(reloaded.pending[-1], now())
        return reloaded, await followed(make, reloaded)

    reloaded, last = asyncio.run(run())
    assert reloaded.pending == []
    assert html.unescape(last["progress"]).count("Canceled.") == 2
    assert last["remembered"] == []
    assert not last["cancel"]["interactive"]


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
        page_files.clean(time.time())
    assert [path.name for path in page_files.files.iterdir()] == ["a"]
    assert [entry["event"] for entry in logs] == ["page folder not removed"]


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


# --- messages -----------------------------------------------------------------------------


def test_a_failed_verification_is_shown_without_lists_of_modules():
    line = (
        "error: sks does not fit this Stable Diffusion 1.5 base model; 3 of 5 modules do not exist "
        "in it: a.b, c, d and 3 more; 7 of 9 modules have the wrong shape: a has the shape [1, 2] "
        "instead of [3, 4], b, c and 4 more. Use it with the base model that it was trained on."
    )
    assert html.unescape(verdict(Outcome(2, None), [line])).endswith(
        ">sks does not fit this Stable Diffusion 1.5 base model; 3 of 5 modules do not exist in "
        "it; 7 of 9 modules have the wrong shape. Use it with the base model that it was trained "
        "on. The output has the details.</div>"
    )
    short = html.unescape(verdict(Outcome(2, None), ["error: The folder x: y is bad."]))
    assert short.endswith(">The folder x: y is bad.</div>")
