"""The form that a browser stores and returns after a reload."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fidelora.server.page.form import Form, family_defaults
from fidelora.server.page.stored_form import from_stored, to_stored

FIELDS = family_defaults("sd15", 512) | {
    "prompt": "a [trigger]",
    "trigger_word": "sks",
    "neg": "",
    "emphasis": "none",
    "model": "sd15",
    "fidelity": "exact",
    "output_format": "png",
}
FORM = Form((("a.safetensors", 0.5), ("b.safetensors", -1.0)), 2**62 + 1, 2, FIELDS)
PATHS = {"a.safetensors", "b.safetensors"}


def stored(**changes: Any) -> Any:
    return json.loads(json.dumps(to_stored(FORM))) | changes


@pytest.mark.parametrize("seed", [2**62 + 1, 0, None])
def test_a_form_survives_a_reload(seed):
    assert from_stored(stored(seed=seed), ["sd15"], PATHS) == (
        Form(FORM.loras, seed, 2, FIELDS),
        [],
    )


def test_loras_that_were_removed_are_left_out_and_named():
    form, missing = from_stored(stored(), ["sd15"], {"b.safetensors"}) or (None, None)
    assert form == Form(FORM.loras[1:], FORM.seed, 2, FIELDS)
    assert missing == ["a.safetensors"]


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        "form",
        {},
        stored(loras=None),
        stored(loras=[["a.safetensors", "much"]]),
        stored(loras=[["a.safetensors", 99]]),
        stored(images=0),
        stored(images="many"),
        stored(seed=-5),
        stored(seed=1e400),
        stored(fields={}),
        stored(fields=FIELDS | {"width": 63}),
        stored(fields=FIELDS | {"model": "no-such-model"}),
        stored(fields=FIELDS | {"prompt": 5}),
    ],
)
def test_a_form_that_cannot_be_sent_is_ignored(data):
    assert from_stored(data, ["sd15"], PATHS) is None


def test_a_form_of_a_model_that_is_not_served_is_ignored():
    assert from_stored(stored(), ["sdxl"], PATHS) is None
