"""Mutations of JSON documents, so that a fuzzer gets past the parser."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Mapping
from typing import Any

_MAX_NODES = 2000

HOSTILE_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**30, 10**400,
    0.0, -0.0, 0.5, 1e308, -1e-308, float("inf"), float("-inf"), float("nan"),
    "", " ", "a", "0", "1e9999", "-1", "nan", "\ud800", "\x00", "\x1b[2J", "\u202eabc", "é" * 300,
    "a" * 5000, "../../etc/passwd", "/etc/passwd", "<script>alert(1)</script>", "[trigger]",
    "<lora:a:1>", "(a:1.5)", "[" * 50, "{", "9" * 4400, "\U0010ffff", "\r\n",
    [], {}, [[]], [None], [0, 0], [0, 2**64], {"": ""}, {"a": {"a": {"a": []}}}, [1] * 40,
)  # fmt: skip
"""Values of all types that programs often do not expect."""


def mutated_json(document: Any, rng: random.Random) -> Any:
    """Return a copy of a JSON value with one to three random changes."""
    changed = copy.deepcopy(document)
    for _ in range(rng.randint(1, 3)):
        places = _places(changed)
        if not places:
            return rng.choice(HOSTILE_VALUES)
        container, key = rng.choice(places)
        match rng.randrange(6):
            case 0 | 1:
                container[key] = copy.deepcopy(rng.choice(HOSTILE_VALUES))
            case 2:
                del container[key]
            case 3:
                _add(container, key, copy.deepcopy(rng.choice(HOSTILE_VALUES)), rng)
            case 4:
                container[key] = _nested(container[key], rng)
            case _:
                other, place = rng.choice(places)
                container[key] = copy.deepcopy(other[place])
    return changed


def dumped(document: Any) -> bytes:
    """Return a JSON document as bytes; lone surrogates become escapes."""
    return json.dumps(document, ensure_ascii=True).encode()


def mutated_document(data: bytes, seed: int) -> bytes | None:
    """Return JSON with random changes; None if `data` is not JSON."""
    try:
        return dumped(mutated_json(json.loads(data), random.Random(seed)))
    except (ValueError, RecursionError):
        return None


def mutated_safetensors(data: bytes, seed: int) -> bytes | None:
    """Return a .safetensors file with a changed header; None if `data` is no such file.

    In a tenth of the files, the length of the header is wrong. In half of the files, the last byte
    is missing.
    """
    rng = random.Random(seed)
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
        raw = dumped(mutated_json(header, rng))
    except (ValueError, RecursionError):
        return None
    size = len(raw) if rng.random() < 0.9 else rng.choice([0, 2**32, 2**64 - 1, len(raw) + 1])
    body = data[8 + length :]
    return size.to_bytes(8, "little") + raw + (body if rng.random() < 0.5 else body[:-1])


MUTATIONS: Mapping[str, Callable[[bytes, int], bytes | None]] = {
    "safetensors_header": mutated_safetensors,
    "recipe": mutated_document,
}
"""Mutations by the name of the target; the others have no structure that needs one."""


def _places(document: Any) -> list[tuple[Any, Any]]:
    """Return all containers in a value with their keys or indices, up to `_MAX_NODES`."""
    found: list[tuple[Any, Any]] = []
    waiting = [document]
    while waiting and len(found) < _MAX_NODES:
        one = waiting.pop()
        keys = list(one) if isinstance(one, dict) else range(len(one)) if _is_list(one) else ()
        for key in keys:
            found.append((one, key))
            waiting.append(one[key])
    return found


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _add(container: Any, key: Any, value: Any, rng: random.Random) -> None:
    if isinstance(container, dict):
        container[rng.choice(["", "\ud800", "a" * 300, "\x1b", f"{key}2", "__metadata__"])] = value
    else:
        container.insert(rng.randrange(len(container) + 1), value)


def _nested(value: Any, rng: random.Random) -> Any:
    for _ in range(rng.choice([1, 2, 30, 300])):
        value = [value] if rng.random() < 0.7 else {"a": value}
    return value
