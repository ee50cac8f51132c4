"""Map AUTOMATIC1111's sampler and scheduler names to Fidelora's samplers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from fidelora.errors import UnknownSamplerError
from fidelora.families import Family
from fidelora.families.spec import FlowSampler
from fidelora.sampling.spacings import TimestepSpacing

AUTOMATIC, UNIFORM, KARRAS = "Automatic", "Uniform", "Karras"
SGM_UNIFORM, TRAILING = "SGM Uniform", "Trailing"
SCHEDULERS = (AUTOMATIC, UNIFORM, KARRAS, SGM_UNIFORM, TRAILING)
"""Names of schedulers. A1111 does not have `Trailing`, which selects the timestep spacing of that
name; many few-step LoRAs need it."""

_SPACINGS: Mapping[str, TimestepSpacing] = {
    "sgm uniform": "sgm_uniform",
    "sgm_uniform": "sgm_uniform",  # the name in ComfyUI, and A1111's internal name
    "sgmuniform": "sgm_uniform",  # A1111's alias
    "trailing": "trailing",
}
"""Timestep spacings by lower-case name of the scheduler. They are combined with the sampler that
`_TABLE` has for `Uniform`, or else for `Automatic`."""


class SamplerChoice(NamedTuple):
    """Fidelora's sampler and timestep spacing for the names of a sampler and a scheduler."""

    sampler: str
    timestep_spacing: TimestepSpacing = "default"


# Maps A1111's sampler and scheduler to Fidelora's sampler. Only identical algorithms are listed:
# `DPM++ 2S a` is ancestral but `dpmsingle` is not, and the SDE samplers draw Brownian noise, which
# is not supported. In A1111, Automatic means Karras for `DPM++ 2M`, and so it does here. It also
# means Karras for A1111's `DPM2` and `DPM2 a`, but these have only one schedule here.
_TABLE: Mapping[str, Mapping[str, str]] = {
    "Euler": {AUTOMATIC: "euler", UNIFORM: "euler", KARRAS: "k_euler"},
    "Euler a": {AUTOMATIC: "euler_a", UNIFORM: "euler_a"},
    "LMS": {AUTOMATIC: "lms", UNIFORM: "lms", KARRAS: "k_lms"},
    "Heun": {AUTOMATIC: "heun", UNIFORM: "heun"},
    "DPM2": {AUTOMATIC: "dpm_2", UNIFORM: "dpm_2"},
    "DPM2 a": {AUTOMATIC: "dpm_2_a", UNIFORM: "dpm_2_a"},
    "DPM++ 2M": {AUTOMATIC: "k_dpmsolver++", UNIFORM: "dpmsolver++", KARRAS: "k_dpmsolver++"},
    "DDIM": {AUTOMATIC: "ddim"},
    "DDPM": {AUTOMATIC: "ddpm"},
    "PLMS": {AUTOMATIC: "pndm"},
    "LCM": {AUTOMATIC: "lcm"},
}


# A1111's other names of its samplers. `k_euler` and `k_lms` are also Fidelora's names of samplers
# with Karras' schedule, but clients of A1111's API use them with A1111's meaning.
_ALIASES: Mapping[str, tuple[str, str]] = {
    "k_euler": ("Euler", AUTOMATIC),
    "k_euler_a": ("Euler a", AUTOMATIC),
    "k_euler_ancestral": ("Euler a", AUTOMATIC),
    "k_lms": ("LMS", AUTOMATIC),
    "k_lms_ka": ("LMS", KARRAS),
    "k_heun": ("Heun", AUTOMATIC),
    "k_dpm_2": ("DPM2", AUTOMATIC),
    "k_dpm_2_a": ("DPM2 a", AUTOMATIC),
    "k_dpmpp_2m": ("DPM++ 2M", UNIFORM),
    "k_dpmpp_2m_ka": ("DPM++ 2M", KARRAS),
    "plms": ("PLMS", AUTOMATIC),
    "k_lcm": ("LCM", AUTOMATIC),
}


_COMFY: Mapping[str, str] = {
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "lms": "LMS",
    "heun": "Heun",
    "dpm_2": "DPM2",
    "dpm_2_ancestral": "DPM2 a",
    "dpmpp_2m": "DPM++ 2M",
    "ddim": "DDIM",
    "lcm": "LCM",
}
"""A1111's sampler names by ComfyUI's. Only identical algorithms are listed."""


_EULER = "Euler"
"""A1111's default sampler. Web UIs on its code, such as Forge, also use it for flow models, where
its steps are those of the flow-match Euler sampler."""


def sampler_names(spec: Family) -> dict[str, list[str]]:
    """Return the sampler names of a model, with their aliases.

    A1111's names come first, with its own aliases and Fidelora's names, then Fidelora's samplers
    that A1111 does not have.
    """
    names = {
        a1111_name: sorted(
            {alias for alias, (name, _) in _ALIASES.items() if name == a1111_name}
            | (set(own_names.values()) - _ALIASES.keys())
        )
        for a1111_name, own_names in _TABLE.items()
        if set(own_names.values()) <= spec.samplers.keys()
    }
    known = {name for own_names in _TABLE.values() for name in own_names.values()}
    if flow := _flow_sampler(spec):
        names = {_EULER: [flow]}
        known.add(flow)
    return names | {name: [] for name in spec.samplers if name not in known}


def sampler_of(
    name: str, scheduler: str, spec: Family, *, prefers_own: bool = False
) -> SamplerChoice:
    """Return Fidelora's sampler for A1111's `name` and scheduler, or for a name of Fidelora's.

    Older versions of A1111 had the scheduler in the name (`LMS Karras`). As in A1111, a scheduler
    in the name takes precedence over `scheduler`. A1111's names are not case-sensitive.

    Args:
        prefers_own: True if Fidelora's names take precedence over equal aliases of A1111.

    Raises:
        UnknownSamplerError: the model has no sampler with the same algorithm; the message lists the
            available ones.
    """
    wanted, schedule = name.strip(), scheduler.strip() or AUTOMATIC
    if prefers_own and (own := _find(schedule, _own_schedules(wanted, spec))) is not None:
        return own
    if wanted.lower() in _ALIASES:
        wanted, alias_schedule = _ALIASES[wanted.lower()]
        schedule = schedule if alias_schedule == AUTOMATIC else alias_schedule
    # `sgm uniform` is tested before `uniform`, because it also ends with `uniform`.
    for suffix in (*_SPACINGS, UNIFORM, KARRAS):
        if wanted.lower().endswith(f" {suffix.lower()}"):
            wanted, schedule = wanted[: -len(suffix) - 1].rstrip(), suffix
            break
    by_schedule = _schedules(wanted, spec) or _own_schedules(wanted, spec)
    found = _find(schedule, by_schedule)
    if found is not None:
        return found
    if by_schedule:
        known = ", ".join(by_schedule)
        raise UnknownSamplerError(
            f"The sampler {name!r:.80} does not support the scheduler {schedule!r:.80} here; use "
            f"one of {known}.",
            field="scheduler",
        )
    known = ", ".join(sampler_names(spec))
    raise UnknownSamplerError(
        f"The sampler {name!r:.80} is not supported here; use one of {known}.", field="sampler"
    )


def from_comfy(name: str, scheduler: str) -> tuple[str, str]:
    """Return A1111's names for ComfyUI's names of a sampler and a scheduler, if there are any.

    Other names are returned unchanged. Programs that write A1111's text for ComfyUI, and SwarmUI,
    use ComfyUI's names. Some append the scheduler to the sampler: `dpmpp_2m_karras`.
    """
    for suffix, joined in (("_karras", KARRAS), ("_normal", UNIFORM)):
        if name.removesuffix(suffix) in _COMFY and name.endswith(suffix):
            name, scheduler = name.removesuffix(suffix), joined
    is_comfy = name in _COMFY
    name = _COMFY.get(name, name)
    # In A1111, the default schedule of this sampler is Karras'.
    normal = UNIFORM if name == "DPM++ 2M" else AUTOMATIC
    if scheduler.lower() == "normal" or (is_comfy and scheduler in ("", AUTOMATIC)):
        return name, normal
    return name, scheduler


def _find(schedule: str, by_schedule: Mapping[str, SamplerChoice]) -> SamplerChoice | None:
    """Return the choice for a scheduler, whose name is not case-sensitive."""
    wanted = schedule.lower()
    spacing = _SPACINGS.get(wanted)
    for name, choice in by_schedule.items():
        if name.lower() == wanted or (spacing and choice.timestep_spacing == spacing):
            return choice
    return None


def _schedules(name: str, spec: Family) -> dict[str, SamplerChoice]:
    """Return the schedulers of A1111's sampler `name`; empty if the model does not have it."""
    if name.lower() == _EULER.lower() and (flow := _flow_sampler(spec)):
        return {AUTOMATIC: SamplerChoice(flow)}
    by_lower_name = {a1111_name.lower(): own_names for a1111_name, own_names in _TABLE.items()}
    own_names = by_lower_name.get(name.lower(), {})
    if not own_names or own_names[AUTOMATIC] not in spec.samplers:
        return {}
    found = {
        a1111_name: SamplerChoice(sampler)
        for a1111_name, sampler in own_names.items()
        if sampler in spec.samplers
    }
    return found | _spacings(own_names.get(UNIFORM, own_names[AUTOMATIC]), spec)


def _flow_sampler(spec: Family) -> str:
    """Return the name of the default sampler of a flow model; empty for other models."""
    is_flow = isinstance(spec.samplers[spec.default_sampler], FlowSampler)
    return spec.default_sampler if is_flow else ""


def _own_schedules(name: str, spec: Family) -> dict[str, SamplerChoice]:
    """Return the schedulers of Fidelora's sampler `name`; empty if the model does not have it."""
    if name not in spec.samplers:
        return {}
    return {AUTOMATIC: SamplerChoice(name), **_spacings(name, spec)}


def _spacings(sampler: str, spec: Family) -> dict[str, SamplerChoice]:
    """Return the schedulers that select a timestep spacing of Fidelora's `sampler`."""
    supported = spec.samplers[sampler].spacings if sampler in spec.samplers else frozenset()
    return {
        a1111_name: SamplerChoice(sampler, spacing)
        for a1111_name in (SGM_UNIFORM, TRAILING)
        if (spacing := _SPACINGS[a1111_name.lower()]) in supported
    }


def name_of(sampler: str, timestep_spacing: TimestepSpacing = "default") -> tuple[str, str]:
    """Return A1111's names of a sampler and its scheduler; `sampler` and "" if A1111 has none.

    A1111 has no scheduler for `trailing`, so the sampler then also has Fidelora's name.
    """
    if timestep_spacing == "trailing":
        return sampler, TRAILING
    for a1111_name, by_schedule in _TABLE.items():
        for schedule in (KARRAS, AUTOMATIC, UNIFORM):  # Karras is clearer than Automatic
            if by_schedule.get(schedule) == sampler:
                return a1111_name, schedule if timestep_spacing == "default" else SGM_UNIFORM
    return sampler, "" if timestep_spacing == "default" else SGM_UNIFORM
