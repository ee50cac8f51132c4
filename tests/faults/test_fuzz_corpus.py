"""The inputs that `make fuzz` starts from, with some of its changes, in the ordinary suite."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tests.faults.fault_support import in_time
from tests.faults.fuzz.mutations import MUTATIONS, mutated_document
from tests.faults.fuzz.targets import TARGETS
from tests.faults.rounds import INPUT_ROUNDS

CORPUS = Path(__file__).parent / "fuzz" / "corpus"
MAX_CORPUS_BYTES = 200_000
FILES = sorted(path for path in CORPUS.rglob("*") if path.is_file())


def test_every_target_has_a_small_corpus():
    assert {path.parent.name for path in FILES} == TARGETS.keys()
    assert sum(path.stat().st_size for path in FILES) < MAX_CORPUS_BYTES


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_inputs_of_the_corpus_are_read_or_refused(path):
    target, content = TARGETS[path.parent.name], path.read_bytes()
    mutate = MUTATIONS.get(path.parent.name, mutated_document)
    rng = random.Random(path.name)
    inputs = [content]
    for number in range(40 * INPUT_ROUNDS):
        changed = bytearray(content)
        changed[rng.randrange(len(changed))] = rng.randrange(256)
        inputs += [mutate(content, number) or content[: number % len(content)], bytes(changed)]

    def run() -> None:
        for one in inputs:
            target(one)

    in_time(run)
