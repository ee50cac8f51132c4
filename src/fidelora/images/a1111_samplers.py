"""Map AUTOMATIC1111's sampler and scheduler names to Fidelora's samplers."""

from __future__ import annotations

from collections.abc import Mapping

from fidelora.errors import UnknownSamplerError
from fidelora.families import Family

AUTOMATIC, UNIFORM, KARRAS = "Automatic", "Uniform", "Karras"
SCHEDULERS = (AUTOMATIC, UNIFORM, KARRAS)

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


def sampler_names(spec: Family) -> dict[str, list[str]]:
    """Return the sampler names of a model, with their aliases.

    A1111's names come first, with Fidelora's as aliases, then Fidelora's samplers that A1111 does
    not have.
    """
    names = {
        theirs: sorted(set(ours.values()))
        for theirs, ours in _TABLE.items()
        if set(ours.values()) <= spec.samplers.keys()
    }
    known = {name for aliases in names.values() for name in aliases}
    return names | {name: [] for name in spec.samplers if name not in known}


def sampler_of(name: str, scheduler: str, spec: Family) -> str:
    """Return Fidelora's sampler for A1111's `name` and scheduler, or for a name of Fidelora's.

    Older versions of A1111 had the scheduler in the name (`LMS Karras`). Both forms are supported.
    A1111's names are not case-sensitive.

    Raises:
        UnknownSamplerError: the model has no sampler with the same algorithm; the message lists the
            available ones.
    """
    wanted, schedule = name.strip(), scheduler.strip() or AUTOMATIC
    if schedule.lower() == AUTOMATIC.lower() and wanted.lower().endswith(" karras"):
        wanted, schedule = wanted[: -len(" karras")], KARRAS
    if wanted in spec.samplers and schedule.lower() == AUTOMATIC.lower():
        return wanted
    by_schedule = next(
        (ours for theirs, ours in _TABLE.items() if theirs.lower() == wanted.lower()), {}
    )
    ours = next(
        (ours for theirs, ours in by_schedule.items() if theirs.lower() == schedule.lower()), None
    )
    if ours in spec.samplers:
        return str(ours)
    if by_schedule and by_schedule[AUTOMATIC] in spec.samplers:
        known = ", ".join(by_schedule)
        raise UnknownSamplerError(
            f"The sampler {name!r:.80} has no scheduler {scheduler!r:.80} here; it has {known}.",
            field="scheduler",
        )
    known = ", ".join(sampler_names(spec))
    raise UnknownSamplerError(
        f"There is no sampler {name!r:.80} here; the samplers are: {known}.", field="sampler"
    )


def name_of(sampler: str) -> tuple[str, str]:
    """Return A1111's names of a sampler and its scheduler, or the same name if A1111 has none."""
    for theirs, by_schedule in _TABLE.items():
        for schedule, ours in by_schedule.items():
            if ours == sampler:
                return theirs, schedule
    return sampler, AUTOMATIC
