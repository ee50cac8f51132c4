"""Settings of the pictures that `benchmarks.explain_pictures` requests.

Each picture is a sample of the training run of `benchmarks.explain_base` with none to three changed
settings. The changes are chosen so that each program, sampler and kind of difference occurs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.explain_programs import Settings

Changes = Mapping[str, Any]
"""Changed fields of `Settings`."""


@dataclass(frozen=True)
class Case:
    """One picture.

    Attributes:
        index: sample of the training run.
        changes: changed settings by cause (`fidelora.explain.differences.CAUSES`).
        is_known: True if the settings that a script names are given to `explain`; only for
            diffusers, whose pictures contain no settings.
    """

    index: int
    changes: Mapping[str, Changes]
    is_known: bool = False


def trigger(settings: Settings) -> Changes:
    """Return the prompt without the trigger word."""
    return {"prompt": settings.prompt.replace("sks", "it")}


def _guidance(value: float) -> dict[str, Changes]:
    return {"guidance": {"cfg": value}}


def _steps(value: int) -> dict[str, Changes]:
    return {"steps": {"steps": value}}


def _lora(model: float, text: float) -> dict[str, Changes]:
    return {"lora": {"lora": (model, text)}}


def _seed(value: int) -> dict[str, Changes]:
    return {"seed": {"seed": value}}


def _sampler(name: str, schedule: str = "", **more: Any) -> dict[str, Changes]:
    return {"sampler": {"sampler": name, "scheduler": schedule, **more}}


def _size(width: int, height: int) -> dict[str, Changes]:
    return {"size": {"width": width, "height": height}}


_FORGOTTEN: dict[str, Changes] = {"trigger": {}}
"""The prompt depends on the sample; see `trigger`."""
_NO_NEGATIVE: dict[str, Changes] = {"negative_prompt": {"negative": ""}}
_OTHER_NEGATIVE: dict[str, Changes] = {"negative_prompt": {"negative": "low quality, watermark"}}
_NV_NOISE: dict[str, Changes] = {"noise": {"noise": "NV"}}
_CLIP_SKIP: dict[str, Changes] = {"clip_skip": {"clip_skip": 2}}
_WEIGHTS: dict[str, Changes] = {"emphasis": {}}
"""The prompt of the sample as it is; without this change, its brackets are escaped, and it is
shortened to 75 tokens."""

COMFYUI = (
    Case(0, {}),
    Case(1, _guidance(10.0)),
    Case(0, _sampler("euler_ancestral", "normal") | _steps(12)),
    Case(1, _guidance(8.0) | _lora(0.7, 0.7) | _FORGOTTEN),
    Case(2, {}),
    Case(1, _steps(8)),
    Case(2, _WEIGHTS),
    Case(3, _WEIGHTS),
    Case(0, _sampler("dpmpp_2m", "karras")),
    Case(1, _lora(1.0, 0.0)),
    Case(0, _lora(0.0, 1.0)),
    Case(1, _lora(0.0, 0.0) | _seed(1234)),
    Case(0, _NO_NEGATIVE | _CLIP_SKIP),
    Case(3, _OTHER_NEGATIVE),
    Case(0, _size(96, 64)),
    Case(1, _sampler("heun", "karras") | _seed(1)),
    Case(0, _sampler("lcm", "sgm_uniform") | _guidance(2.0)),
    Case(1, _sampler("euler", "simple") | _lora(0.5, 0.5)),
    Case(2, _sampler("dpmpp_2s_ancestral", "exponential") | _WEIGHTS),
    Case(3, _FORGOTTEN | _steps(12) | _guidance(3.0)),
    Case(0, _sampler("dpmpp_2m_sde", "karras")),
    Case(1, _sampler("dpmpp_sde_gpu", "normal") | _guidance(3.0)),
)
A1111 = (
    Case(0, {}),
    Case(1, _CLIP_SKIP),
    Case(0, _CLIP_SKIP | _guidance(10.0)),
    Case(1, _NO_NEGATIVE | _steps(8) | _FORGOTTEN),
    Case(2, {}),
    Case(0, _NO_NEGATIVE),
    Case(2, _WEIGHTS),
    Case(3, _WEIGHTS),
    Case(0, _NV_NOISE),
    Case(0, _sampler("Euler a", "Automatic", seed_delta=31337)),
    Case(1, _sampler("DPM++ 2M", "Automatic") | _guidance(8.0)),
    Case(0, _sampler("DDIM", "Automatic") | _steps(12)),
    Case(1, _lora(0.7, 0.7) | _seed(1234)),
    Case(0, _lora(1.0, 0.0)),
    Case(3, _lora(0.0, 0.0) | _FORGOTTEN),
    Case(0, _size(64, 96) | _OTHER_NEGATIVE),
    Case(2, _sampler("Heun", "SGM Uniform") | _WEIGHTS | _guidance(3.0)),
    Case(0, _sampler("LCM", "Automatic") | _guidance(2.0)),
    Case(3, _sampler("DPM++ 2S a", "Karras") | _NV_NOISE),
    Case(0, _sampler("Euler", "Exponential")),
    Case(0, _sampler("DPM++ 2M SDE", "Karras")),
    Case(1, _sampler("DPM++ SDE", "Automatic") | _NV_NOISE | _lora(0.5, 0.5)),
    Case(0, _sampler("DPM++ 2M SDE Heun", "Automatic")),
)
DIFFUSERS = (
    Case(0, {}),
    Case(1, _guidance(8.0), is_known=True),
    Case(0, _steps(12) | _lora(0.7, 0.7), is_known=True),
    Case(1, _seed(1234) | _FORGOTTEN, is_known=True),
    Case(0, _NO_NEGATIVE | _CLIP_SKIP, is_known=True),
    Case(1, _sampler("EulerDiscreteScheduler", "linspace")),
    Case(0, _sampler("DPMSolverMultistepScheduler") | _guidance(3.0), is_known=True),
    Case(1, {"precision": {"dtype": "bfloat16"}}),
    Case(0, _size(96, 64), is_known=True),
    Case(3, {}),
    Case(2, _lora(0.0, 0.0)),
    Case(0, _sampler("EulerAncestralDiscreteScheduler"), is_known=True),
)
