"""Reading of images: Fidelora's recipe, or the supported parameters of other programs."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, PngImagePlugin
from tests.support import sampler_options

from fidelora.errors import (
    ImageRecordError,
    PromptSyntaxError,
    UnknownModelError,
    UnknownSamplerError,
)
from fidelora.families import all_families, get_family
from fidelora.images.a1111_prompt import NamedLora, describe_syntax, lora_of, loras_in
from fidelora.images.a1111_samplers import name_of, sampler_names, sampler_of
from fidelora.images.parameters import Parameters, parameters_text, read_parameters
from fidelora.images.read import MAX_PARAMETERS_CHARACTERS, read_origin, recipe_of
from fidelora.images.write import GeneratedImage
from fidelora.recipe import AdapterRef, Recipe

SD15 = get_family("sd15")
ENVIRONMENT = {"fidelora": "1.2.3", "device": "cpu"}
RECIPE = Recipe(
    prompt='süß 🙂 "a ball"\nin two lines',
    negative_prompt="blurry, bad",
    base_sha256="0123456789abcdef" * 4,
    width=64,
    height=72,
    sampler="k_dpmsolver++",
    adapters=(AdapterRef("0123456789abcdef" * 4, 0.75, name="style"), AdapterRef("f" * 64, -2)),
)
FOREIGN = (
    "masterpiece, a red ball <lora:style:0.8> on grass <lora:detail:-0.5>\nsecond line\n"
    "Negative prompt: blurry,\nbad hands\n"
    "Steps: 30, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 965400086, "
    "Size: 512x768, Model hash: 6ce0161689, Model: v1-5-pruned, Clip skip: 2, "
    'Lora hashes: "style: 0123456789ab, detail: FFFFFFFFFFFF", Version: v1.10.1'
)


def ours(image_format="png", recipe=RECIPE) -> bytes:
    return GeneratedImage(np.zeros((72, 64, 3), np.uint8), recipe, ENVIRONMENT).encode(image_format)


def foreign(
    text: str = FOREIGN, image_format: str = "PNG", order: str = "utf-16-be", **texts: str
) -> bytes:
    buffer = io.BytesIO()
    image = Image.new("RGB", (64, 72))
    if image_format == "PNG":
        info = PngImagePlugin.PngInfo()
        for key, value in ({"parameters": text} | texts).items():
            info.add_itxt(key, value)
        image.save(buffer, "PNG", pnginfo=info)
    else:
        exif = Image.Exif()
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"UNICODE\0" + text.encode(
            order
        )
        image.save(buffer, image_format, exif=exif)
    return buffer.getvalue()


def webp_with_exif(exif: bytes) -> bytes:
    """Return a WebP with these bytes as EXIF, which Pillow parses only on request."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "WEBP", exif=exif)
    return buffer.getvalue()


def parameters_in(content: bytes) -> Parameters:
    origin = read_origin(content)
    assert origin.recipe is None
    assert origin.parameters is not None
    return origin.parameters


# --- our own images -------------------------------------------------------------------------------


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_a_recipe_is_read_back_completely(image_format):
    origin = read_origin(ours(image_format))
    assert origin.recipe is not None
    assert origin.recipe == RECIPE
    assert [ref.name for ref in origin.recipe.adapters] == ["style", ""]
    assert (origin.format, origin.width, origin.height) == (image_format, 64, 72)
    assert origin.environment == ENVIRONMENT
    assert origin.parameters is None


def test_a_recipe_with_a_wrong_digest_is_refused():
    record = {"recipe": RECIPE.to_dict() | {"seed": 43}, "digest": RECIPE.digest}
    with pytest.raises(
        ImageRecordError, match=r"a\.png has a recipe that was changed after the image was made"
    ):
        read_origin(foreign(fidelora=json.dumps(record)), "a.png")


@pytest.mark.parametrize("quality", [500, -1, 90, "90", True, 90.5])
def test_a_quality_in_a_png_is_refused(quality):
    record = {"recipe": RECIPE.to_dict(), "quality": quality}
    with pytest.raises(ImageRecordError, match="not valid for its format"):
        read_origin(foreign(fidelora=json.dumps(record)))


def test_an_unsupported_recipe_format_is_refused_despite_parameters():
    record = {"recipe": RECIPE.to_dict() | {"format": 99}}
    with pytest.raises(
        ImageRecordError, match=r"a recipe that cannot be used\. This version of Fidelora reads"
    ):
        read_origin(foreign(fidelora=json.dumps(record)))


@pytest.mark.parametrize("environment", [None, [], "x", {"torch": 5}])
def test_any_environment_in_a_record_is_accepted(environment):
    recipe, read = recipe_of({"recipe": RECIPE.to_dict(), "environment": environment})
    assert recipe == RECIPE
    assert read == ({"torch": "5"} if environment == {"torch": 5} else {})


# --- images of other programs ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image_format", "order"),
    [("PNG", ""), ("JPEG", "utf-16-be"), ("WEBP", "utf-16-be"), ("JPEG", "utf-16-le")],
)
def test_supported_parameters_are_read(image_format, order):
    read = parameters_in(foreign(FOREIGN, image_format, order))
    assert read.text == FOREIGN
    assert read.prompt == "masterpiece, a red ball on grass\nsecond line"
    assert read.negative_prompt == "blurry,\nbad hands"
    assert read.loras == (
        NamedLora("style", 0.8, "0123456789ab"),
        NamedLora("detail", -0.5, "ffffffffffff"),
    )
    assert read.fields == {
        "steps": 30, "sampler": "k_dpmsolver++", "guidance_scale": 7.0, "seed": 965400086,
        "width": 512, "height": 768
    }  # fmt: skip
    assert [(one.name, one.value) for one in read.ignored] == [
        ("Model hash", "6ce0161689"), ("Model", "v1-5-pruned"), ("Clip skip", "2")
    ]  # fmt: skip
    recipe = read.recipe([AdapterRef("a" * 64), AdapterRef("b" * 64)], base_model="x")
    assert (recipe.base_model, recipe.seed, recipe.sampler) == ("x", 965400086, "k_dpmsolver++")
    assert [(ref.sha256[0], ref.multiplier) for ref in recipe.adapters] == [("a", 0.8), ("b", -0.5)]


def test_text_chunks_after_the_pixels_are_found():
    content = foreign()
    start = content.index(b"iTXt") - 4
    length = int.from_bytes(content[start : start + 4], "big") + 12
    chunk, end = content[start : start + length], content.index(b"IEND") - 4
    moved = content[:start] + content[start + length : end] + chunk + content[end:]
    assert parameters_in(moved).fields["steps"] == 30


def test_missing_parameters_except_the_size_use_the_models_defaults():
    read = parameters_in(foreign("just a prompt"))
    assert (read.prompt, dict(read.fields)) == ("just a prompt", {"width": 64, "height": 72})
    assert read.recipe(()).steps == SD15.default_steps


@pytest.mark.parametrize(
    ("line", "name", "reason"),
    [
        (
            "Steps: 20, Sampler: DPM++ SDE Karras, Seed: 1",
            "Sampler",
            "The sampler 'DPM++ SDE Karras' is not supported here; use one of Euler,",
        ),
        (
            "Steps: 20, Sampler: Heun, Schedule type: Karras, Seed: 1",
            "Sampler",
            "does not support the scheduler 'Karras' here",
        ),
        ("Steps: many, Sampler: Euler, Seed: 1", "Steps", "not valid for this key"),
        ("Steps: 20,5, Sampler: Euler, Seed: 1", "Steps", "not valid for this key"),
        ("Steps: 20, Sampler: Euler, Seed: 1,234,567", "Seed", "not valid for this key"),
        ("Steps: 20, Sampler: Euler, Seed: -1", "Seed", "not valid for this key"),
        ("Steps: 20, Sampler: Euler, Size: 12", "Size", "not valid for this key"),
        (
            "Steps: 20, Sampler: Euler, Seed: 1, Hires upscale: 2",
            "Hires upscale",
            "is not supported",
        ),
        ("Steps: 20, Sampler: Euler, Seed: 1, ENSD: 31337", "ENSD", "is not supported"),
        ("Steps: 0, Sampler: Euler, Seed: 1", "Steps", "steps is 0; it must be"),
        ("Steps: 20, Sampler: Euler, Seed: 1, CFG scale: nan", "CFG scale", "guidance_scale is"),
        ("Steps: 20, Sampler: Euler, Seed: 1, Size: 0x0", "Size", "width is 0; it must be"),
        ("Steps: 20, Sampler: Default, Seed: 1", "Sampler", "is not supported here"),
        (
            "Steps: 20, Sampler: Euler, Seed: 1, AddNet Model 1: style(0123456789ab)",
            "AddNet Model 1",
            "made with this LoRA, which is not applied",
        ),
        (
            'Steps: 20, Sampler: Euler, Seed: 1, TI hashes: "bad: 0123456789ab"',
            "TI hashes",
            "embeddings",
        ),
        (
            "Steps: 20, Sampler: Euler, Seed: 1, ADM Guidance: (1.5, 0.8, 0.3)",
            "ADM Guidance",
            "is not supported",
        ),
        (
            "Steps: 20, Sampler: Euler, Seed: 1, Civitai resources: "
            '[{"air": "urn:air:sd1:lora:civitai:1@2", "weight": 0.8}]',
            "Civitai resources",
            "made with this LoRA, which is not applied",
        ),
    ],
)
def test_unused_parameters_are_listed(line, name, reason):
    (ignored,) = read_parameters(f"a ball\n{line}", SD15).ignored
    assert ignored.name == name
    assert reason in ignored.reason


@pytest.mark.parametrize(
    ("prompt", "value"),
    [
        ("a <hypernet:x:1>", "<hypernet:x:1>"),
        ("a <lora:x:1:0.5>", "<lora:x:1:0.5>"),
        ("a <lora:x:high>", "<lora:x:high>"),
    ],
)
def test_unusable_lora_tags_are_listed(prompt, value):
    read = read_parameters(f"{prompt}\nSteps: 20, Sampler: Euler, Seed: 1", SD15)
    assert (read.prompt, read.loras) == ("a", ())
    assert [one.value for one in read.ignored] == [value]


def test_decimal_commas_are_read():
    line = "Steps: 20, Sampler: DDIM, CFG scale: 7,5, Eta DDIM: 0,25,Seed: 1, Size: 64x72"
    found = read_parameters(f"a ball\n{line}", SD15)
    assert found.ignored == ()
    assert (found.fields["guidance_scale"], found.fields["eta"]) == (7.5, 0.25)
    assert (found.fields["seed"], found.fields["width"], found.fields["steps"]) == (1, 64, 20)


def test_weighted_words_are_listed_and_stay_in_the_prompt():
    read = read_parameters(
        "a (red:1.3) ball\nNegative prompt: [a|b]\nSteps: 20, Sampler: Euler, Seed: 1", SD15
    )
    assert read.prompt == "a (red:1.3) ball"
    assert [one.name for one in read.ignored] == ["prompt", "negative prompt"]
    assert "encodes prompts as they are written" in read.ignored[0].reason


@pytest.mark.parametrize(
    "content", [b"", b"text", b"GIF89a", b"\x89PNG\r\n\x1a\n", webp_with_exif(b"II*\0")]
)
def test_a_file_that_is_not_an_image_is_refused(content):
    with pytest.raises(
        ImageRecordError, match=r"a\.png is not a PNG, JPEG or WebP image that can be read"
    ):
        read_origin(content, "a.png")


def test_an_image_without_recipe_or_parameters_is_refused():
    with pytest.raises(ImageRecordError, match="has neither a Fidelora recipe"):
        read_origin(foreign(" "))


def test_too_much_text_is_refused():
    with pytest.raises(ImageRecordError, match="parameters of 50,001 characters"):
        read_origin(foreign("x" * (MAX_PARAMETERS_CHARACTERS + 1)))


def test_an_unknown_model_is_refused():
    with pytest.raises(UnknownModelError):
        read_origin(ours(), model="sd99")


@given(st.text(max_size=300))
@settings(max_examples=300, deadline=None)
def test_arbitrary_text_raises_no_unexpected_error(text):
    read = read_parameters(text, SD15)
    assert read.text == text


WORDS = st.text(
    st.characters(exclude_categories=["C", "Z"], exclude_characters="<>"), min_size=1, max_size=20
)
NAMES = st.text("abc_-. 0", min_size=1, max_size=10).filter(lambda name: name == name.strip())


@given(
    recipe=st.builds(
        Recipe,
        prompt=WORDS,
        negative_prompt=st.just("") | WORDS,
        steps=st.integers(1, 50),
        seed=st.integers(0, 2**63 - 1),
        guidance_scale=st.integers(0, 400).map(lambda number: number / 4),
        sampler=st.sampled_from(sorted(SD15.samplers)),
        width=st.integers(8, 512).map(lambda number: 8 * number),
        fidelity=st.sampled_from(["exact", "fast"]),
        emphasis=st.sampled_from(["none", "ignore", "original", "no_norm"]),
        adapters=st.lists(
            st.builds(
                AdapterRef,
                st.text("0123456789abcdef", min_size=64, max_size=64),
                st.integers(-8, 8).map(lambda n: n / 4),
                NAMES,
            ),
            max_size=3,
            unique_by=lambda ref: ref.name,
        ).map(tuple),
    ),
    options=st.data(),
)
@settings(deadline=None)
def test_written_parameters_are_read_back_as_the_same_recipe(recipe, options):
    """The test adds the adapters' hashes and the base model, which the text does not contain."""
    recipe = replace(recipe, **options.draw(sampler_options(SD15.samplers[recipe.sampler])))
    read = read_parameters(parameters_text(recipe, ENVIRONMENT), SD15)
    assert read.recipe(recipe.adapters) == recipe
    assert [(lora.name, lora.hash) for lora in read.loras] == [
        (ref.name, ref.sha256[:12]) for ref in recipe.adapters
    ]
    assert [one.name for one in read.ignored] == ["Model"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        # A1111 before 1.9, in which `DPM++ 2M Karras` was another sampler
        ("Sampler: DPM++ 2M, Version: v1.6.0", "dpmsolver++"),
        ("Sampler: DPM++ 2M, Model hash: 7460a6fa", "dpmsolver++"),
        ("Sampler: DPM++ 2M Karras, Version: v1.6.0", "k_dpmsolver++"),
        ("Sampler: DPM++ 2M, Schedule type: Automatic, Version: v1.9.4", "k_dpmsolver++"),
        ("Sampler: DPM++ 2M, Schedule type: Uniform", "dpmsolver++"),
        # ComfyUI's names, in texts of its extensions that save images
        ("Sampler: euler_ancestral, Schedule type: normal", "euler_a"),
        ("Sampler: dpmpp_2m", "dpmsolver++"),
        ("Sampler: dpmpp_2m_karras", "k_dpmsolver++"),
        ("Sampler: dpmpp_2m, Schedule type: karras", "k_dpmsolver++"),
        ("Sampler: euler_normal", "euler"),
        ("Sampler: Euler, Schedule type: Normal", "euler"),
    ],
)
def test_sampler_names_of_older_and_other_programs_are_read(line, expected):
    read = read_parameters(f"a ball\nSteps: 20, {line}, Seed: 1", SD15)
    assert read.fields["sampler"] == expected


def test_windows_line_ends_and_sizes_with_blanks_are_read():
    text = "a ball\nNegative prompt: bad\nSteps: 20, Sampler: Euler, Seed: 1, Size: 64 x 72"
    read = read_parameters(text.replace("\n", "\r\n"), SD15)
    assert (read.prompt, read.negative_prompt, read.ignored) == ("a ball", "bad", ())
    assert (read.fields["width"], read.fields["height"]) == (64, 72)


def test_keys_that_change_no_pixel_are_not_named():
    text = "a ball\nSteps: 20, Sampler: Euler, Seed: 1, App: SD.Next, Operations: txt2img"
    more = ", Parser: native, CFG true: 1, CLIP skip: 1, Noise Schedule: Default"
    assert read_parameters(text + more, SD15).ignored == ()
    more = ", Backend: Diffusers, Pipeline: StableDiffusionPipeline, Created Date: 2026-11-28"
    assert read_parameters(text + more, SD15).ignored == ()


@pytest.mark.parametrize(
    "encoded",
    [
        b"UNICODE\0" + FOREIGN.encode("utf-8"),  # not UTF-16, although the code says so
        b"ASCII\0\0\0" + FOREIGN.encode("ascii"),
        b"\0" * 8 + FOREIGN.encode("utf-8"),
        b"UNICODE\0" + FOREIGN.encode("utf-16"),  # with a byte order mark
        b"JIS\0\0\0\0\0" + FOREIGN.encode("iso2022_jp"),
    ],
)
@pytest.mark.parametrize("image_format", ["JPEG", "WEBP", "PNG"])
def test_comments_of_every_encoding_are_read(encoded, image_format):
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = encoded
    buffer = io.BytesIO()
    Image.new("RGB", (64, 72)).save(buffer, image_format, exif=exif.tobytes())
    assert parameters_in(buffer.getvalue()).text == FOREIGN


def test_parameters_in_the_comment_of_a_jpeg_are_read():
    for text, is_read in ((FOREIGN, True), ("Created with GIMP", False)):
        buffer = io.BytesIO()
        Image.new("RGB", (64, 72)).save(buffer, "JPEG", comment=text.encode())
        if is_read:
            assert parameters_in(buffer.getvalue()).text == text
        else:
            with pytest.raises(ImageRecordError, match="neither a Fidelora recipe nor"):
                read_origin(buffer.getvalue())


def test_a_change_after_sampling_is_named():
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", FOREIGN)
    info.add_text("postprocessing", "Postprocess upscale by: 2")
    buffer = io.BytesIO()
    Image.new("RGB", (64, 72)).save(buffer, "PNG", pnginfo=info)
    last = parameters_in(buffer.getvalue()).ignored[-1]
    assert (last.name, last.value) == ("postprocessing", "Postprocess upscale by: 2")
    assert "changed after it was made" in last.reason


@pytest.mark.parametrize("tag", [ExifTags.Base.UserComment, ExifTags.Base.ImageDescription])
def test_parameters_in_other_places_of_exif_are_read(tag):
    exif = Image.Exif()
    exif[tag] = FOREIGN
    buffer = io.BytesIO()
    Image.new("RGB", (64, 72)).save(buffer, "JPEG", exif=exif)
    assert parameters_in(buffer.getvalue()).text == FOREIGN


def test_an_exif_description_without_parameters_is_refused():
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = "a photo of my cat"
    buffer = io.BytesIO()
    Image.new("RGB", (64, 72)).save(buffer, "JPEG", exif=exif)
    with pytest.raises(ImageRecordError, match="has neither"):
        read_origin(buffer.getvalue())


@pytest.mark.parametrize("order", ["utf-16-be", "utf-16-le"])
@pytest.mark.parametrize("image_format", ["JPEG", "WEBP"])
def test_a_byte_order_mark_is_not_part_of_the_prompt(order, image_format):
    marked = foreign("\ufeff" + FOREIGN, image_format, order)
    assert parameters_in(marked) == parameters_in(foreign(FOREIGN, image_format, order))


# --- emphasis -------------------------------------------------------------------------------------

SETTINGS = "Steps: 2, Sampler: Euler, CFG scale: 7, Seed: 1, Size: 64x64"


@pytest.mark.parametrize(
    ("text", "emphasis"),
    [
        (SETTINGS, "original"),
        (SETTINGS + ", Emphasis: No norm, Version: v1.10.1", "no_norm"),
        (SETTINGS + ", Emphasis: Ignore", "ignore"),
        (SETTINGS + ", Emphasis: None", "none"),
        (SETTINGS + ", Emphasis: of another kind", "none"),
        (SETTINGS + ", Version: Fidelora 1.0.0", "none"),
    ],
)
def test_emphasis_of_other_programs_is_read_if_it_is_wanted(text, emphasis):
    prompt = r"a (red:1.2) \(ball\)"
    read = read_parameters(f"{prompt}\n{text}", SD15, with_emphasis=True)
    assert read.fields.get("emphasis", "none") == emphasis
    if emphasis != "none":
        assert (read.prompt, read.ignored) == (prompt, ())
    assert "emphasis" not in read_parameters(f"{prompt}\n{text}", SD15).fields


def test_prompt_editing_is_named_and_switches_emphasis_off():
    read = read_parameters(f"(a:1.2) [b:c:0.5]\n{SETTINGS}", SD15, with_emphasis=True)
    assert "emphasis" not in read.fields
    assert "switches words during sampling" in read.ignored[0].reason


# --- A1111's names --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "rest", "loras"),
    [
        ("a cat", "a cat", ()),
        ("a cat <lora:x>", "a cat", (NamedLora("x"),)),
        ("<lora:x:0.5> a cat", "a cat", (NamedLora("x", 0.5),)),
        (
            "a <lora:a b-c.v1:-2><lyco:y:.5> cat",
            "a cat",
            (NamedLora("a b-c.v1", -2), NamedLora("y", 0.5)),
        ),
        ("a <lora:x:0.8:0.8>", "a", (NamedLora("x", 0.8),)),
        ("a <lora:x:te=0.8:unet=0.8>", "a", (NamedLora("x", 0.8),)),
        ("  a < b > c ", "  a < b > c ", ()),
    ],
)
def test_lora_tags_are_removed_from_prompts(prompt, rest, loras):
    assert loras_in(prompt) == (rest, loras)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("<lora:x:1:0.5>", "two multipliers"),
        ("<lora:x:unet=0.5>", "two multipliers"),
        ("<lora:x:5.1>", "from -5 to 5"),
        ("<lora:x:nan>", "from -5 to 5"),
        ("<lora:x:>", "from -5 to 5"),
        ("<lora: :1>", "must be <lora:name:multiplier>"),
        ("<lora:x:1:1:64>", "must be <lora:name:multiplier>"),
        ("<lora:x:1:lbw=ALL>", "must be <lora:name:multiplier>"),
        ("<hypernet:x:1>", "is not a LoRA"),
    ],
)
def test_unsupported_tags_are_refused(prompt, message):
    with pytest.raises(PromptSyntaxError, match=message):
        loras_in(prompt)


def test_the_default_multiplier_of_a_tag_is_1():
    assert lora_of("lora", "x") == NamedLora("x", 1.0)


@pytest.mark.parametrize(
    "prompt",
    [
        "a (b:1.2)",
        "(a b :0.5)",
        r"(ganyu \(genshin impact\):1.2)",
        "((red) hair:1.3)",
        "[a:b:0.5]",
        "[a|b]",
        "x AND y",
        "x BREAK y",
    ],
)
def test_prompt_weighting_syntax_is_detected(prompt):
    assert describe_syntax(prompt)


@pytest.mark.parametrize(
    "prompt", ["a (b)", "[trigger]", "at 1:2", r"\(b:1.2\)", "Andy breaks and", "(c) 2026", ""]
)
def test_plain_prompts_have_no_weighting_syntax(prompt):
    assert describe_syntax(prompt) == ""


@pytest.mark.parametrize(
    ("name", "scheduler", "ours"),
    [
        ("Euler a", "Automatic", "euler_a"),
        ("euler A", "", "euler_a"),
        ("Euler", "karras", "k_euler"),
        ("DPM++ 2M Karras", "Automatic", "k_dpmsolver++"),
        ("DPM++ 2M", "Uniform", "dpmsolver++"),
        ("LMS Karras", "", "k_lms"),
        ("ddpm", "Automatic", "ddpm"),
        ("dpmsingle", "Automatic", "dpmsingle"),
        ("DPM++ 2M Karras", "Karras", "k_dpmsolver++"),
        ("DPM++ 2M Karras", "Uniform", "k_dpmsolver++"),  # the name has precedence, as in A1111
        ("Euler Karras", "karras", "k_euler"),
        ("k_euler", "", "euler"),  # A1111's alias, not the trainer's name
        ("k_euler", "Karras", "k_euler"),
        ("k_euler_ancestral", "", "euler_a"),
        ("k_lms", "", "lms"),
        ("k_lms_ka", "Automatic", "k_lms"),
        ("k_dpmpp_2m", "", "dpmsolver++"),
        ("K_DPMPP_2M_KA", "", "k_dpmsolver++"),
        ("k_dpmsolver++", "", "k_dpmsolver++"),
    ],
)
def test_sampler_names_are_mapped(name, scheduler, ours):
    assert sampler_of(name, scheduler, SD15) == (ours, "default")


@pytest.mark.parametrize(
    ("name", "scheduler", "ours"),
    [
        ("Euler", "SGM Uniform", ("euler", "sgm_uniform")),
        ("Euler", "sgm_uniform", ("euler", "sgm_uniform")),
        ("Euler SGMUniform", "Karras", ("euler", "sgm_uniform")),
        ("k_euler", "SGM Uniform", ("euler", "sgm_uniform")),
        ("euler a", "sgm uniform", ("euler_a", "sgm_uniform")),
        ("DPM++ 2M", "SGM Uniform", ("dpmsolver++", "sgm_uniform")),
        ("DDIM", "Trailing", ("ddim", "trailing")),
        ("LCM", "trailing", ("lcm", "trailing")),
        ("tcd", "Trailing", ("tcd", "trailing")),
        ("pndm", "Trailing", ("pndm", "trailing")),
    ],
)
def test_schedulers_that_select_a_timestep_spacing(name, scheduler, ours):
    assert sampler_of(name, scheduler, SD15) == ours


def test_every_sampler_with_a_spacing_maps_back_to_it():
    for sampler, one in SD15.samplers.items():
        for spacing, scheduler in (("sgm_uniform", "SGM Uniform"), ("trailing", "Trailing")):
            if spacing in one.spacings:
                assert sampler_of(sampler, scheduler, SD15, prefers_own=True) == (sampler, spacing)


@pytest.mark.parametrize(
    ("name", "scheduler", "field"),
    [
        ("UniPC", "", "sampler"),
        ("Euler a", "Karras", "scheduler"),
        ("Euler", "SGM", "scheduler"),
        ("LMS", "SGM Uniform", "scheduler"),
        ("tcd", "SGM Uniform", "scheduler"),
    ],
)
def test_an_unsupported_sampler_is_refused(name, scheduler, field):
    with pytest.raises(UnknownSamplerError) as caught:
        sampler_of(name, scheduler, SD15)
    assert caught.value.field == field


@pytest.mark.parametrize("family", all_families().values(), ids=lambda one: one.id)
def test_the_default_sampler_of_a1111_is_supported_by_every_family(family):
    """Programs send `Euler`, or nothing, for flow models, too."""
    is_flow = family.id not in ("sd15", "sdxl")
    expected = family.default_sampler if is_flow else "euler"
    assert sampler_of("Euler", "Automatic", family) == (expected, "default")
    names = sampler_names(family)
    assert next(iter(names)) == "Euler"
    assert expected in names["Euler"]
    assert not is_flow or expected not in names


def test_a_flow_model_has_no_sampler_of_another_algorithm():
    for name, scheduler in (("Euler a", "Automatic"), ("Euler", "Karras"), ("DDIM", "")):
        with pytest.raises(UnknownSamplerError):
            sampler_of(name, scheduler, get_family("flux"))


def test_every_sampler_has_a_name_that_maps_back_to_it():
    for sampler in SD15.samplers:
        assert sampler_of(sampler, "Automatic", SD15, prefers_own=True).sampler == sampler
        assert sampler_of(*name_of(sampler), SD15).sampler == sampler
    names = sampler_names(SD15)
    accepted = {sampler_of(one, "", SD15).sampler for name in names for one in (name, *names[name])}
    assert {"euler", "ddpm", "k_dpmsolver++", "dpmsingle"} <= accepted
    listed = {one for name, aliases in names.items() for one in (name, *aliases)}
    assert set(SD15.samplers) <= listed


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("Sampler: DDIM, Eta DDIM: 0.5", {"sampler": "ddim", "eta": 0.5}),
        ("Sampler: tcd, Eta: 1.0", {"sampler": "tcd", "eta": 1.0}),
        (
            "Sampler: Euler, Schedule type: SGM Uniform",
            {"sampler": "euler", "timestep_spacing": "sgm_uniform"},
        ),
    ],
)
def test_options_of_samplers_are_read(text, fields):
    read = read_parameters(f"a\nSteps: 4, {text}", SD15)
    assert read.fields == {"steps": 4, **fields}
    assert read.ignored == ()
    assert read.recipe([]).steps == 4


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Sampler: Euler a, Eta: 0.7", "cannot be set"),
        ("Eta: 0.7, Seed: 3", "cannot be set"),
        ("Sampler: DDIM, Eta DDIM: 7", "from 0.0 to 1.0"),
        ("Sampler: DDIM, Eta DDIM: x", "not valid"),
    ],
)
def test_an_eta_that_cannot_be_used_is_named(text, reason):
    read = read_parameters(f"a\nSteps: 4, {text}", SD15)
    (ignored,) = read.ignored
    assert ignored.name.startswith("Eta")
    assert reason in ignored.reason
    assert read.recipe([]).eta is None


SETTINGS = "Steps: 1, Sampler: Euler a, CFG scale: 1, Seed: 5, Size: 64x64, Version: v1.6.0"


def test_lines_after_the_settings_are_not_part_of_the_prompt():
    read = read_parameters(f"a\nNegative prompt: b\n{SETTINGS}\nTemplate: x, __y__\n", SD15)
    assert (read.prompt, read.negative_prompt, read.fields["steps"]) == ("a", "b", 1)
    assert [(one.name, one.value) for one in read.ignored] == [("Template", "x, __y__")]


def test_loras_without_a_tag_are_named():
    hashes = 'Lora hashes: "one: 0123456789ab, two: ffff0123"'
    objects = 'Hashes: {"model": "abcdef0123", "lora:three": "0123abcd"}'
    resources = (
        'Civitai resources: [{"type":"lora","weight":0.4,"modelVersionId":7}], Civitai metadata: {}'
    )
    read = read_parameters(f"a <lora:one:1>\n{SETTINGS}, {hashes}, {objects}, {resources}", SD15)
    assert read.loras == (NamedLora("one", 1.0, "0123456789ab"),)
    assert [one.name for one in read.ignored] == ["Civitai resources", "Lora hashes", "Lora hashes"]
    resource, *others = [one.value for one in read.ignored]
    assert json.loads(resource) == {"type": "lora", "weight": 0.4, "modelVersionId": 7}
    assert others == ["two: ffff0123", "three: 0123abcd"]
    assert all("is not applied" in one.reason for one in read.ignored)


@pytest.mark.parametrize("value", ["{", "[1, 2", '{"a": }', "[" * 100_000])
def test_values_that_look_like_json_are_text(value):
    assert read_parameters(f"a\n{SETTINGS}, Hashes: {value}", SD15).fields["steps"] == 1


@pytest.mark.parametrize("prompt", ["((a))", "[bad], b", "x (y) z"])
def test_brackets_without_a_weight_are_named(prompt):
    (ignored,) = read_parameters(f"{prompt}\n{SETTINGS}", SD15).ignored
    assert "changes word weights in A1111" in ignored.reason


@pytest.mark.parametrize("setting", ["", ", Emphasis: None"])
def test_escaped_brackets_are_text(setting):
    read = read_parameters(rf"a \(b\) \[c\] \\{chr(10)}{SETTINGS}{setting}", SD15)
    assert read.prompt == (r"a \(b\) \[c\] \\" if setting else "a (b) [c] \\")
    assert [one for one in read.ignored if one.name == "prompt"] == []


def test_a_seed_that_is_too_large_is_named():
    (ignored,) = read_parameters(SETTINGS.replace("Seed: 5", f"Seed: {2**64 - 1}"), SD15).ignored
    assert ignored.name == "Seed"


def test_reading_needs_neither_torch_nor_numpy():
    code = (
        "import sys; from fidelora import read_origin; "
        "assert not {'torch', 'numpy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
