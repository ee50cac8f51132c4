"""Training runs for the tests of commands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.support import GOLDEN_JOBS, TINY_BASE, TINY_SDXL

RUN = GOLDEN_JOBS / "lora_linear_f32"
BASE = ("--base-model", str(TINY_BASE), "--device", "cpu")
SDXL_BASE = ("--base-model", str(TINY_SDXL), "--device", "cpu")
Change = Callable[[dict[str, Any]], Any]
