"""`fidelora generate`: several prompts and LoRAs, JSON, dry runs, quiet runs and names of files."""

from __future__ import annotations

import io
import json
import sys

import pytest
import safetensors.torch
from tests.support import LORA, MINIATURE_LORA, TINY_BASE, TINY_FLUX, save_adapter

from fidelora import read_record
from fidelora.engine.engine import Engine

SMALL = ["--base-model", str(TINY_BASE), "--size", "64x72", "--steps", "2", "--device", "cpu"]
NOTE = "[trigger] is 'sks', the trigger word in the metadata of the LoRA {}."


class Stdin:
    """Stands for stdin with the given bytes."""

    def __init__(self, content: bytes) -> None:
        self.buffer = io.BytesIO(content)


@pytest.fixture
def no_image(monkeypatch):
    """Let the test fail if an image is generated."""

    def generate(*_: object, **__: object) -> None:
        raise AssertionError("an image was generated")

    monkeypatch.setattr(Engine, "_generate", generate)


@pytest.fixture
def loras(tmp_path):
    """Return a folder with two copies of a LoRA."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("sks_10", "sks_9"):
        (folder / f"{name}.safetensors").write_bytes(LORA.read_bytes())
    return folder


def test_prompts_from_stdin_are_printed_as_json(fidelora, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Stdin(b"a [trigger]\n\na ball\n"))
    arguments = ["--lora", f"{LORA}:0.5", "--negative-prompt", "dark", "--cfg-scale", "3", "--json"]
    code, out, err = fidelora("generate", "-", *arguments, *SMALL)
    document = json.loads(out)
    note = NOTE.format(LORA.stem)
    assert (code, err) == (0, f"{note}\n")
    assert list(document) == ["images", "notes", "warnings", "interrupted"]
    assert (document["notes"], document["warnings"], document["interrupted"]) == ([note], [], False)
    assert [image["path"] for image in document["images"]] == [
        "fidelora_1_42.png",
        "fidelora_2_42.png",
    ]
    for image, prompt in zip(document["images"], ("a sks", "a ball"), strict=True):
        record = read_record(tmp_path / image["path"])
        assert image["recipe"] == record["recipe"]
        assert image["digest"] == record["digest"]
        assert image["environment"] == record["environment"]
        assert record["recipe"]["prompt"] == image["prompt"] == prompt
        assert record["recipe"]["negative_prompt"] == "dark"
        assert (image["width"], image["height"], image["seed"]) == (64, 72, 42)
        assert record["recipe"]["guidance_scale"] == 3
        assert [one["multiplier"] for one in image["loras"]] == [0.5]


def test_the_loras_of_a_folder_are_used_in_turn(fidelora, tmp_path, loras):
    template = "out/{lora}/{prompt}-{seed}"
    code, out, err = fidelora(
        "generate", "a [name]", "--lora", "run", "-n", "2", "--output", template, *SMALL
    )
    assert (code, err) == (0, NOTE.format("sks_9") + "\n"), (
        "the trigger word was not reported exactly once"
    )
    assert out.splitlines() == [
        f"out/{name}/a_sks-{seed}.png" for name in ("sks_9", "sks_10") for seed in (42, 43)
    ]
    first, second, third, _ = (read_record(tmp_path / line) for line in out.splitlines())
    assert first["recipe"]["adapters"][0]["name"] == "sks_9"
    assert third["recipe"]["adapters"][0]["name"] == "sks_10"
    assert first["digest"] == third["digest"] != second["digest"], (
        "images with the same file and seed differ, or others do not"
    )


@pytest.mark.usefixtures("no_image")
def test_a_negative_prompt_without_effect_is_a_note(fidelora):
    base = ["--model", "flux", "--base-model", str(TINY_FLUX), "--size", "64x64"]
    code, out, err = fidelora("generate", "a", "--negative", "blurry", *base, "--dry-run", "--json")
    assert code == 0
    assert "note: The negative prompt has no effect: FLUX.1 does not use one." in err
    assert json.loads(out)["images"][0]["recipe"].get("negative_prompt", "") == ""


@pytest.mark.usefixtures("no_image")
def test_a_dry_run_prints_the_plan_and_writes_nothing(fidelora, tmp_path, loras):
    arguments = ["a [trigger]", "--lora", "run", "--out", "deep/er", "--dry-run", *SMALL]
    code, out, _ = fidelora("generate", *arguments)
    assert code == 0
    assert out.splitlines()[:4] == [
        "deep/er/fidelora_sks_9_42.png",
        "  64x72, 2 steps, ddpm, guidance 6, seed 42, float32, exact",
        "  prompt: a sks",
        "  LoRAs: sks_9:1",
    ]
    document = json.loads(fidelora("generate", *arguments, "--json")[1])
    assert document["dry_run"] is True
    assert [image["recipe"]["prompt"] for image in document["images"]] == ["a sks", "a sks"]
    assert list(tmp_path.iterdir()) == [loras]


@pytest.mark.usefixtures("no_image")
def test_escape_codes_in_names_and_metadata_are_not_printed(fidelora, tmp_path):
    tensors, name = safetensors.torch.load_file(LORA), "\x1b[1mbold.safetensors"
    save_adapter(tmp_path / name, tensors, ss_trigger_word="\x1b[31mred")
    code, out, err = fidelora("generate", "a [trigger]", "--lora", name, "--dry-run", *SMALL)
    assert (code, "\x1b" in out + err) == (0, False)
    assert out.splitlines()[2:] == ["  prompt: a \\x1b[31mred", "  LoRAs: \\x1b[1mbold:1"]
    assert "the LoRA \\x1b[1mbold." in err


@pytest.mark.usefixtures("no_image")
def test_a_dry_run_checks_the_base_model(fidelora, tmp_path):
    (tmp_path / "base").mkdir()
    code, _, err = fidelora("generate", "a", "--dry-run", "--base-model", "./base")
    assert code == 1
    assert err.startswith("error: base is not a diffusers folder")
    for absent in ("./absent", "models/absent.safetensors"):
        code, out, err = fidelora("generate", "a", "--dry-run", "--base-model", absent)
        assert (code, out) == (2, "")
        assert err.startswith(f"error: The base model {absent} was not found")
    code, _, err = fidelora("generate", "a", "--dry-run", "--vae", "./absent.safetensors")
    assert (code, err[:14]) == (2, "error: The VAE")
    code, out, err = fidelora("generate", "a", "--dry-run", "--base-model", "nobody/nothing")
    assert (code, err) == (
        0,
        "nobody/nothing is not on this machine; it would be downloaded from the hub.\n",
    )
    assert out.startswith("fidelora_42.png\n")


@pytest.mark.usefixtures("no_image")
@pytest.mark.parametrize(
    ("options", "size"),
    [
        (["--base-model", str(TINY_BASE)], (512, 512)),
        (["--base-model", "fidelora:miniature"], (128, 128)),
        (["--base-model", "fidelora:miniature", "--height", "64"], (128, 64)),
        (["--base-model", "nobody/xl", "--model", "sdxl"], (1024, 1024)),
        (["--base-model", str(TINY_BASE), "--size", "101"], (96, 96)),
    ],
)
def test_the_size_is_by_default_that_of_the_base_model(fidelora, options, size):
    _, out, _ = fidelora("generate", "a", "--dry-run", "--json", *options)
    (image,) = json.loads(out)["images"]
    assert (image["width"], image["height"]) == size


def test_a_rounded_size_is_a_note(fidelora):
    command = ("generate", "x", "--base-model", "fidelora:miniature", "--dry-run", "--size")
    assert "100 x 100 was rounded down to 96 x 96" in fidelora(*command, "100")[2]
    assert "rounded" not in fidelora(*command, "128x96")[2]


def test_a_quiet_run_prints_only_warnings(fidelora, tmp_path):
    code, out, err = fidelora(
        "generate", "a [trigger]", "--lora", str(MINIATURE_LORA), "--seed", "-1", "-q", "--trigger",
        "", "-o", "a.png", "--base-model", "fidelora:miniature", "--size", "64", "--steps", "1",
        "--device", "cpu",
    )  # fmt: skip
    assert (code, out, err) == (0, "", "")
    assert read_record(tmp_path / "a.png")["recipe"]["prompt"] == "a [trigger]"
    code, out, err = fidelora("generate", "a [trigger]", "-q", "-o", "b.png", *SMALL)
    assert (code, out) == (0, "")
    assert err.startswith("warning: [trigger] stays in the prompt")


def test_an_interrupt_prints_the_finished_images(fidelora, tmp_path, monkeypatch):
    generate_batch = Engine.generate_batch
    calls = []

    def interrupted(self, recipes, on_step=None):
        calls.append(recipes)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate_batch(self, recipes, on_step)

    monkeypatch.setattr(Engine, "generate_batch", interrupted)
    code, out, err = fidelora("generate", "a ball", "-n", "3", "--json", *SMALL)
    document = json.loads(out)
    assert (code, err) == (130, "error: Interrupted; 1 of 3 images were written.\n")
    assert document["interrupted"] is True
    assert [image["path"] for image in document["images"]] == ["fidelora_42.png"]
    assert (tmp_path / "fidelora_42.png").is_file()


def test_fast_images_of_several_prompts_share_batches(fidelora, tmp_path, monkeypatch):
    (tmp_path / "p.txt").write_text("a\nb\nc\n")
    sizes = []
    generate_batch = Engine.generate_batch

    def recorded(self, recipes, on_step=None):
        sizes.append(len(recipes))
        return generate_batch(self, recipes, on_step)

    monkeypatch.setattr(Engine, "generate_batch", recorded)
    monkeypatch.setattr(Engine, "max_batch", lambda *_: 2)
    code, out, _ = fidelora("generate", "--prompts", "p.txt", "--fidelity", "fast", *SMALL)
    assert (code, sizes) == (0, [2, 1])
    prompts = [read_record(tmp_path / line)["recipe"]["prompt"] for line in out.splitlines()]
    assert prompts == ["a", "b", "c"]
