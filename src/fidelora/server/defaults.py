"""Recipe fields that a server sets: data types, fidelity and base models."""

from __future__ import annotations

from typing import Any

from fidelora.errors import DeviceError, SettingsError
from fidelora.families import all_families, get_family
from fidelora.families.spec import Family
from fidelora.recipe import AdapterRef
from fidelora.settings import Settings


def server_defaults_of(settings: Settings) -> dict[str, dict[str, Any]]:
    """Return the recipe fields that a server with these settings sets, by model id.

    Raises:
        SettingsError: the server has no device, and no data type is set.
        DeviceError: a device is missing, or FIDELORA_FIDELITY is `fast` and a device does not
            support it.
        AdapterError: a training adapter is missing or not an adapter file.
        BaseModelError: the base model's file or folder is missing.
    """
    from fidelora.accel.device import auto_dtype, resolve_device
    from fidelora.accel.fast_path import fast_path
    from fidelora.weights.locate import is_portable, locate

    devices = [resolve_device(name) for name in settings.devices]
    if not devices and settings.dtype == "auto":
        raise SettingsError(
            "With DEVICE=none, there is no device that selects the data type of the models; set "
            "FIDELORA_DTYPE to the one that suits the workers."
        )
    dtype = auto_dtype(devices[0]) if settings.dtype == "auto" else settings.dtype
    dtypes = dict.fromkeys(("dtype", "vae_dtype", "text_encoder_dtype"), dtype)
    default_model = next(iter(settings.base_models or all_families()))
    server_defaults: dict[str, dict[str, Any]] = {}
    for model, family in all_families().items():
        fidelity = settings.fidelity
        if fidelity == "fast":
            if not devices and not family.accelerations & {"packed", "compiled"}:
                fidelity = "exact"
            try:
                for device in devices:
                    fast_path(family, device, settings.offload)
            except DeviceError:
                if model == default_model:
                    raise
                fidelity = "exact"  # the family has no fast path
        server_defaults[model] = {**dtypes, "fidelity": fidelity}
        server_defaults[model] |= _quantization(settings, family)
    for model, file in settings.training_adapters.items():
        server_defaults[model]["training_adapters"] = (AdapterRef.from_file(file),)
    for model, base_model in settings.base_models.items():
        if not is_portable(base_model):
            # The path is absolute, because the server may be restarted in another directory while
            # jobs are queued.
            base_model = str(locate(base_model, get_family(model).parts).absolute())
        server_defaults[model]["base_model"] = base_model
    return server_defaults


def _quantization(settings: Settings, family: Family) -> dict[str, str]:
    """Return the recipe fields of quantised parts, for a family that AI Toolkit quantises."""
    fields = {
        "quantization": settings.quantization,
        "text_encoder_quantization": settings.text_encoder_quantization,
    }
    return {name: kind for name, kind in fields.items() if kind != "none" and name in family.uses}
