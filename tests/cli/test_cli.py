"""Command line: exit codes, error messages and complete output files."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.support import LORA, LORA_CONV, MINIATURE_LORA, TINY_BASE

from fidelora import AdapterRef, Engine, Recipe, read_record
from fidelora.api import StatusBody
from fidelora.cli import console, demo, demo_server, main
from fidelora.errors import ClientTimeoutError, RequestFailedError
from fidelora.families import all_families
from fidelora.training import verify as verification
from fidelora.training.compare import compare
from fidelora.training.evidence import Verdict
from fidelora.training.plan import PlannedSample, plan_samples
from fidelora.training.run_folder import TrainingRun
from fidelora.training.verify import CheckedSample

SMALL = [
    "--base-model",
    str(TINY_BASE),
    "--width",
    "64",
    "--height",
    "72",
    "--steps",
    "3",
    "--device",
    "cpu",
]


def one_sentence(stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1, stderr
    assert lines[0].startswith("error: ")
    assert "Traceback" not in stderr
    return lines[0]


def test_generate_writes_the_image_and_its_recipe(fidelora, tmp_path):
    code, out, err = fidelora(
        "generate",
        "[trigger] a ball",
        "--trigger",
        "sks",
        "--negative",
        "blurry",
        "--lora",
        f"{LORA}:0.5",
        "--lora",
        str(LORA_CONV),
        "--guidance",
        "5",
        "--seed",
        "9",
        "--sampler",
        "euler_a",
        *SMALL,
    )
    assert (code, out, err) == (0, "fidelora_9.png\n", "")
    recipe = Recipe(
        prompt="sks a ball",
        negative_prompt="blurry",
        base_model=str(TINY_BASE),
        width=64,
        height=72,
        steps=3,
        guidance_scale=5,
        seed=9,
        sampler="euler_a",
        adapters=(AdapterRef.from_file(LORA, 0.5), AdapterRef.from_file(LORA_CONV)),
    )
    made = Recipe.from_dict(read_record(tmp_path / "fidelora_9.png")["recipe"])
    assert made.base_model == TINY_BASE.name
    assert len(made.base_sha256) == 64
    assert made == replace(recipe, base_sha256=made.base_sha256)
    written = np.asarray(Image.open(tmp_path / "fidelora_9.png"))
    assert np.array_equal(written, Engine(device="cpu").generate(recipe).pixels)


def test_the_settings_of_a_few_step_lora_are_only_proposed(fidelora, tmp_path):
    copy = tmp_path / "Hyper-SD15-1step-lora.safetensors"
    copy.write_bytes(LORA.read_bytes())
    options = ["generate", "a ball", "--lora", copy.name, *SMALL]
    code, out, err = fidelora(*options)
    assert (code, out) == (0, "fidelora_42.png\n")
    assert err == (
        "note: Hyper-SD15-1step-lora is a few-step LoRA according to its file name "
        "(Hyper-SD15-1step-lora); recommended: --sampler tcd --steps 1 --guidance 1 --eta 1. "
        "Nothing was changed.\n"
    )
    recipe = read_record(tmp_path / "fidelora_42.png")["recipe"]
    assert (recipe["sampler"], recipe["steps"]) == ("ddpm", 3)
    proposed = ["--sampler", "tcd", "--guidance", "1", "--eta", "1", "--spacing", "trailing"]
    assert "note: " in fidelora(*options, *proposed)[2]  # another spacing than the proposed one
    code, out, err = fidelora(*options, *proposed[:-2])
    assert (code, out, err) == (0, "fidelora_42_3.png\n", "")
    recipe = read_record(tmp_path / "fidelora_42_3.png")["recipe"]
    assert (recipe["sampler"], recipe["eta"], "timestep_spacing" in recipe) == ("tcd", 1.0, False)


def test_a_few_step_image_is_replayed_to_the_bit(fidelora, tmp_path):
    options = ["--sampler", "tcd", "--spacing", "trailing", "--eta", "0.7", "--guidance", "1"]
    # The scheduler's warning about timesteps that were not used in distillation is not printed.
    made = fidelora("generate", "a ball", *options, "--out", "a.png", *SMALL)
    assert made == (0, "a.png\n", "")
    code, _, err = fidelora("replay", "a.png", "--compare", "--base-model", str(TINY_BASE))
    assert (code, err) == (0, "")
    recipe = Recipe.from_dict(read_record(tmp_path / "a.png")["recipe"])
    assert (recipe.timestep_spacing, recipe.eta) == ("trailing", 0.7)
    text = Image.open(tmp_path / "a.png").info["parameters"]
    assert "Sampler: tcd" in text
    assert "Sampler: tcd, Schedule type: Trailing," in text
    assert ", Eta: 0.7," in text


def test_several_images_have_consecutive_seeds(fidelora, tmp_path):
    code, out, _ = fidelora("generate", "a ball", "-n", "3", "--out", "pictures", *SMALL)
    assert code == 0
    assert out.splitlines() == [f"pictures/fidelora_{seed}.png" for seed in (42, 43, 44)]
    assert len({(tmp_path / line).read_bytes() for line in out.splitlines()}) == 3


def test_fast_images_are_batched_and_record_their_fidelity(fidelora, tmp_path):
    code, out, err = fidelora("generate", "a ball", "-n", "3", "--fidelity", "fast", *SMALL)
    assert (code, out.splitlines(), err) == (
        0,
        [f"fidelora_{seed}.png" for seed in (42, 43, 44)],
        "",
    )
    records = [read_record(tmp_path / line) for line in out.splitlines()]
    assert [record["recipe"]["fidelity"] for record in records] == ["fast"] * 3
    assert "Fidelity: fast" in Image.open(tmp_path / "fidelora_42.png").info["parameters"]


def test_fast_does_not_support_unmerged_adapters(fidelora):
    code, _, err = fidelora("generate", "a ball", "--fidelity", "fast", "--live", *SMALL)
    assert (code, err) == (
        2,
        "error: Fidelity fast always merges adapters; use adapter_mode merged, "
        "or fidelity exact.\n",
    )


def test_files_in_an_output_folder_are_not_replaced(fidelora):
    assert fidelora("generate", "a ball", *SMALL)[1] == "fidelora_42.png\n"
    assert fidelora("generate", "a ball", *SMALL)[1] == "fidelora_42_2.png\n"


@pytest.mark.parametrize(
    ("options", "name", "kind"),
    [
        (["--out", "a/b/ball.jpg"], "a/b/ball.jpg", "JPEG"),
        (["--out", "ball.webp"], "ball.webp", "WEBP"),
        (["--format", "jpeg"], "fidelora_42.jpg", "JPEG"),
        (["--format", "webp", "--out", "folder"], "folder/fidelora_42.webp", "WEBP"),
    ],
)
def test_the_format_depends_on_the_name_or_the_option(fidelora, tmp_path, options, name, kind):
    code, out, _ = fidelora("generate", "a ball", *options, *SMALL)
    assert (code, out) == (0, f"{name}\n")
    assert Image.open(tmp_path / name).format == kind
    assert read_record(tmp_path / name)["recipe"]["prompt"] == "a ball"


def test_a_random_seed_is_printed_and_stored(fidelora, tmp_path):
    _, out, err = fidelora("generate", "a ball", "--seed", "-1", *SMALL)
    seed = read_record(tmp_path / out.strip())["recipe"]["seed"]
    assert (out, err) == (f"fidelora_{seed}.png\n", f"seed: {seed}\n")


def test_a_folder_with_a_dot_in_its_name_ends_in_a_slash(fidelora):
    assert fidelora("generate", "a ball", "--out", "v1.0/", *SMALL)[1] == "v1.0/fidelora_42.png\n"
    assert fidelora("generate", "a ball", "--out", "v1.0", *SMALL)[1] == "v1.0/fidelora_42_2.png\n"


def test_an_unwritable_folder_is_reported_before_generating(fidelora, tmp_path, monkeypatch):
    def generate(*args, **kwargs):
        raise AssertionError("an image was generated")

    monkeypatch.setattr("fidelora.engine.engine.Engine.generate", generate)
    (tmp_path / "file").write_bytes(b"")
    for out in ("file", "file/below/a.png"):
        code, _, err = fidelora("generate", "a ball", "--out", out, *SMALL)
        assert code == 1
        assert "is not writable" in one_sentence(err)
    code, _, err = fidelora("demo", "--device", "cpu", "--out", "file")
    assert code == 1
    assert "is not writable" in one_sentence(err)


def test_a_file_name_may_end_like_a_multiplier(fidelora, tmp_path):
    (tmp_path / "v1:2").write_bytes(LORA.read_bytes())
    _, out, _ = fidelora("generate", "a ball", "--lora", "v1:2", *SMALL)
    assert read_record(tmp_path / out.strip())["recipe"]["adapters"][0]["multiplier"] == 1.0


def test_escape_codes_in_a_file_do_not_reach_the_terminal(fidelora, tmp_path):
    import torch
    from tests.support import save_adapter

    save_adapter(tmp_path / "lora.safetensors", {"\x1b[31mred\nline": torch.zeros(2, 2, 2)})
    code, _, err = fidelora("generate", "a ball", "--lora", "lora.safetensors", *SMALL)
    assert code == 1
    assert "\\x1b[31mred\\nline" in one_sentence(err)


SAMPLERS_WITH_MESSAGES = ("dpmsolver", "dpmsingle", "lcm")
"""Samplers for which diffusers logs messages."""


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> dict[str, tuple[str, str]]:
    """Stdout and stderr of a command with each of these samplers, run in one new process."""
    code = f"""
import sys
from fidelora.cli import main
for sampler in {SAMPLERS_WITH_MESSAGES}:
    out = ["--sampler", sampler, "--out", f"{{sampler}}.png"]
    sys.argv = ["fidelora", "generate", "a ball", *{SMALL}, *out]
    try:
        main()
    except SystemExit as end:
        assert end.code in (None, 0)
    for stream in (sys.stdout, sys.stderr):
        print("end of command", file=stream, flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path_factory.mktemp("printed"),
        check=True,
    )
    out, err = (text.split("end of command\n") for text in (done.stdout, done.stderr))
    assert (out.pop(), err.pop()) == ("", "")
    return dict(zip(SAMPLERS_WITH_MESSAGES, zip(out, err, strict=True), strict=True))


@pytest.mark.parametrize("sampler", SAMPLERS_WITH_MESSAGES)
def test_libraries_do_not_print_messages(printed, sampler):
    assert printed[sampler] == (f"{sampler}.png\n", "")


def test_the_truncated_end_of_a_prompt_is_quoted(fidelora):
    code, _, err = fidelora("generate", "ball " * 75 + "at night", *SMALL)
    assert code == 0
    assert (
        err == 'warning: The end of the prompt exceeds 77 tokens and has no effect: "at night".\n'
    )


def test_a_trigger_without_placeholder_has_no_effect(fidelora):
    _, _, err = fidelora("generate", "a ball", "--trigger", "sks", *SMALL)
    assert err.startswith("warning: --trigger has no effect")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--width", "63"], "width is 63; it must be from 64 to 4096"),
        (["--lora", f"{LORA}:6"], "multiplier is 6.0; it must be from -5.0 to 5.0"),
        (
            ["--sampler", "euler_b"],
            "The sampler 'euler_b' is not supported for sd15; use one of ddpm",
        ),
        (
            ["--spacing", "sgm_uniform"],
            "The sampler ddpm does not support timestep_spacing sgm_uniform; leave it out",
        ),
        (["--eta", "0.5"], "The eta of the sampler ddpm cannot be set"),
        (["--sampler", "tcd", "--eta", "2"], "eta is 2.0; it must be from 0.0 to 1.0"),
        (["--steps", "151"], "steps is 151"),
        (["--seed", "-2"], "seed is -2"),
        (["--model", "sd16"], "The model 'sd16' is not supported"),
        (["--dtype", "int8"], "dtype is 'int8'"),
        (["--noise", "old"], "noise is 'old'"),
        (["--offload", "some"], "The offload mode 'some' does not exist"),
        (["--format", "gif"], "--format is 'gif'"),
        (["--format", "png", "--out", "a.jpg"], "does not match --output a.jpg"),
        (["--lora", "absent.safetensors"], "The adapter file absent.safetensors does not exist"),
        (["--base-model", "./absent/at/all"], "The base model ./absent/at/all was not found"),
        (["--device", "quantum"], "The device 'quantum' is not supported"),
        (["-n", "0"], "-n is 0"),
        (["--out", "foo.gif"], "The suffix of foo.gif is not supported for images"),
        (["--lora", ""], "--lora is empty; set the name of a file"),
        (["--lora", ":2"], "The adapter file :2 does not exist"),
        (["--seed", str(2**63 - 1), "-n", "2"], "seed is 9223372036854775808"),
        (["--config", "somewhere"], "with its own configurations"),
    ],
    ids=lambda value: " ".join(value)[-30:] if isinstance(value, list) else "",
)
def test_wrong_use_prints_one_sentence_and_exits_with_2(fidelora, tmp_path, arguments, sentence):
    code, out, err = fidelora("generate", "a ball", *SMALL, *arguments)
    assert (code, out) == (2, "")
    assert sentence in one_sentence(err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"<!DOCTYPE html><html>Sign in</html>", "is a web page (HTML)"),
        (LORA.read_bytes()[:10_000], "truncated"),
        ((60 * 2**20).to_bytes(8, "little") + b"{" * 100, "claims a header of 62,914,560 bytes"),
        (b"PK\x03\x04" + bytes(26) + b"archive/data.pkl", "is a Python pickle or zip archive"),
        (b"PK\x03\x04" + bytes(100), "is a zip archive; unpack it"),
        (b"", "has 0 bytes"),
    ],
    ids=["html", "truncated", "large header", "pickle", "zip", "empty"],
)
def test_a_broken_adapter_prints_one_sentence_and_exits_with_1(
    fidelora, tmp_path, content, sentence
):
    (tmp_path / "lora.safetensors").write_bytes(content)
    code, out, err = fidelora("generate", "a ball", *SMALL, "--lora", "lora.safetensors")
    assert (code, out) == (1, "")
    assert sentence in one_sentence(err)
    assert [path.name for path in tmp_path.iterdir()] == ["lora.safetensors"]


def test_a_full_disk_prints_one_sentence(fidelora, tmp_path, monkeypatch):
    def disk_full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    code, out, err = fidelora("generate", "a ball", *SMALL)
    assert (code, out) == (1, "")
    assert "No space left on device. No unfinished file was left." in one_sentence(err)
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback(fidelora, monkeypatch):
    monkeypatch.setattr(console, "_debug", False)
    monkeypatch.setattr(sys, "argv", ["fidelora", "generate", "a ball", "--debug", "--width", "63"])
    with pytest.raises(Exception, match="width is 63"):
        main()


def test_an_unexpected_error_is_reported_as_a_bug(fidelora, monkeypatch):
    def fail(*args, **kwargs):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("fidelora.engine.engine.Engine.generate_batch", fail)
    code, _, err = fidelora("generate", "a ball", *SMALL)
    assert code == 1
    assert (
        "Unexpected ZeroDivisionError: division by zero. This is a bug in Fidelora"
        in one_sentence(err)
    )


def test_models_lists_families_with_their_samplers(fidelora):
    code, out, _ = fidelora("models")
    assert code == 0
    assert "sd15  Stable Diffusion 1.5" in out
    assert "k_dpmsolver++" in out
    assert "runwayml/stable-diffusion-v1-5" in out


def test_models_prints_json(fidelora):
    import json

    _, out, _ = fidelora("models", "--json")
    model, *others = json.loads(out)
    assert model["samplers_with"]["sgm_uniform"] == ["euler", "euler_a", "dpmsolver++", "heun"]
    assert model["samplers_with"]["eta"] == ["ddim", "tcd"]
    assert others[1]["samplers_with"] == {}
    found = [(one["id"], one["default_size"], one["base_aliases"]) for one in others]
    assert found[:2] == [("sdxl", 1024, []), ("zimage", 1024, [])]
    assert ["sd15", *(one[0] for one in found)] == list(all_families())
    assert (
        model["id"],
        model["resolution_divisor"],
        model["default_steps"],
        model["default_guidance_scale"],
    ) == (
        "sd15",
        8,
        25,
        6.0,
    )


@pytest.mark.timeout(600)
def test_the_demo_shows_a_lora_verifies_a_run_and_uses_a_server(fidelora, tmp_path, monkeypatch):
    # With and without the trigger word: each prompt takes five images.
    monkeypatch.setattr(demo, "_PROMPTS", (demo._PROMPTS[0], demo._PROMPTS[-1]))
    code, out, err = fidelora("demo", "--device", "cpu", "--out", "demo")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert sum(": identical" in line or ": rounding" in line for line in lines) == 4
    assert sum("control" in line and ": mismatch" in line for line in lines) == 1
    with Image.open(tmp_path / "demo" / "samples.png") as sheet:
        assert sheet.width > 3 * 256
    assert "2 images, all pixels equal" in out
    served = sorted((tmp_path / "demo" / "served").iterdir())
    # The last column of the sheet contains each picture of the server once.
    with Image.open(tmp_path / "demo" / "lora.png") as sheet:
        sheet_pixels = np.asarray(sheet)
    for file in served:
        with Image.open(file) as image:
            row = np.asarray(image)[64].repeat(2, axis=0)
        assert any(
            (sheet_pixels[top, -256 - 6 : -6] == row).all() for top in range(len(sheet_pixels))
        )
    assert (tmp_path / "demo" / "sks.safetensors").read_bytes() == MINIATURE_LORA.read_bytes()


def test_the_demo_explains_how_to_install_the_server(fidelora, monkeypatch):
    monkeypatch.setattr(demo, "_make_lora_sheet", lambda *_: ([], []))
    monkeypatch.setattr(demo, "_verify_run", lambda *_: None)
    monkeypatch.setattr(demo, "_SERVER_PACKAGES", ("fastapi", "no_such_package"))
    code, out, _ = fidelora("demo", "--device", "cpu")
    assert code == 0
    assert "pip install '.[server,client]'" in out


def test_commands_limit_how_long_threads_spin(fidelora, monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.setenv(name, "")  # restored afterwards
        monkeypatch.delenv(name)
    assert fidelora("--version")[0] == 0
    assert os.environ["GOMP_SPINCOUNT"] == "30000"


class StatusClient:
    """Returns one status after the other, and the last one again and again."""

    def __init__(self, *statuses: StatusBody) -> None:
        self.statuses = list(statuses)

    def status(self, request_id: str) -> StatusBody:
        return self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]

    def result(self, request_id: str) -> str:
        return f"the result of {request_id}"


def status_body(status: str, step: int = 0, **fields: Any) -> StatusBody:
    progress = {"image": 0, "images": 1, "step": step, "steps": 9, "fraction": 0, "eta_s": None}
    times = dict.fromkeys(("started_at", "finished_at"), None)
    about = {
        "request_id": "a",
        "created_at": "2026-01-01T00:00:00Z",
        "error": None,
        "progress": progress,
    }
    return StatusBody.model_validate({**about, **times, "status": status, **fields})


@pytest.fixture
def clock(monkeypatch):
    """Replace the demo's clock by one that advances a second at each read and never sleeps."""
    seconds = iter(range(10_000))
    passing = SimpleNamespace(sleep=lambda _: None, monotonic=lambda: next(seconds))
    monkeypatch.setattr(demo_server, "time", passing)


@pytest.mark.usefixtures("clock")
def test_the_demo_waits_for_as_long_as_there_is_progress():
    steps = [status_body("in_progress", step) for step in range(60) for _ in range(3)]
    client: Any = StatusClient(*steps, status_body("succeeded"))
    result: Any = demo_server._wait_for_images(client, "a", patience_s=5)
    assert result == "the result of a"


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(
    ("status", "error", "words"),
    [
        (status_body("in_progress", 3), ClientTimeoutError, "no progress in 5 seconds"),
        (status_body("in_queue", waiting_reason="No base."), RequestFailedError, "No base."),
        (status_body("failed", error="NaN."), RequestFailedError, "NaN."),
    ],
)
def test_the_demo_ends_its_wait_without_progress(status, error, words):
    client: Any = StatusClient(status)
    with pytest.raises(error, match=words):
        demo_server._wait_for_images(client, "a", patience_s=5)


@pytest.mark.usefixtures("clock")
def test_the_demo_gives_up_on_a_server_that_does_not_start(capsys, tmp_path):
    (tmp_path / "log").write_text('{"event": "base model"}\n')
    process: Any = SimpleNamespace(poll=lambda: None)
    with pytest.raises(SystemExit):
        demo_server._wait_for_url(process, tmp_path / "log", patience_s=5)
    assert "logged nothing for 5 seconds" in capsys.readouterr().err


def test_the_demos_server_ignores_settings_of_the_environment(monkeypatch):
    monkeypatch.setenv("WORKFLOWS_BASE_PATH", "/elsewhere")
    monkeypatch.setenv("FIDELORA_LORA_HOSTS", "example.org")
    monkeypatch.setenv("UNRELATED", "1")
    environment = demo_server._environment()
    assert environment["UNRELATED"] == "1"
    assert not {"WORKFLOWS_BASE_PATH", "FIDELORA_LORA_HOSTS"} & environment.keys()


@pytest.mark.parametrize(
    ("verdicts", "sentence"),
    [
        ((Verdict.MISMATCH, Verdict.MISMATCH), "A replayed sample differs from the trainer's"),
        ((Verdict.IDENTICAL, Verdict.ROUNDING), "The control sample is as near to the trainer's"),
    ],
)
def test_the_demo_can_fail(fidelora, monkeypatch, verdicts, sentence):
    pixels = np.zeros((8, 8, 3), np.uint8)
    comparison = compare(pixels, pixels)

    def checked(plan: PlannedSample, verdict: Verdict) -> CheckedSample:
        image: Any = None
        return CheckedSample(plan, image, pixels, pixels, comparison, 20.0, 1.0, verdict)

    def verified(run: TrainingRun, *_: Any, **options: Any) -> list[CheckedSample]:
        plans = plan_samples(run, run.steps, base_model=options["base_model"])
        return [checked(plan, verdicts[0]) for plan in plans]

    monkeypatch.setattr(verification, "verify", verified)
    monkeypatch.setattr(verification, "check_sample", lambda plan, _: checked(plan, verdicts[1]))
    monkeypatch.setattr(demo, "_make_lora_sheet", lambda *_: ([], []))
    code, _, err = fidelora("demo", "--device", "cpu")
    assert code == 1
    assert sentence in one_sentence(err)


def test_without_arguments_the_help_is_shown(fidelora):
    code, out, err = fidelora()
    assert code == 2
    assert "generate" in out + err


def test_the_module_runs_and_prints_its_version():
    done = subprocess.run(
        [sys.executable, "-m", "fidelora", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("fidelora ")


@pytest.mark.parametrize(
    "code",
    [
        "import fidelora",
        "from fidelora import Recipe, AdapterRef; Recipe(prompt='a ball')",
        "import sys; sys.argv = ['fidelora', '--help']\n"
        "try: import fidelora.__main__\nexcept SystemExit: pass",
    ],
    ids=["import", "recipe", "help"],
)
def test_torch_is_not_imported_unless_required(code):
    check = (
        "\nimport sys; heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'PIL'}"
        " & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code + check], capture_output=True, text=True, check=True)


@pytest.mark.parametrize("folders", [[], ["-o", "new/pictures/"]])
def test_an_interrupt_while_generating_leaves_no_file(tmp_path, folders):
    """Send a real signal to a real process after its second sampling step."""
    arguments = [
        "generate",
        "a ball",
        *SMALL[:2],
        "--width",
        "512",
        "--height",
        "512",
        "--steps",
        "150",
        "--device",
        "cpu",
        *folders,
    ]
    start = (
        "import sys, os, signal, fidelora.engine.engine as e, fidelora.cli as c\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # the parent may ignore it
        "original = e.sample\n"
        "def sample(denoise, schedule, latents, noise, on_step):\n"
        "    def step(number, latents):\n"
        "        on_step(number, latents)\n"
        "        if number == 2: os.kill(os.getpid(), signal.SIGINT)\n"
        "    return original(denoise, schedule, latents, noise, step)\n"
        f"e.sample = sample; sys.argv = ['fidelora', *{arguments!r}]; c.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", start], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 130
    assert done.stderr == "error: Interrupted; 0 of 1 images were written.\n"
    assert list(Path(tmp_path).iterdir()) == []
