"""Parts shared by the training scripts: options, a resumable training loop, pixel conversion."""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_SAVE_EVERY_S = 60.0  # seconds between two saved states
_WARM_UP = 0.02
"""Fraction of the time in which the learning rate rises."""
_LAST_RATE = 0.01
"""Learning rate at the end, as a fraction of the initial one."""
_AVERAGE = 0.999
"""Decay of the moving average of the weights, per step."""


def parser(doc: str | None, minutes: float) -> argparse.ArgumentParser:
    """Return a parser with the options `--work` and `--minutes`.

    The work folder keeps all files between runs. The minutes are the total of all runs, in
    processor time per thread: what other programs take on a busy machine does not count.
    """
    made = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    made.add_argument("--work", type=Path, required=True)
    made.add_argument("--minutes", type=float, default=minutes)
    return made


def options(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the parsed options; create the work folder if it does not exist."""
    found = parser.parse_args()
    found.work.mkdir(parents=True, exist_ok=True)
    return found


class Run:
    """A training run with a budget of minutes.

    It uses AdamW with a cosine learning rate over the budget, averages weights, and saves every
    minute.

    Args:
        module: the module to train; it has the averaged weights after the last step.
    """

    def __init__(
        self, options: argparse.Namespace, name: str, module: nn.Module, learning_rate: float
    ) -> None:
        self._path = options.work / f"{name}.pt"
        self._log = options.work / f"{name}.csv"
        self._budget_s = options.minutes * 60
        self._module = module
        self._rate = learning_rate
        self._optimizer = torch.optim.AdamW(
            module.parameters(), learning_rate, betas=(0.9, 0.99), weight_decay=0.01
        )
        self._average = {key: value.clone() for key, value in module.state_dict().items()}
        self.step = 0
        self.seconds = 0.0
        self.is_finished = False
        self._losses: list[float] = []
        if self._path.exists():
            self._restore(torch.load(self._path))
        self._last, self._saved = _seconds_used(), time.monotonic()

    def keep_going(self) -> bool:
        """Update the elapsed time, and return True if any is left.

        Otherwise, save the state and load the averaged weights into the module.
        """
        now = _seconds_used()
        self.seconds += now - self._last
        self._last = now
        if self.seconds < self._budget_s:
            return True
        self._save()
        self._module.load_state_dict(self._average)
        self.is_finished = True
        return False

    @property
    def progress(self) -> float:
        """Fraction of the time budget used so far, 0..1."""
        return min(float(self.seconds / self._budget_s), 1.0)

    def learn(self, loss: Tensor) -> None:
        """Run one optimizer step."""
        cosine = _LAST_RATE + (1 - _LAST_RATE) * 0.5 * (1 + math.cos(math.pi * self.progress))
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate * min(1.0, self.progress / _WARM_UP + 0.01) * cosine
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self._module.parameters(), 1.0)
        self._optimizer.step()
        self.step += 1
        self._losses.append(loss.item())
        decay = min(_AVERAGE, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for key, value in self._module.state_dict().items():
                if value.is_floating_point():
                    self._average[key].lerp_(value, 1 - decay)
        if self.step % 100 == 0:
            self._report()
        if time.monotonic() - self._saved > _SAVE_EVERY_S:
            self._save()

    def averaged(self) -> dict[str, Tensor]:
        """Return the current averaged weights."""
        return self._average

    def _report(self) -> None:
        mean = sum(self._losses) / len(self._losses)
        self._losses.clear()
        with self._log.open("a") as file:
            file.write(f"{self.step},{self.seconds:.0f},{mean:.6f}\n")
        print(
            f"step {self.step}, {self.seconds / 60:.1f} of {self._budget_s / 60:g} minutes, "
            f"loss {mean:.5f}",
            flush=True,
        )

    def _save(self) -> None:
        state = {
            "module": self._module.state_dict(),
            "average": self._average,
            "optimizer": self._optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        temporary = self._path.with_suffix(".part")
        torch.save(state, temporary)
        temporary.replace(self._path)
        self._saved = time.monotonic()

    def _restore(self, state: dict[str, Any]) -> None:
        self._module.load_state_dict(state["module"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._average, self.step, self.seconds = state["average"], state["step"], state["seconds"]


def _seconds_used() -> float:
    """Return the processor time of this process per thread of torch, in seconds."""
    return time.process_time() / torch.get_num_threads()


def autocast() -> torch.autocast:
    """Return an autocast to bfloat16, disabled on processors that have to emulate it.

    Emulation takes fifty times the time that bfloat16 saves.
    """
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported())


def to_tensor(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> Tensor:
    """Convert levels `[n, h, w, 3]` to `[n, 3, h, w]` in -1..1."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))).float() / 127.5 - 1


def to_pixels(images: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Convert `[n, 3, h, w]` in -1..1 to levels `[n, h, w, 3]`."""
    levels: np.ndarray[Any, np.dtype[np.uint8]] = (
        ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    )
    return levels
