"""Recipe fields that a server sets."""

from __future__ import annotations

import pytest
from tests.support import TINY_ZIMAGE, ZIMAGE_LORA, ZIMAGE_TRAINING_ADAPTER

from fidelora import AdapterRef
from fidelora.api import InferenceRequest, recipes_of
from fidelora.errors import AdapterError
from fidelora.server.defaults import server_defaults_of
from fidelora.settings import Settings, read_settings


def settings_with(**given: str) -> Settings:
    return read_settings(device="cpu", dtype="bfloat16", **given)


def test_families_that_the_trainer_quantises_are_quantised():
    found = server_defaults_of(
        settings_with(quantization="qfloat8", text_encoder_quantization="float8")
    )
    assert found["zimage"]["quantization"] == "qfloat8"
    assert found["zimage"]["text_encoder_quantization"] == "float8"
    assert not found["sd15"].keys() & {"quantization", "text_encoder_quantization"}
    assert "quantization" not in server_defaults_of(settings_with())["zimage"]


def test_a_training_adapter_belongs_to_one_model():
    adapter = f"zimage_turbo={ZIMAGE_TRAINING_ADAPTER}"
    found = server_defaults_of(settings_with(training_adapter=adapter))
    (ref,) = found["zimage_turbo"]["training_adapters"]
    assert ref.path == ZIMAGE_TRAINING_ADAPTER
    assert "training_adapters" not in found["zimage"]
    with pytest.raises(AdapterError):
        server_defaults_of(settings_with(training_adapter="zimage_turbo=/no/such/file"))


def test_loras_on_quantised_weights_are_live():
    """As in the trainer, which never merges adapters into quantised weights."""
    request = InferenceRequest.model_validate(
        {
            "model": "zimage",
            "loras": [{"path": "a.safetensors"}],
            "prompts": [{"prompt": "a", "width": 64, "height": 64}],
        }
    )
    modes = []
    for kind in ("none", "qfloat8"):
        base = server_defaults_of(
            settings_with(quantization=kind, base_model=f"zimage={TINY_ZIMAGE}")
        )["zimage"]
        (recipe,) = recipes_of(request, (AdapterRef.from_file(ZIMAGE_LORA),), base, lambda: 0)
        modes.append((recipe.quantization, recipe.adapter_mode))
    assert modes == [("none", "merged"), ("qfloat8", "live")]
