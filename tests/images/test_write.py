"""Image files: their pixels, the recipe inside, and atomic writing."""

from __future__ import annotations

import errno
import io
import json
import os
import stat
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image, PngImagePlugin

from fidelora.atomic import make_folder, write_atomically
from fidelora.errors import ImageRecordError, OutputError
from fidelora.images.formats import format_of, is_image_format, suffix_of
from fidelora.images.parameters import parameters_text
from fidelora.images.read import read_record
from fidelora.images.write import (
    GeneratedImage,
    preview_jpeg,
)
from fidelora.recipe import AdapterRef, Recipe

FORMATS = ["png", "jpeg", "webp"]
ENVIRONMENT = {"fidelora": "1.2.3", "torch": "2.13.0", "device": "cpu"}
RECIPE = Recipe(
    prompt='süß 🙂 "a ball"\nin two lines',
    negative_prompt="blurry, bad",
    base_model="models/my base.safetensors",
    base_sha256="ab" * 32,
    width=64,
    height=72,
    steps=12,
    guidance_scale=7.25,
    seed=2**63 - 1,
    sampler="k_dpmsolver++",
    adapters=(AdapterRef("0123456789abcdef" * 4, 0.75, name="style"), AdapterRef("f" * 64, -2)),
)
PARAMETERS = (
    'süß 🙂 "a ball"\nin two lines <lora:style:0.75> <lora:ffffffffffff:-2>\n'
    "Negative prompt: blurry, bad\n"
    "Steps: 12, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.25, "
    "Seed: 9223372036854775807, Size: 64x72, Model: my base.safetensors, "
    'Lora hashes: "style: fedcba987654, ffffffffffff: ffffffffffff", Version: Fidelora 1.2.3'
)


def image_of(recipe=RECIPE):
    """Return an image of noise, which lossy formats change."""
    pixels = np.random.default_rng(0).integers(0, 256, (72, 64, 3), dtype=np.uint8)
    hashes = {RECIPE.adapters[0].sha256: "fedcba9876543210" * 4}
    return GeneratedImage(pixels, recipe, ENVIRONMENT, lora_hashes=hashes)


def opened(content):
    return Image.open(io.BytesIO(content))


# --- encoding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_format", FORMATS)
def test_the_recipe_in_a_file_is_complete(tmp_path, image_format):
    path = tmp_path / "image"
    path.write_bytes(image_of().encode(image_format))
    record = read_record(path)
    assert Recipe.from_dict(record["recipe"]) == RECIPE
    assert [adapter["name"] for adapter in record["recipe"]["adapters"]] == ["style", ""]
    assert record["digest"] == RECIPE.digest
    assert record["environment"] == ENVIRONMENT


@pytest.mark.parametrize("image_format", FORMATS)
def test_the_file_has_the_requested_format(image_format):
    with opened(image_of().encode(image_format)) as image:
        assert image.format == image_format.upper()
        assert (image.mode, image.size) == ("RGB", (64, 72))


@pytest.mark.parametrize("image_format", ["png", "webp"])
def test_png_and_webp_keep_every_pixel(image_format):
    image = image_of()
    with opened(image.encode(image_format)) as again:
        assert np.array_equal(np.asarray(again), image.pixels)


def test_jpeg_nearly_keeps_the_pixels():
    """Uses a smooth image, because JPEG changes noise a lot."""
    ramp = np.linspace(0, 255, 64 * 72, dtype=np.uint8).reshape(72, 64, 1).repeat(3, axis=2)
    with opened(GeneratedImage(ramp, RECIPE, ENVIRONMENT).encode("jpeg")) as again:
        assert np.abs(np.asarray(again).astype(int) - ramp).max() <= 4


@pytest.mark.parametrize("image_format", ["jpeg", "webp"])
def test_the_quality_is_stored_with_the_recipe(tmp_path, image_format):
    usual, coarse = image_of().encode(image_format), image_of().encode(image_format, 10)
    assert len(coarse) < len(usual)
    (tmp_path / "image").write_bytes(coarse)
    record = read_record(tmp_path / "image")
    assert (record["quality"], Recipe.from_dict(record["recipe"])) == (10, RECIPE)
    for quality in (0, 100):
        assert opened(image_of().encode(image_format, quality)).format == image_format.upper()


@pytest.mark.parametrize(("image_format", "quality"), [("png", 90), ("jpeg", -1), ("webp", 101)])
def test_an_invalid_quality_is_refused(image_format, quality):
    with pytest.raises(OutputError, match="JPEG and WebP have one, from 0 to 100"):
        image_of().encode(image_format, quality)


def test_png_is_the_default():
    assert image_of().encode() == image_of().encode("png")


@pytest.mark.parametrize("image_format", FORMATS)
def test_the_same_image_gives_the_same_bytes(image_format):
    assert image_of().encode(image_format) == image_of().encode(image_format)


def test_conversion_to_pillow_keeps_the_pixels():
    assert np.array_equal(np.asarray(image_of().to_pil()), image_of().pixels)


def test_a_recipe_too_long_for_jpeg_is_refused_only_for_jpeg(tmp_path):
    long = image_of(Recipe(prompt="🙂" * 6_000, negative_prompt="x" * 6_000, width=64, height=72))
    with pytest.raises(
        OutputError, match=r"too long to be kept in a JPEG \(64 KB\); choose png or webp"
    ):
        long.encode("jpeg")
    for image_format in ("png", "webp"):
        path = tmp_path / f"image.{image_format}"
        assert Recipe.from_dict(read_record(long.save(path))["recipe"]) == long.recipe


def test_latin_prompts_of_maximum_length_fit_into_a_jpeg(tmp_path):
    long = image_of(Recipe(prompt="x" * 10_000, negative_prompt="y" * 10_000, width=64, height=72))
    assert Recipe.from_dict(read_record(long.save(tmp_path / "image.jpg"))["recipe"]) == long.recipe


# --- the text that other programs read ------------------------------------------------------------


def test_png_contains_parameters_in_automatic1111_format():
    with opened(image_of().encode("png")) as image:
        assert isinstance(image, PngImagePlugin.PngImageFile)
        assert image.text["parameters"] == PARAMETERS


@pytest.mark.parametrize("image_format", ["jpeg", "webp"])
def test_jpeg_and_webp_contain_parameters_as_user_comment(image_format):
    with opened(image_of().encode(image_format)) as image:
        comment = image.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
    assert comment.startswith(b"UNICODE\0")
    assert comment.removeprefix(b"UNICODE\0").decode("utf-16-be") == PARAMETERS


def test_parameters_contain_only_fields_that_the_recipe_sets():
    assert parameters_text(Recipe(prompt="a red ball"), ENVIRONMENT) == (
        "a red ball\n"
        "Steps: 25, Sampler: DDPM, Schedule type: Automatic, CFG scale: 6, Seed: 42, "
        "Size: 512x512, Model: stable-diffusion-v1-5, Version: Fidelora 1.2.3"
    )


@pytest.mark.parametrize(
    ("sampler", "pairs"),
    [
        ("k_euler", "Sampler: Euler, Schedule type: Karras, CFG"),
        ("euler", "Sampler: Euler, Schedule type: Automatic, CFG"),
        ("dpmsolver++", "Sampler: DPM++ 2M, Schedule type: Uniform, CFG"),
        ("dpmsingle", "Sampler: dpmsingle, CFG"),
    ],
)
def test_samplers_have_their_names_in_a1111(sampler, pairs):
    text = parameters_text(Recipe(prompt="a red ball", sampler=sampler), ENVIRONMENT)
    assert pairs in text


@pytest.mark.parametrize("prompt", ["(a)", "[a]", r"a\b", "a)"])
@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_brackets_are_marked_as_text_for_a1111(field, prompt):
    text = parameters_text(Recipe(**{"prompt": "a", field: prompt}), ENVIRONMENT)
    assert ", Emphasis: None, " in text


def test_a_value_with_separators_is_quoted():
    text = parameters_text(Recipe(prompt="", base_model='my, "own": base'), ENVIRONMENT)
    assert r'Model: "my, \"own\": base", Version' in text


# --- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
def test_an_image_of_another_program_is_refused(tmp_path, image_format):
    path = tmp_path / "foreign.img"
    Image.new("RGB", (8, 8)).save(path, image_format)
    with pytest.raises(
        ImageRecordError,
        match=r"foreign\.img has no Fidelora recipe: another program made it",
    ):
        read_record(path)


@pytest.mark.parametrize("text", ["", "text", "[1]", "5", "null", "{}", '{"prompt": "x"}'])
def test_a_png_with_an_invalid_record_is_refused(tmp_path, text):
    path = tmp_path / "foreign.png"
    info = PngImagePlugin.PngInfo()
    info.add_text("fidelora", text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    with pytest.raises(ImageRecordError, match="has no Fidelora recipe"):
        read_record(path)


@pytest.mark.parametrize("description", ["a holiday", '{"a": 1}', b"\xff\xfe", "ü"])
def test_a_jpeg_with_another_image_description_is_refused(tmp_path, description):
    path = tmp_path / "foreign.jpg"
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = description
    Image.new("RGB", (8, 8)).save(path, exif=exif)
    with pytest.raises(ImageRecordError, match="has no Fidelora recipe"):
        read_record(path)


@pytest.mark.parametrize("content", [b"", b"just text", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"])
def test_a_file_that_is_not_an_image_is_refused(tmp_path, content):
    path = tmp_path / "notes.png"
    path.write_bytes(content)
    with pytest.raises(ImageRecordError, match=r"notes\.png is not a PNG, JPEG or WebP image"):
        read_record(path)


def test_a_format_that_fidelora_does_not_write_is_refused(tmp_path):
    path = tmp_path / "animation.gif"
    Image.new("RGB", (8, 8)).save(path, "GIF")
    with pytest.raises(ImageRecordError, match=r"animation\.gif is not a PNG, JPEG or WebP image"):
        read_record(path)


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(ImageRecordError, match="cannot be read: Is a directory"):
        read_record(tmp_path)


@pytest.mark.parametrize("length", [8, 40, 200, 1000])
def test_an_image_cut_before_the_end_of_its_recipe_is_refused(tmp_path, length):
    path = tmp_path / "cut.png"
    path.write_bytes(image_of().encode("png")[:length])
    with pytest.raises(ImageRecordError, match=r"cut\.png"):
        read_record(path)


def test_a_missing_image_is_refused(tmp_path):
    with pytest.raises(
        ImageRecordError, match=r"The image .*nowhere\.png does not exist; check the path"
    ):
        read_record(tmp_path / "nowhere.png")


def test_an_image_resaved_by_another_program_has_no_recipe(tmp_path):
    path = image_of().save(tmp_path / "image.png")
    with Image.open(path) as image:
        stripped = image.copy()
    stripped.info.clear()
    stripped.save(path)
    with pytest.raises(ImageRecordError, match="metadata were removed"):
        read_record(path)


# --- saving ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "image_format"),
    [
        ("a.png", "PNG"),
        ("a.PNG", "PNG"),
        ("a.jpg", "JPEG"),
        ("a.jpeg", "JPEG"),
        ("a.webp", "WEBP"),
        ("a.jpg.png", "PNG"),
    ],
)
def test_the_suffix_selects_the_format(tmp_path, name, image_format):
    path = image_of().save(str(tmp_path / name))
    assert path == tmp_path / name
    with Image.open(path) as image:
        assert image.format == image_format


@pytest.mark.parametrize("name", ["a.gif", "a.bmp", "a", "png", "a.png.txt"])
def test_an_unknown_suffix_is_refused_and_nothing_is_written(tmp_path, name):
    with pytest.raises(
        OutputError,
        match=rf"The suffix of {name} is not supported for images; use \.png, \.jpg or \.webp",
    ):
        image_of().save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("image_format", FORMATS)
def test_the_suffix_of_a_format_selects_that_format(tmp_path, image_format):
    assert format_of(tmp_path / f"a{suffix_of(image_format)}") == image_format
    assert is_image_format(image_format)


@pytest.mark.parametrize("name", ["jpg", "PNG", ".png", ""])
def test_unknown_format_names_are_refused(name):
    assert not is_image_format(name)


def test_saving_replaces_an_older_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"older")
    image_of().save(path)
    assert path.read_bytes() == image_of().encode("png")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_file_permissions_follow_the_umask(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        write_atomically(tmp_path / "a", b"x")
    finally:
        assert os.umask(before) == mask
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode


def test_a_missing_folder_is_an_error_and_not_created(tmp_path):
    with pytest.raises(
        OutputError, match=r"nowhere/a\.png could not be written: No such file or directory"
    ):
        image_of().save(tmp_path / "nowhere" / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_at_the_files_path_is_an_error_and_kept(tmp_path):
    (tmp_path / "a.png").mkdir()
    with pytest.raises(OutputError, match=r"a\.png could not be written: Is a directory"):
        image_of().save(tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == [tmp_path / "a.png"]


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["fsync", "replace", "fdopen"])
@pytest.mark.parametrize("older", [None, b"older"])
def test_a_failed_write_leaves_nothing_and_keeps_the_older_file(tmp_path, monkeypatch, call, older):
    path = tmp_path / "a.png"
    if older is not None:
        path.write_bytes(older)
    with monkeypatch.context() as patched:
        patched.setattr(os, call, full_disk)
        with pytest.raises(
            OutputError, match=r"a\.png could not be written: No space left on device"
        ):
            image_of().save(path)
    assert [(found.name, found.read_bytes()) for found in tmp_path.iterdir()] == (
        [] if older is None else [("a.png", older)]
    )


def test_the_file_is_synced_to_disk_before_it_is_renamed(tmp_path, monkeypatch):
    """Otherwise a crash could leave an empty file under the final name."""
    path, calls = tmp_path / "a.png", []

    def watched(name):
        original = getattr(os, name)

        def call(*arguments):
            calls.append((name, path.exists()))
            return original(*arguments)

        return call

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, watched(name))
    image_of().save(path)
    assert calls[:2] == [("fsync", False), ("replace", False)]


def test_a_recipe_too_long_for_a_jpeg_leaves_the_older_file_intact(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(b"older")
    with pytest.raises(OutputError, match="too long"):
        image_of(Recipe(prompt="🙂" * 10_000, width=64, height=72)).save(path)
    assert path.read_bytes() == b"older"


def test_the_record_is_json_ready_data():
    assert json.loads(json.dumps(image_of().record())) == image_of().record()


def test_a_failed_sync_of_the_folder_is_reported(tmp_path, monkeypatch):
    """The file is complete, and the message says so."""
    real = os.fsync

    def fails_for_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fails_for_folders)
    with pytest.raises(
        OutputError, match="was written, but its folder could not be synced to disk"
    ):
        write_atomically(tmp_path / "a.png", b"content")
    assert (tmp_path / "a.png").read_bytes() == b"content"


def test_a_file_name_of_maximum_length_is_written(tmp_path):
    path = tmp_path / ("x" * 251 + ".png")
    write_atomically(path, b"content")
    assert path.read_bytes() == b"content"


def test_a_nul_in_the_file_name_is_an_output_error(tmp_path):
    with pytest.raises(OutputError, match="could not be written"):
        write_atomically(tmp_path / "a\0.png", b"content")
    assert list(tmp_path.iterdir()) == []


def test_an_unsupported_format_is_refused(tmp_path):
    image = GeneratedImage(np.zeros((8, 8, 3), np.uint8), Recipe(prompt=""), {"fidelora": "0"})
    with pytest.raises(OutputError, match="is not a supported image format"):
        image.encode("gif")  # type: ignore[arg-type]


def test_a_huge_image_is_not_opened(tmp_path):
    header = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    chunk = (13).to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk)
    with pytest.raises(ImageRecordError, match=r"has no Fidelora recipe|is not a PNG"):
        read_record(tmp_path / "bomb.png")


def test_an_interrupt_while_writing_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(_descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "a.png", b"content")
    assert list(tmp_path.iterdir()) == []


def test_the_output_folder_is_created_and_tested(tmp_path):
    make_folder(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="is not writable"):
        make_folder(tmp_path / "file")
    with pytest.raises(OutputError, match="is not writable"):
        make_folder(tmp_path / "file" / "below")


@pytest.mark.parametrize(
    ("size", "shown"),
    [((8, 8), (8, 8)), ((64, 96), (96, 64)), ((512, 256), (64, 128)), ((512, 512), (128, 128))],
)
def test_previews_have_at_most_128_pixels_per_side_and_20_kb(size, shown):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    content = preview_jpeg(pixels)
    assert Image.open(io.BytesIO(content)).size == shown
    assert len(content) < 20_000
