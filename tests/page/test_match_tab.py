"""The *Match* tab in a browser, on a server with the base model of the golden runs."""

from __future__ import annotations

import re
import shutil
import zipfile

import pytest
from playwright.sync_api import expect
from tests.explain.other_programs import OtherProgram, comfyui_noise, graph, png
from tests.page.browser_support import HOSTILE
from tests.server.serve_support import Server
from tests.support import GOLDEN_JOBS, SAME_PROCESSOR, TINY_BASE

from fidelora import Engine
from fidelora.training.plan import plan_samples
from fidelora.training.run_folder import read_run

IDENTICAL = "Every pixel of every sample is the same: "
VERDICT = IDENTICAL if SAME_PROCESSOR else re.compile(f"{IDENTICAL}|consistent with these settings")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    data = tmp_path_factory.mktemp("match")
    runs = data / "runs"
    shutil.copytree(GOLDEN_JOBS / "lokr_full", runs / "lokr_full")
    hostile = shutil.copytree(GOLDEN_JOBS / "lokr_full", runs / HOSTILE.replace("/", ""))
    config = hostile / "config.yaml"
    config.write_text(config.read_text().replace("[trigger]", HOSTILE).replace("a photo", HOSTILE))
    broken = runs / "broken"
    broken.mkdir()
    (broken / "config.yaml").write_text(
        f'config: {{name: "{HOSTILE}", process: '
        f'[{{model: {{name_or_path: "{HOSTILE}", arch: "{HOSTILE}"}}}}]}}'
    )
    # The goldens were made with two threads; sums depend on their number.
    started = Server(
        data,
        TINY_BASE,
        FIDELORA_PAGE="true",
        OMP_NUM_THREADS="2",
        HF_HUB_OFFLINE="1",
        FIDELORA_JOBS_PATH=str(runs),
    )
    yield started
    started.close()


@pytest.fixture
def match(visitor):
    visitor.page.get_by_role("tab", name="Match").click()
    return visitor


def test_a_golden_run_is_verified_and_its_report_shown(match):
    match.choose("run", "lokr_full")
    match["verify"].click()
    expect(match["verdict"]).to_contain_text(VERDICT)
    report = match.page.frame_locator("iframe.report")
    wipe = report.get_by_label("wipe between trainer and replayed").first
    figure = report.locator("figure.wipe").first
    expect(figure).to_have_attribute("style", "--at:50%")
    wipe.focus()
    wipe.press("Home")
    expect(figure).to_have_attribute("style", "--at: 0%;")
    assert "lokr_full: sampler ddpm" in match.field("verify-output").input_value()
    assert str(GOLDEN_JOBS.parent) not in match.field("verify-output").input_value()


def test_a_run_is_verified_from_a_zip(match, tmp_path):
    with zipfile.ZipFile(tmp_path / "run.zip", "w") as packed:
        for file in (GOLDEN_JOBS / "lokr_full").rglob("*"):
            packed.write(file, f"output/lokr_full/{file.relative_to(GOLDEN_JOBS / 'lokr_full')}")
        packed.writestr("output/lokr_full/optimizer.pt", b"not needed")
    match["run-zip"].locator("input[type=file]").set_input_files(tmp_path / "run.zip")
    expect(match["run-zip"]).to_contain_text("run")
    match["verify"].click()
    expect(match["verdict"]).to_contain_text(VERDICT)


def test_a_verification_can_be_canceled(match):
    match.choose("run", "lokr_full")
    match["verify"].click()
    expect(match["verdict"]).to_contain_text("Loading the base model.")
    match["cancel-verify"].click()
    expect(match["verdict"]).to_contain_text("Canceled.")
    expect(match["cancel-verify"]).to_be_disabled()


def test_a_hostile_run_is_shown_as_text(match):
    match.choose("run", "onerror")
    match["verify"].click()
    expect(match["verdict"]).to_contain_text("mismatch", ignore_case=True)
    report = match.page.frame_locator("iframe.report")
    expect(report.locator("p.prompt").first).to_contain_text(HOSTILE)
    assert report.locator("img[src=x]").count() == 0


def test_a_broken_run_shows_an_escaped_error(match):
    match.choose("run", "broken")
    match["verify"].click()
    expect(match["verdict"].get_by_role("alert")).to_contain_text(HOSTILE)
    match.field("step").fill(HOSTILE)
    match.choose("run", "lokr_full")
    match["verify"].click()
    expect(match["verdict"].get_by_role("alert")).to_contain_text(f"'{HOSTILE}' is not a step")
    assert match.page.locator("img[src=x]").count() == 0


def drop_picture(match, path):
    match.page.get_by_role("button", name="A picture of another program differs").click()
    match["other-picture"].locator("input[type=file]").set_input_files(path)
    expect(match["other-picture"]).to_contain_text(path.stem)


def comfyui_picture(folder):
    """Write a picture of ComfyUI that has another guidance than the run's second sample."""
    plan = plan_samples(read_run(GOLDEN_JOBS / "lokr_full"), 6, base_model=str(TINY_BASE))[1]
    program = OtherProgram(Engine(device="cpu"), plan.recipe, whole=True, noise=comfyui_noise)
    recipe = plan.recipe
    pixels = program.picture(sampler="euler", schedule="normal", guidance_scale=9.0)
    text = graph(
        prompt=recipe.prompt, negative=recipe.negative_prompt, seed=recipe.seed,
        steps=recipe.steps, cfg=9.0, sampler="euler", scheduler="normal", width=recipe.width,
        height=recipe.height, lora=("lokr_full.safetensors", 1.0, 1.0),
    )  # fmt: skip
    path = folder / "comfyui_picture.png"
    path.write_bytes(png(pixels, prompt=text))
    return path


def test_a_picture_of_another_program_is_explained(match, tmp_path):
    match.choose("run", "lokr_full")
    drop_picture(match, comfyui_picture(tmp_path))
    # Ctrl+Enter in this part explains, elsewhere it verifies.
    match.field("program").press("Control+Enter")
    expect(match["verdict"]).to_contain_text("explained", ignore_case=True)
    report = match.page.frame_locator("iframe.report")
    rows = report.locator("table tr td:first-child")
    expect(rows.first).to_have_text("sampler")
    assert "guidance" in rows.all_text_contents()
    expect(report.get_by_alt_text("trainer's sample")).to_be_visible()
    expect(report.get_by_alt_text("nearest simulated picture")).to_be_visible()
    match.page.set_viewport_size({"width": 390, "height": 844})
    overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert match.page.evaluate(overflow) == 0
    assert report.locator("html").evaluate(f"() => {overflow}") == 0
    assert str(GOLDEN_JOBS.parent) not in match.field("verify-output").input_value()


def test_a_picture_needs_a_run_and_a_file(match, tmp_path):
    match.page.get_by_role("button", name="A picture of another program differs").click()
    match["explain"].click()
    expect(match["verdict"].get_by_role("alert")).to_contain_text("Drop a picture")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    match["other-picture"].locator("input[type=file]").set_input_files(broken)
    expect(match["other-picture"]).to_contain_text("broken")
    match["explain"].click()
    expect(match["verdict"].get_by_role("alert")).to_contain_text("Choose a training run")
    match["other-picture"].locator("input[type=file]").set_input_files(broken)
    expect(match["other-picture"]).to_contain_text("broken")
    match.choose("run", "lokr_full")
    match["explain"].click()
    expect(match["verdict"].get_by_role("alert")).to_contain_text("is not a PNG, JPEG or WebP")


def test_the_picture_part_fits_a_phone(match):
    match.page.set_viewport_size({"width": 360, "height": 740})
    match.page.get_by_role("button", name="A picture of another program differs").click()
    expect(match["explain"]).to_be_visible()
    width = match.page.evaluate("document.documentElement.scrollWidth")
    assert width <= 360
