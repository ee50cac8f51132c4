"""Flags of a sample prompt, parsed as AI Toolkit parses them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tools.pages.command_line import commands, options

from fidelora.errors import TrainingRunError
from fidelora.training import doctor
from fidelora.training.flags import TRIGGER_OFF, split_flags, where_to_set

FIELDS = {"neg", "width", "height", "seed", "guidance_scale", "sample_steps", "network_multiplier"}


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--n blurry, low quality", {"neg": "blurry, low quality"}),
        ("--n", {"neg": ""}),
        ("--w 640", {"width": 640}),
        ("--h 384", {"height": 384}),
        ("--d 7", {"seed": 7}),
        ("--seed 7", {"seed": 7}),
        ("--l 7.5", {"guidance_scale": 7.5}),
        ("--cfg 7.5", {"guidance_scale": 7.5}),
        ("--s 12", {"sample_steps": 12}),
        ("--steps 12", {"sample_steps": 12}),
        ("--m -0.5", {"network_multiplier": -0.5}),
        ("--network_multiplier 0.5", {"network_multiplier": 0.5}),
    ],
)
def test_every_flag_sets_its_field(flag, expected):
    assert split_flags(f"a red ball {flag}") == ("a red ball", expected)


def test_values_have_the_types_of_their_fields():
    _, found = split_flags("x --w 640 --h 640 --d 1 --s 5 --l 7 --m 1")
    assert {name: type(value) for name, value in found.items()} == {
        "width": int,
        "height": int,
        "seed": int,
        "sample_steps": int,
        "guidance_scale": float,
        "network_multiplier": float,
    }


def test_flags_can_have_any_order():
    assert split_flags("a ball --d 7 --n two words --w 64 --m 0.5") == (
        "a ball",
        {"seed": 7, "neg": "two words", "width": 64, "network_multiplier": 0.5},
    )


def test_the_number_of_frames_is_a_flag():
    assert split_flags("x --frames 41") == ("x", {"num_frames": 41})


def test_the_last_flag_wins():
    assert split_flags("x --w 640 --w 320")[1] == {"width": 320}


def test_the_last_of_two_aliases_wins():
    assert split_flags("x --seed 1 --d 2")[1] == {"seed": 2}
    assert split_flags("x --d 2 --seed 1")[1] == {"seed": 1}


def test_text_is_split_inside_words():
    """The trainer does not require a space before `--`."""
    assert split_flags("a black--w 64") == ("a black", {"width": 64})
    assert split_flags("black--white ball") == ("black", {})


def test_three_dashes_start_an_unknown_flag():
    assert split_flags("a ---w 64") == ("a", {})


def test_single_dashes_are_part_of_the_prompt():
    assert split_flags("a - b -w 64") == ("a - b -w 64", {})


@pytest.mark.parametrize(
    "tail",
    [
        "--p2 more text",
        "--a 1",
        "--ref file.png",
        "--fps 16",
        "--W 640",
        "--width 640",
        "--",
        "-- ",
        "-- w 640",
    ],
)
def test_an_unknown_flag_is_dropped_with_its_value(tail):
    assert split_flags(f"a red ball {tail}") == ("a red ball", {})


def test_the_guidance_rescale_is_parsed():
    """Only SDXL samples use it; the planner drops it for other families."""
    assert split_flags("x --gr 0.7") == ("x", {"guidance_rescale": 0.7})


def test_flags_after_an_unknown_flag_are_parsed():
    assert split_flags("a ball --unknown 5 --w 64 -- dropped --h 72") == (
        "a ball",
        {"width": 64, "height": 72},
    )


def test_the_prompt_and_the_values_are_stripped():
    assert split_flags("  a red ball   --n   blurry   --w   64  ") == (
        "a red ball",
        {"neg": "blurry", "width": 64},
    )


def test_a_prompt_can_consist_of_flags():
    assert split_flags("--w 64") == ("", {"width": 64})


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("w", "wide"),
        ("h", ""),
        ("d", "1.5"),
        ("seed", "0x10"),
        ("l", "six"),
        ("cfg", "7,5"),
        ("s", "12 steps"),
        ("m", ""),
    ],
)
def test_an_invalid_number_raises_an_error_with_flag_and_value(flag, value):
    with pytest.raises(TrainingRunError, match=f"value {value!r}, which is not a number") as raised:
        split_flags(f"a red ball --{flag} {value}")
    assert f"The flag --{flag} of the sample prompt 'a red ball" in str(raised.value)


@settings(max_examples=100, deadline=None)
@given(text=st.text() | st.text(alphabet="-nwhdslcfgmtep 0123456789.\n\t"))
def test_any_text_is_parsed_or_raises_an_error(text):
    try:
        prompt, found = split_flags(text)
    except TrainingRunError:
        return
    assert prompt == prompt.strip()
    assert "--" not in prompt
    assert set(found) <= FIELDS


@settings(max_examples=100, deadline=None)
@given(text=st.text().filter(lambda text: "--" not in text))
def test_text_without_flags_is_only_stripped(text):
    assert split_flags(text) == (text.strip(), {})


WORDS = st.text(alphabet="abc ,()üß🙂", max_size=10).map(str.strip)


@settings(max_examples=50, deadline=None)
@given(
    prompt=WORDS,
    neg=WORDS,
    width=st.integers(),
    seed=st.integers(),
    scale=st.floats(allow_nan=False),
)
def test_written_flags_are_parsed_again(prompt, neg, width, seed, scale):
    text = f"{prompt} --n {neg} --w {width} --d {seed} --cfg {scale!r}"
    assert split_flags(text) == (
        prompt,
        {"neg": neg, "width": width, "seed": seed, "guidance_scale": scale},
    )


def test_the_advice_names_flags_and_options():
    assert where_to_set("--guidance 6", "--cfg 6") == (
        " (--cfg 6). In fidelora generate: `--guidance 6`."
    )
    assert where_to_set("--sampler ddim") == ". In fidelora generate: `--sampler ddim`."


def test_the_options_in_the_advice_exist():
    """Every option that the doctor names is one of `fidelora generate`."""
    known = options(dict(commands())["generate"])
    advice = "".join(path.read_text() for path in Path(doctor.__file__).parent.glob("*.py"))
    named = re.findall(r"where_to_set\(\s*f?[\"'](--[a-z-]+)", advice)
    assert {"--lora", "--seed", "--sampler", "--guidance", "--steps", "--size"} <= set(named)
    assert {*named, TRIGGER_OFF.split()[0], "--live", "--dtype", "--noise", "--variant"} <= known
