"""Sentences for fields that are not valid."""

from __future__ import annotations

from typing import Any

import pydantic
import pytest

from fidelora.api import InferenceRequest
from fidelora.api.openai import ImagesRequest
from fidelora.field_sentences import field_sentence

LORAS = [{"path": "a.safetensors"}]


def sentences(body: Any, kind: type[pydantic.BaseModel] = InferenceRequest) -> list[str]:
    with pytest.raises(pydantic.ValidationError) as caught:
        kind.model_validate(body)
    return [field_sentence(dict(entry)) for entry in caught.value.errors()]


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (
            {"model": "sd15", "loras": [], "promts": [{"prompt": "a"}]},
            "It is required. The request has 'promts' instead, which does not exist.",
        ),
        (
            {"model": "sd15", "lora": [], "prompts": [{"prompt": "a"}]},
            "It is required. The request has 'lora' instead, which does not exist.",
        ),
        (
            {"model": "sd15", "loras": [], "prompts": [{"promt": "a"}]},
            "It is required. The request has 'promt' instead, which does not exist.",
        ),
        ({"model": "sd15", "loras": [], "other": 1}, "It is required."),
        ({"model": "sd15", "loras": [], "prompts\x00": 1, "\u202eprompts": 1}, "It is required."),
    ],
)
def test_a_misspelled_required_field_is_named(body, sentence):
    assert sentences(body) == [sentence]


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("width", "wide", "Expected an integer."),
        ("width", 64.5, "Expected an integer."),
        ("width", [64], "Expected an integer."),
        ("width", 63, "Expected a number of at least 64."),
        ("height", 4097, "Expected a number of at most 4096."),
        ("seed", -2, "Expected a number of at least -1."),
        ("guidance_scale", "high", "Expected a number."),
        ("guidance_scale", float("nan"), "Expected a finite number."),
        ("sample_steps", 0, "Expected a number of at least 1."),
        ("prompt", 5, "Expected a string."),
        ("prompt", None, "Expected a string."),
        ("neg", {}, "Expected a string."),
    ],
)
def test_a_field_of_a_prompt_says_what_is_expected(field, value, sentence):
    prompt = {"prompt": "a ball"} | {field: value}
    assert sentences({"model": "sd15", "loras": LORAS, "prompts": [prompt]}) == [sentence]


def test_missing_fields_are_named():
    assert sentences({}) == ["It is required."] * 3


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"prompts": "a ball"}, "Expected a list."),
        ({"prompts": ["a ball"]}, "Expected an object."),
        ({"prompts": []}, "Expected a list of at least 1 item(s)."),
        ({"loras": {"path": "a"}}, "Expected a list."),
        ({"match": "painter"}, "Expected 'trainer'."),
    ],
)
def test_a_field_of_a_request_says_what_is_expected(change, sentence):
    body = {"model": "sd15", "loras": LORAS, "prompts": [{"prompt": "a ball"}]} | change
    assert sentences(body) == [sentence]


def test_a_pattern_is_named():
    (sentence,) = sentences({"prompt": "a ball", "size": "64 by 64"}, ImagesRequest)
    assert sentence.startswith("Expected a string that matches ^")
