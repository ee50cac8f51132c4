"""`fidelora replay`: generates an image again from its recipe and compares the pixels."""

from __future__ import annotations

import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from tests.support import LORA, LORA_CONV, TINY_BASE, change_weights, copy_base

from fidelora import AdapterRef, Engine, Recipe, read_record
from fidelora.recipe import file_sha256

RECIPE = Recipe(
    prompt="a ball",
    base_model=str(TINY_BASE),
    width=64,
    height=72,
    steps=2,
    seed=9,
    sampler="euler_a",
    adapters=(AdapterRef.from_file(LORA, 0.5), AdapterRef.from_file(LORA_CONV, -0.25)),
)
CPU = ("--device", "cpu")
LORAS = ("--lora", str(LORA), "--lora", str(LORA_CONV))


@pytest.fixture(scope="module")
def made():
    return Engine(device="cpu").generate(RECIPE)


@pytest.fixture
def image(made, tmp_path):
    return made.save(tmp_path / "ball.png")


def write(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("name", "quality"),
    [
        ("ball.png", None),
        ("ball.jpg", None),
        ("ball.jpg", 60),
        ("ball.webp", None),
        ("ball.webp", 50),
    ],
)
def test_all_formats_give_the_same_pixels(fidelora, made, tmp_path, name, quality):
    image_format = {"png": "png", "jpg": "jpeg", "webp": "webp"}[name.partition(".")[2]]
    image = write(tmp_path / name, made.encode(image_format, quality))
    again = tmp_path / name.replace("ball", "ball_again")
    code, out, err = fidelora("replay", str(image), "--compare", *LORAS, *CPU)
    assert (code, out, err) == (0, f"{again}\nidentical: every pixel is the same\n", "")
    assert np.array_equal(np.asarray(Image.open(again)), np.asarray(Image.open(image)))
    assert Recipe.from_dict(read_record(again)["recipe"]) == made.recipe


def test_loras_are_found_by_hash_under_any_name(fidelora, image, tmp_path):
    (tmp_path / "x" / "deep").mkdir(parents=True)
    shutil.copyfile(LORA, tmp_path / "x" / "deep" / "renamed.safetensors")
    # The content of one LoRA under the name of the other.
    shutil.copyfile(LORA_CONV, tmp_path / "x" / LORA.name)
    code, out, _ = fidelora(
        "replay",
        str(image),
        "--compare",
        "--lora-dir",
        str(tmp_path / "x"),
        "--out",
        "new/b.png",
        *CPU,
    )
    assert (code, out.splitlines()[-1]) == (0, "identical: every pixel is the same")
    assert (tmp_path / "new" / "b.png").is_file()


def test_repeated_replays_have_different_names(fidelora, image, tmp_path):
    for name in ("ball_again.png", "ball_again_2.png"):
        assert fidelora("replay", str(image), *LORAS, *CPU)[:2] == (0, f"{tmp_path / name}\n")


def test_different_pixels_exit_with_1(fidelora, made, tmp_path):
    pixels = made.pixels.copy()
    pixels[0, 0] ^= 255
    image = tmp_path / "ball.png"
    info = PngImagePlugin.PngInfo()
    info.add_itxt(
        "fidelora",
        json.dumps(made.record() | {"environment": {**made.environment, "device": "\x1b[1mcuda"}}),
    )
    Image.fromarray(pixels).save(image, pnginfo=info)
    code, out, _ = fidelora("replay", str(image), "--compare", *LORAS, *CPU)
    assert code == 1
    assert out.splitlines()[1].startswith(
        "DIFFERENT: 99.97 % of pixels are the same, the largest difference is "
    )
    assert out.splitlines()[2:] == [
        f"  device was \\x1b[1mcuda and is now {made.environment['device']}"
    ]


def test_a_resized_image_is_reported(fidelora, made, tmp_path):
    image = tmp_path / "ball.png"
    info = PngImagePlugin.PngInfo()
    info.add_itxt("fidelora", json.dumps(made.record()))
    Image.fromarray(made.pixels).resize((32, 36)).save(image, pnginfo=info)
    code, out, _ = fidelora("replay", str(image), "--compare", *LORAS, *CPU)
    assert (code, out.splitlines()[1]) == (
        1,
        "DIFFERENT: the file is 32x36, but its recipe gives 64x72; the file was resized.",
    )


def test_changes_of_the_recipe_are_reported(fidelora, image, tmp_path):
    base = shutil.copytree(TINY_BASE, tmp_path / "base")
    code, out, err = fidelora(
        "replay",
        str(image),
        "--compare",
        "--json",
        "--fidelity",
        "fast",
        "--base-model",
        str(base),
        *LORAS,
        *CPU,
    )
    document = json.loads(out)
    assert document["changes"] == {"fidelity": {"was": "exact", "now": "fast"}}, (
        "more than the fidelity is reported as changed"
    )
    assert "warning: fidelity is 'fast' instead of 'exact'." in err
    assert (document["source"], document["recipe"]["fidelity"], document["ignored"]) == (
        "fidelora",
        "fast",
        [],
    )
    assert document["identical"] is (document["comparison"]["max_difference"] == 0)
    assert code == (0 if document["identical"] else 1)


def test_the_base_model_is_found_by_its_content(fidelora, made, tmp_path, monkeypatch):
    """Images contain no path. A base model is found wherever it was used before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    image = made.save(tmp_path / "ball.png")
    record = read_record(image)
    assert record["recipe"]["base_model"] == TINY_BASE.name
    assert str(TINY_BASE.parent) not in json.dumps(record)
    arguments = ("replay", str(image), "--compare", *LORAS, *CPU)
    code, _, err = fidelora(*arguments)
    assert code == 2
    assert f"sha256 {record['recipe']['base_sha256'][:12]} and was not used on" in err
    moved = copy_base(tmp_path)
    code, _, err = fidelora(*arguments, "--base-model", str(moved))
    assert (code, "instead of" in err) == (0, False)
    code, out, _ = fidelora(*arguments)
    assert (code, "identical" in out.lower()) == (0, True)


def test_another_base_model_is_used_only_on_request(fidelora, made, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    image = made.save(tmp_path / "ball.png")
    other = copy_base(tmp_path)
    change_weights(
        other / "unet" / "diffusion_pytorch_model.safetensors",
        lambda tensors: {name: tensor * 1.1 for name, tensor in tensors.items()},
    )
    monkeypatch.chdir(tmp_path)
    other.rename(tmp_path / TINY_BASE.name)
    arguments = ("replay", str(image), *LORAS, *CPU)
    code, _, err = fidelora(*arguments)
    assert code == 2
    assert "but the one found here has sha256" in err
    code, out, err = fidelora(*arguments, "--base-model", TINY_BASE.name, "--json")
    assert code == 0
    change = json.loads(out)["changes"]["base_sha256"]
    assert change["was"] == made.recipe.base_sha256 != change["now"]
    assert "warning: base_sha256 is" in err


def test_missing_loras_are_listed_with_their_hashes(fidelora, image, tmp_path):
    code, out, err = fidelora(
        "replay", str(image), "--lora", str(LORA), "--lora-dir", str(tmp_path), *CPU
    )
    assert (code, out) == (2, "")
    assert f"{LORA_CONV.stem} (sha256 {file_sha256(LORA_CONV)})" in err
    assert file_sha256(LORA) not in err
    assert "Set --lora FILE or --lora-dir DIR." in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.png"], "cannot be read"),
        (["notes.txt"], "not a PNG, JPEG or WebP"),
        (["plain.png"], "has neither a Fidelora recipe"),
        (["ball.png", "--lora-dir", "nowhere"], "The folder nowhere does not exist"),
        (
            ["ball.png", "--lora", "nowhere.safetensors"],
            "nowhere.safetensors does not exist",
        ),
        (["ball.png", "--out", "x.gif"], "is not supported for images"),
        (["ball.png", "--base-model", "nowhere/at/all"], "nowhere"),
    ],
)
def test_unusable_files_exit_with_2(fidelora, image, tmp_path, arguments, message):
    (tmp_path / "notes.txt").write_text("x")
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    given = () if "--lora" in arguments else LORAS
    code, _, err = fidelora("replay", *arguments, *given, *CPU)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_images_of_other_programs_use_the_supported_parameters(fidelora, tmp_path):
    text = (
        f"a ball <lora:{LORA.stem}:0.5>\nNegative prompt: bad\n"
        "Steps: 2, Sampler: Euler a, CFG scale: 4, Seed: 9, Size: 64x72, Model: tiny, "
        "Clip skip: 2, "
        f'Lora hashes: "{LORA.stem}: 0123456789ab", Version: v1.10.1'
    )
    info, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
    info.add_text("parameters", text)
    Image.new("RGB", (64, 72)).save(buffer, "PNG", pnginfo=info)
    image = write(tmp_path / "theirs.png", buffer.getvalue())
    code, _, err = fidelora(
        "replay", str(image), "--lora-dir", str(LORA.parent), "--base-model", str(TINY_BASE), *CPU
    )
    assert code == 0
    for sentence in (
        "as far as they are supported",
        "Clip skip '2' is ignored",
        "Model 'tiny' is ignored",
        "has the hash 0123456789ab",
    ):
        assert sentence in err
    recipe = Recipe.from_dict(read_record(tmp_path / "theirs_again.png")["recipe"])
    assert (recipe.prompt, recipe.negative_prompt, recipe.sampler, recipe.seed) == (
        "a ball",
        "bad",
        "euler_a",
        9,
    )
    assert [(ref.sha256, ref.multiplier) for ref in recipe.adapters] == [(file_sha256(LORA), 0.5)]

    code, out, err = fidelora("replay", str(image), "--base-model", str(TINY_BASE), *CPU)
    assert (code, out) == (2, "")
    assert f"{LORA.stem} (sha256 0123456789ab)" in err
