"""How often the tests of this folder repeat their faults; `make faults` sets larger numbers."""

from __future__ import annotations

import os

ROUNDS = int(os.environ.get("FAULT_ROUNDS", "2"))
"""Rounds of each fault, each of which takes seconds."""
INPUT_ROUNDS = max(1, ROUNDS // 5)
"""Rounds of random hostile input, each of which has hundreds of items."""
REQUESTS = int(os.environ.get("FAULT_REQUESTS", "40"))
"""Requests that are queued before the first fault."""
