"""Conversion of requests of OpenAI's API."""

from __future__ import annotations

import pytest

from fidelora.api.openai import ImagesRequest


@pytest.mark.parametrize(
    ("model", "bases", "size"),
    [
        ("sd15", {}, 512),
        ("sdxl", {}, 1024),
        ("sd15", {"sd15": "fidelora:miniature"}, 128),
        ("sdxl", {"sd15": "fidelora:miniature"}, 1024),
        ("sd15", {"sd15": "/bases/other"}, 512),
    ],
)
@pytest.mark.parametrize("given", ["auto", None])
def test_the_size_auto_is_that_of_the_base_model(model, bases, size, given):
    request = ImagesRequest.model_validate({"prompt": "a", "model": model, "size": given})
    (item,) = request.to_inference({}, bases).prompts
    assert (item.width, item.height) == (size, size)
