"""The *Make* and *Compare* tabs in a browser, on a server with the miniature model."""

from __future__ import annotations

import io
import json
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from playwright.sync_api import Request, Route, expect
from tests.page.browser_support import HOSTILE, copy_lora, pixels
from tests.server.serve_support import Server
from tests.support import MINIATURE_LORA

from fidelora.cli import main
from fidelora.jobs.api_keys import FileKeys

GREEN = "a green [trigger] on a white background"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    data = tmp_path_factory.mktemp("page")
    loras = data / "loras"
    loras.mkdir()
    shutil.copyfile(MINIATURE_LORA, loras / "sks.safetensors")
    copy_lora(
        MINIATURE_LORA,
        loras / f"{HOSTILE}.safetensors",
        ss_tag_frequency=json.dumps({"1": {HOSTILE + "trigger": 1}}),
    )
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


def test_moving_the_slider_changes_the_next_image(visitor):
    visitor.generate(GREEN, lora="sks.safetensors")
    first = visitor.file(visitor.images(1)[0])
    assert visitor.field("trigger").input_value() == "sks"

    visitor["multiplier-0"].locator("input[type=range]").fill("0.2")
    visitor["generate"].click()
    second = visitor.file(visitor.images(2)[0])

    assert pixels(first).shape == pixels(second).shape == (128, 128, 3)
    assert (pixels(first) != pixels(second)).any()
    expect(visitor["gallery"]).to_contain_text("seed 7 · sks × 0.2")
    expect(visitor["recipe"]).to_contain_text('"multiplier": 0.2')
    visitor["gallery"].locator("button img").first.click()
    opened = visitor["gallery"].locator(".preview").first.bounding_box()
    whole = visitor["gallery"].bounding_box()
    assert opened is not None
    assert whole is not None
    assert opened["width"] > 0.9 * whole["width"], "the image did not fill the gallery"


def test_loras_are_listed_and_found_by_trigger_rank_and_step(visitor):
    visitor.choose("loras", "step 1152")
    expect(visitor["loras"]).to_contain_text("trigger")
    expect(visitor["loras"]).to_contain_text("rank 8/16 · step 1152")


def test_a_long_job_shows_preview_and_time_left_and_can_be_canceled(visitor, server):
    visitor.generate(GREEN, lora="sks.safetensors", steps=150, width=512, height=512, number=4)
    expect(visitor["preview"].locator("img")).to_be_visible()
    expect(visitor["progress"]).to_contain_text("left")
    visitor["cancel"].click()
    expect(visitor["progress"]).to_contain_text("Canceled.")
    assert server.call("/v1/requests?limit=1")["requests"][0]["status"] == "canceled"
    expect(visitor["cancel"]).to_be_disabled()
    expect(visitor["preview"]).not_to_be_visible()


def test_an_image_loaded_into_the_form_is_reproduced(visitor, server, tmp_path):
    """Uses values between slider steps, and a seed above 2**53."""
    prompt = {
        "prompt": "a purple sks, *bold*",
        "width": 136,
        "height": 120,
        "sample_steps": 5,
        "guidance_scale": 6.123,
        "seed": 2**63 - 1,
    }
    body = {"model": "sd15", "loras": [{"path": "sks.safetensors", "network_multiplier": 0.777}]}
    made = server.wait(
        server.call("/v1/inference", body | {"prompts": [prompt | {"sampler": "euler"}]})[
            "request_id"
        ],
        "succeeded",
    )
    output = server.call(f"/v1/requests/{made['request_id']}/result")["outputs"]["images"][0]
    original = Path(output["file_path"]).read_bytes()
    (tmp_path / "original.png").write_bytes(original)

    visitor.drop(tmp_path / "original.png")
    expect(visitor["loaded"]).to_contain_text("this server makes the same image again")
    assert visitor.field("seed").input_value() == str(2**63 - 1)
    visitor["generate"].click()
    again = visitor.file(visitor.images(1)[0])

    assert np.array_equal(pixels(again), pixels(original))
    requests = server.call("/v1/requests?limit=1")["requests"]
    recipe = server.call(f"/v1/requests/{requests[0]['request_id']}/result")["outputs"]["images"][
        0
    ]["recipe"]
    assert recipe == output["recipe"]


def test_an_image_with_a_missing_lora_is_refused(visitor, server, tmp_path):
    visitor.generate(GREEN, lora="sks.safetensors")
    file = visitor.file(visitor.images(1)[0])
    with Image.open(io.BytesIO(file)) as image:
        record = json.loads(image.info["fidelora"])
        record["recipe"]["adapters"][0] |= {"sha256": "ab" * 32, "name": HOSTILE}
        del record["digest"]
        info = PngInfo()
        info.add_itxt("fidelora", json.dumps(record))
        image.save(tmp_path / "other.png", pnginfo=info)
    visitor.drop(tmp_path / "other.png")
    expect(visitor["loaded"]).to_contain_text(
        f"The image needs LoRAs that are not on this server: {HOSTILE} (sha256 {'ab' * 32})"
    )


def test_snippets_reproduce_the_image(visitor, server, tmp_path, monkeypatch):
    visitor.generate('a green [trigger], it\'s "quoted" $HOME', lora="sks.safetensors", seed=11)
    image = pixels(visitor.file(visitor.images(1)[0]))
    texts = {}
    for tab, element in (("Request", "request"), ("CLI", "command"), ("Python", "python")):
        visitor.page.get_by_role("tab", name=tab, exact=True).click()
        texts[element] = visitor[element].locator(".cm-content").inner_text()

    made = server.wait(
        server.call("/v1/inference", json.loads(texts["request"]))["request_id"], "succeeded"
    )
    path = server.call(f"/v1/requests/{made['request_id']}/result")["outputs"]["images"][0][
        "file_path"
    ]
    assert np.array_equal(pixels(Path(path).read_bytes()), image)

    monkeypatch.chdir(tmp_path)
    exec(compile(texts["python"], "copied", "exec"), {})
    assert np.array_equal(pixels(next((tmp_path / "pictures").iterdir()).read_bytes()), image)

    shutil.copyfile(MINIATURE_LORA, tmp_path / "sks.safetensors")
    monkeypatch.setattr(sys, "argv", shlex.split(texts["command"], comments=True))
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    assert np.array_equal(pixels((tmp_path / "fidelora_11.png").read_bytes()), image)


def test_the_form_can_be_used_with_the_keyboard_alone(visitor):
    def tab_to(element: str) -> None:
        for _ in range(60):
            visitor.page.keyboard.press("Tab")
            if visitor.page.evaluate(
                f"document.querySelector('#{element}').contains(document.activeElement)"
            ):
                return
        raise AssertionError(f"{element} was not reached")

    press, write = visitor.page.keyboard.press, visitor.page.keyboard.type
    tab_to("loras")
    visitor["loras"].get_by_role("option").first.wait_for()
    write("sks.saf")
    expect(visitor["loras"].get_by_role("option")).to_have_count(1)
    press("Enter")
    press("Escape")
    expect(visitor["multiplier-0"]).to_be_visible()
    tab_to("multiplier-0")
    tab_to("prompt")
    write("a red star")
    for element, value in (("steps", "3"), ("width", "128"), ("height", "128")):
        tab_to(element)
        press("Control+a")
        write(value)
    for _ in range(60):
        press("Shift+Tab")
        if visitor.page.evaluate("document.activeElement.id") == "generate":
            break
    press("Enter")
    visitor.images(1)
    expect(visitor["recipe"]).to_contain_text('"steps": 3')


def test_hostile_names_and_texts_are_escaped(visitor):
    visitor.choose("loras", HOSTILE)
    expect(visitor["multiplier-0"]).to_contain_text(f"Multiplier of {HOSTILE}.safetensors")
    assert visitor.field("trigger").input_value() == HOSTILE + "trigger"
    visitor.field("negative").fill(HOSTILE)
    visitor.generate(f"{HOSTILE} {{{{value}}}} ${{alert(2)}} [trigger]")
    visitor.wait_until_done()
    expect(visitor["gallery"]).to_contain_text(f"seed 7 · {HOSTILE} × 1")
    expect(visitor["recipe"]).to_contain_text(HOSTILE)
    visitor.field("seed").fill(HOSTILE)
    visitor["generate"].click()
    expect(visitor["error"]).to_contain_text(f"Seed: '{HOSTILE}' is not a whole number")
    visitor.field("seed").fill("7")
    visitor["use"].click()
    expect(visitor["loaded"]).to_contain_text("the same image")
    visitor.page.get_by_role("tab", name="Compare").click()
    expect(visitor["about-compare"]).to_contain_text(HOSTILE)
    visitor.field("multipliers").fill(HOSTILE)
    visitor["compare"].click()
    expect(visitor["progress-compare"]).to_contain_text(f"Multipliers: '{HOSTILE}' is not a list")
    assert visitor.page.locator("img[src=x]").count() == 0


def test_invalid_values_show_an_error_and_send_nothing(visitor, server):
    before = len(server.call("/v1/requests")["requests"])
    visitor.generate(GREEN, lora="sks.safetensors", width=63)
    expect(visitor["error"].get_by_role("alert")).to_contain_text(
        "Width is 63; enter a number from 64 to 4096."
    )
    visitor.field("width").fill("128")
    for name, message in (
        ("steps", "Steps is empty; enter a number."),
        ("number", "Images is empty; enter a number."),
    ):
        original = visitor.field(name).input_value()
        visitor.field(name).fill("")
        visitor["generate"].click()
        expect(visitor["error"].get_by_role("alert")).to_contain_text(message)
        visitor.field(name).fill(original)
    assert len(server.call("/v1/requests")["requests"]) == before


def test_a_reload_keeps_the_images_and_the_running_job(visitor):
    visitor.generate(GREEN, lora="sks.safetensors")
    visitor.images(1)
    visitor.generate(GREEN, steps=60, width=256, height=256)
    expect(visitor["preview"].locator("img")).to_be_visible()
    visitor.open()
    visitor.images(2)
    visitor.wait_until_done()
    # Connections that the reload interrupted.
    visitor.trouble = [
        one
        for one in visitor.trouble
        if not any(
            part in one for part in ("AbortError", "Connection errored out", "Failed to fetch")
        )
    ]


def test_a_reload_keeps_the_form(visitor):
    """Changes are kept even if they are made while an earlier change is being stored."""
    held: list[Route] = []  # calls that store the form

    def hold(route: Route) -> None:
        stores = '"sd15","ddpm",25' in (route.request.post_data or "")
        held.append(route) if stores else route.continue_()

    def has_all(request: Request) -> bool:
        values = request.post_data or ""
        return all(one in values for one in ('"sks.safetensors"', '"a blue [trigger]"', ",72,"))

    visitor.page.route("**/run/predict", hold)
    visitor.choose("loras", "sks.safetensors")
    for name, value in {"prompt": "a blue [trigger]", "seed": "", "width": "72"}.items():
        visitor.field(name).fill(value)
    visitor.field("height").focus()
    expect(visitor["preset"].locator("input")).to_have_value("Custom")
    assert len(held) == 1, "the first change was already stored"
    with visitor.page.expect_request(has_all):
        held[0].continue_()
    visitor.page.wait_for_function("localStorage['fidelora-form']?.length > 100")
    first = visitor.page.evaluate("localStorage['fidelora-form']")
    held[1].continue_()
    visitor.page.wait_for_function("first => localStorage['fidelora-form'] !== first", arg=first)
    visitor.open()
    expect(visitor.field("prompt")).to_have_value("a blue [trigger]")
    expect(visitor.field("width")).to_have_value("72")
    expect(visitor.field("seed")).to_have_value("")
    expect(visitor["loras"]).to_contain_text("sks.safetensors")
    expect(visitor["multiplier-0"]).to_be_visible()
    visitor.trouble = [one for one in visitor.trouble if "AbortError" not in one]


def test_values_that_the_server_changes_or_misses_are_reported(visitor):
    visitor.generate("", steps=1, width=100, height=64)
    visitor.wait_until_done()
    expect(visitor["progress"]).to_contain_text("100 x 64 was rounded down to 96 x 64")
    expect(visitor["progress"]).to_contain_text("The prompt is empty")
    visitor.generate("a [trigger]", steps=1, width=64, height=64)
    visitor.wait_until_done()
    expect(visitor["progress"]).to_contain_text("[trigger] stays in the prompt as it is")
    expect(visitor["progress"]).not_to_contain_text("rounded")


def test_the_settings_of_the_selected_image_are_reused(visitor):
    visitor.generate(GREEN, lora="sks.safetensors", seed=1)
    visitor.images(1)
    visitor.generate("a blue star", seed=2, steps=3)
    visitor.images(2)[1].click()
    expect(visitor["recipe"]).to_contain_text('"seed": 1')
    visitor["use"].click()
    expect(visitor["loaded"]).to_contain_text("the same image")
    assert visitor.field("prompt").input_value() == GREEN.replace("[trigger]", "sks")
    assert visitor.field("steps").input_value() == "4"


def test_compare_makes_a_sheet_of_checkpoints_and_multipliers(visitor):
    visitor.choose("loras", "sks.safetensors")
    visitor.field("prompt").fill(GREEN)
    for name in ("width", "height"):
        visitor.field(name).fill("128")
    visitor.field("steps").fill("3")
    visitor.page.get_by_role("tab", name="Compare").click()
    expect(visitor["about-compare"]).to_contain_text("128 x 128 · seed 42 · 3 steps")
    visitor.field("multipliers").fill("0, 1")
    visitor["compare"].click()
    expect(visitor["progress-compare"]).to_contain_text("Done.")
    sheet = pixels(visitor.file(visitor["sheet"].locator("img").first))
    left, right = sheet[-250:, -2 * 262 : -262], sheet[-250:, -262:]
    assert (left != right).any()
    assert sheet.shape[1] > 2 * 256


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_the_width_of_a_phone(visit, scheme):
    visitor = visit(color_scheme=scheme)
    visitor.page.set_viewport_size({"width": 390, "height": 844})
    visitor.open()
    visitor.choose("loras", "sks.safetensors", HOSTILE)
    visitor.generate("w" * 300, steps=1)
    visitor.wait_until_done()
    image = visitor.images(1)[0].bounding_box()
    caption = visitor["gallery"].locator(".caption-label").bounding_box()
    assert caption["y"] >= image["y"] + image["height"] - 1  # below the image, not over it
    tops = [
        visitor[one].bounding_box()["y"]
        for one in ("generate", "progress", "gallery", "image-actions", "steps")
    ]
    assert tops == sorted(tops)  # the result follows the button, before the settings
    assert tops[1] - tops[0] < 100
    colour = visitor.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(colour.partition("(")[2].partition(",")[0]) > 128) == (scheme == "light")
    for tab in ("Make", "Match", "Compare"):
        visitor.page.get_by_role("tab", name=tab).click()
        expect(
            visitor[{"Make": "generate", "Match": "verify", "Compare": "compare"}[tab]]
        ).to_be_visible()
        assert not visitor.scrolls_sideways(), tab


def test_with_api_keys_the_page_asks_for_one(visit, server, tmp_path_factory):
    keys = FileKeys(_keys_file(server))
    key = keys.add("alice")
    visitor = visit()
    try:
        visitor.page.goto(server.url)
        visitor.page.get_by_label("API key").fill("wrong")
        visitor.page.keyboard.press("Enter")
        expect(visitor.page.get_by_role("alert")).to_contain_text(
            "This is not a key of this server."
        )
        assert "403" in visitor.trouble.pop()  # the browser notes the answer's status
        visitor.page.get_by_label("API key").fill(key)
        visitor.page.keyboard.press("Enter")
        expect(visitor["generate"]).to_be_visible()
        visitor.generate(GREEN, lora="sks.safetensors")
        visitor.images(1)
    finally:
        keys.remove("alice")


def _keys_file(server):
    return Path(next(entry["data"] for entry in server.log if "data" in entry)) / "api_keys.json"
