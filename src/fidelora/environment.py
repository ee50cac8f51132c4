"""Names of settings in the environment, and variables that other programs set under these names.

`HOST`, `PORT`, `DEBUG`, `BASE_URL` and `DEVICE` are settings of many programs, and Kubernetes
defines `FIDELORA_PORT` in every container if a Service has the name fidelora. Values that cannot
be meant for Fidelora are ignored with a warning.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches

from pydantic import AliasChoices
from pydantic.fields import FieldInfo

PREFIX = "FIDELORA_"

_BOOLEANS = frozenset(["0", "1", "f", "false", "n", "no", "off", "on", "t", "true", "y", "yes"])
"""Words that pydantic converts to a boolean."""
_OF_SERVICE = re.compile(rf"{PREFIX}(SERVICE_(HOST|PORT\w*)|PORT_\d+_(TCP|UDP|SCTP)\w*)")
"""Variables that Kubernetes sets in every container if a Service is called fidelora."""
_DEVICE = r"(auto|(cpu|mps|cuda)(:\d+)?)"


def either(name: str) -> AliasChoices:
    """Return the two names of a setting: `name` with the prefix, and without it.

    The prefixed one takes precedence, even if it is in `.env` and the other is an environment
    variable.
    """
    return AliasChoices(PREFIX + name, name)


def names_of(field: FieldInfo) -> tuple[str, ...]:
    """Return the names of a setting; the first one takes precedence."""
    alias = field.validation_alias
    if isinstance(alias, AliasChoices):
        return tuple(str(name) for name in alias.choices)
    return (str(alias),)


def foreign_variables(variables: Mapping[str, str | None]) -> dict[str, str]:
    """Find variables whose values Fidelora cannot use, because they were set for another program.

    An example is `FIDELORA_PORT=tcp://10.0.0.1:80`, which Kubernetes sets.

    Args:
        variables: values by name; names may have any case.

    Returns:
        for each of these variables, a description of the values that Fidelora accepts.
    """
    return {
        name: rule[1]
        for name, value in variables.items()
        if value and (rule := _RULES.get(name.upper())) and not rule[0](value.strip())
    }


def ignored_variables(
    variables: Mapping[str, str | None], settings: Sequence[tuple[str, ...]]
) -> list[str]:
    """Return a sentence for each variable that looks like a setting, but has no effect.

    Args:
        variables: values by name; names may have any case.
        settings: names of each setting, see `names_of`.
    """
    values = {name.upper(): value for name, value in variables.items()}
    foreign = foreign_variables(values)
    known = {name: names[0] for names in settings for name in names}
    sentences = []
    for name in sorted(values):
        if name in foreign:
            reason = f"{name} is ignored, because its value is not {foreign[name]}"
            if (preferred := known.get(name, name)) == name:
                sentences.append(f"{reason}; Kubernetes and Docker set it for a service.")
            elif preferred not in values:
                sentences.append(f"{reason}. If it is meant for Fidelora, set {preferred}.")
        elif _OF_SERVICE.fullmatch(name) and name not in known:
            sentences.append(f"{name} is ignored; Kubernetes and Docker set it for a service.")
        elif name.startswith(PREFIX) and name not in known:
            near = get_close_matches(name, known, 1, cutoff=0.85)
            hint = f"; did you mean {near[0]}?" if near else "."
            sentences.append(f"{name} is not a setting of Fidelora and has no effect{hint}")
    return sentences


def _is_address(value: str) -> bool:
    try:
        ipaddress.ip_address(value)
    except ValueError:
        return value.lower() == "localhost"
    return True


def _matches(pattern: str) -> Callable[[str], bool]:
    return lambda value: re.fullmatch(pattern, value, re.IGNORECASE) is not None


_RULES: Mapping[str, tuple[Callable[[str], bool], str]] = {
    "HOST": (_is_address, "an IP address or localhost"),
    "PORT": (_matches(r"[+-]?\d+"), "a number"),
    "DEBUG": (lambda value: value.lower() in _BOOLEANS, "true or false"),
    "BASE_URL": (_matches(r"https?://[^/].*"), "an http or https URL"),
    "DEVICE": (
        _matches(rf"none|{_DEVICE}(\s*,\s*{_DEVICE})*"),
        "auto, cpu, cuda, cuda:N, mps or none",
    ),
    # Kubernetes and Docker's links set this to the URL of a Service or container.
    f"{PREFIX}PORT": (lambda value: "://" not in value, "a number"),
}
"""By variable: a test for values that Fidelora can use, and their description in messages."""
