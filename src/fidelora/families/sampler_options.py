"""Checks of the options that only some samplers of a family support. Does not import torch."""

from __future__ import annotations

from collections.abc import Callable

from fidelora.checks import check_range
from fidelora.errors import RecipeError
from fidelora.families.spec import Family, Sampler
from fidelora.sampling.spacings import TimestepSpacing


def check_sampler_options(
    spec: Family, name: str, spacing: TimestepSpacing, eta: float | None
) -> None:
    """Check the timestep spacing and eta of a recipe.

    Args:
        name: one of the family's samplers.

    Raises:
        RecipeError: the sampler does not support an option, or eta is not from 0 to 1; the message
            names the samplers that support the option.
    """
    sampler = spec.samplers[name]
    if spacing != "default" and spacing not in sampler.spacings:
        others = _alternatives(spec, lambda one: spacing in one.spacings)
        raise RecipeError(
            f"The sampler {name} does not support timestep_spacing {spacing}; leave it "
            f"out{others}.",
            field="timestep_spacing",
        )
    if eta is None:
        return
    if sampler.eta is None:
        others = _alternatives(spec, lambda one: one.eta is not None)
        raise RecipeError(
            f"The eta of the sampler {name} cannot be set; leave eta out{others}.", field="eta"
        )
    check_range("eta", eta, 0.0, 1.0)


def _alternatives(spec: Family, supports: Callable[[Sampler], bool]) -> str:
    """Return the end of a message: the samplers that support an option, if there are any."""
    names = [name for name, one in spec.samplers.items() if supports(one)]
    return f", or use one of the samplers {', '.join(names)}" if names else ""
