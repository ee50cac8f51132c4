"""Settings of a configuration's `model` block: family, quantisation, assistant LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from fidelora.adapters.tensor_names import MAX_ADAPTER_BYTES
from fidelora.errors import AdapterError, TrainingRunError
from fidelora.families import Family, all_families
from fidelora.loras.hub import HubFile
from fidelora.recipe import AdapterRef, Quantization

_PEFT_FILE = "pytorch_lora_weights.safetensors"
"""File name of a LoRA that diffusers saved, in a repository on the hub."""


def family_of(model: Mapping[str, Any]) -> str:
    """Return the id of the model family; older configurations set a flag, newer ones `arch`.

    Raises:
        TrainingRunError: the family is not supported, or an option that changes its samples is not.
    """
    arch = model.get("arch")
    flags = {
        key
        for key, value in model.items()
        if key.startswith("is_") and key != "is_v_pred" and value
    }
    fitting = [
        spec
        for spec in all_families().values()
        if flags <= set(spec.trainer_sampling.flags)
        and (arch in spec.trainer_sampling.archs or (arch is None and flags))
    ]
    option = {spec.trainer_sampling.option: spec for spec in reversed(fitting)}
    spec = next((one for key, one in option.items() if key and model.get(key)), option.get(""))
    if spec is None:
        known = ", ".join(spec.title for spec in all_families().values())
        trained = " and ".join([*([repr(arch)] if arch else []), *sorted(flags)])
        raise TrainingRunError(
            f"The training run trains {trained}, which is not supported; "
            f"the supported models are: {known}."
        )
    if model.get("refiner_name_or_path"):
        raise TrainingRunError(
            "The training run samples with a refiner (model.refiner_name_or_path), "
            "which is not supported."
        )
    return spec.id


def quantization_of(model: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Return the recipe fields for the quantisation that a `model` block configures.

    Returns:
        values by the name of the recipe's field; empty for families that are not quantised.

    Raises:
        TrainingRunError: this kind of quantisation is not supported.
    """
    sampling = family.trainer_sampling
    if not sampling.text_encoder_qtype:
        return {}
    denoiser = bool(model.get("quantize"))
    found = {
        "quantization": _kind(model, "qtype") if denoiser else "none",
        "text_encoder_quantization": _kind(model, sampling.text_encoder_qtype)
        if model.get("quantize_te", denoiser)
        else "none",
    }
    is_assisted = sampling.assistant_float8 and training_adapter_of(model, family)
    if is_assisted and found["quantization"] == "qfloat8":
        found["quantization"] = "float8"
    return found


def training_adapter_of(model: Mapping[str, Any], family: Family) -> str:
    """Return the location of the assistant LoRA; empty if there is none, or if it has no effect."""
    is_used = "training_adapters" in family.uses
    return str(model.get("assistant_lora_path") or "") if is_used else ""


def find_training_adapter(location: str) -> AdapterRef:
    """Return the adapter at `location`, a path or `owner/name/file.safetensors` on the hub.

    As in the trainer, `owner/name` is the file `pytorch_lora_weights.safetensors` of a repository.

    Raises:
        TrainingRunError: it was not found.
    """
    path = Path(location).expanduser()
    if not path.is_file():
        name = f"{location}/{_PEFT_FILE}" if location.count("/") == 1 else location
        try:
            path = HubFile.parse(f"hf:{name}").fetch(None, MAX_ADAPTER_BYTES)
        except AdapterError as error:
            raise TrainingRunError(
                f"The training adapter {location}, which the samples need, was not found: {error} "
                "Give its file as --training-adapter, or none to leave it out."
            ) from error
    return AdapterRef.from_file(path)


def _kind(model: Mapping[str, Any], key: str) -> Quantization:
    kind = str(model.get(key, "qfloat8"))
    for known in get_args(Quantization):
        if kind == known != "none":
            return known  # type: ignore[no-any-return]
    raise TrainingRunError(
        f"The training run has model.{key} {kind}, which is not supported; only qfloat8 and float8 "
        "can be replayed."
    )
