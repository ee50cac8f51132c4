"""Fuzz one target with atheris: `python -m tests.faults.fuzz.run TARGET SECONDS`.

New inputs go to `build/fuzz/TARGET`, and inputs that crash the target to `build/fuzz/crash-*`.
Exit code 0 means that no crash was found.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["fidelora"]):
    from tests.faults.fuzz.targets import TARGETS

from tests.faults.fuzz.mutations import MUTATIONS

CORPUS = Path(__file__).with_name("corpus")
FOUND = Path("build") / "fuzz"
MAX_INPUT_BYTES = 20_000
MAX_INPUT_S = 10
MAX_MEMORY_MB = 2048


def main(name: str, seconds: str) -> None:
    """Run one target for this time."""
    found = FOUND / name
    found.mkdir(parents=True, exist_ok=True)
    mutate = MUTATIONS.get(name)

    def mutated(data: bytes, max_bytes: int, seed: int) -> bytes:
        changed = mutate(data, seed) if mutate is not None and seed % 2 else None
        if changed is None or len(changed) > max_bytes:
            return bytes(atheris.Mutate(data, max_bytes))
        return changed

    options = [
        f"-max_total_time={seconds}",
        f"-max_len={MAX_INPUT_BYTES}",
        f"-timeout={MAX_INPUT_S}",
        f"-rss_limit_mb={MAX_MEMORY_MB}",
        f"-artifact_prefix={FOUND}/",
        "-print_final_stats=1",
        str(found),
        str(CORPUS / name),
    ]
    atheris.Setup([sys.argv[0], *options], TARGETS[name], custom_mutator=mutated)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
