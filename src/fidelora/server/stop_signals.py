"""Signals that ask a server or a worker process to stop."""

from __future__ import annotations

import signal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def ignore_stop_signals() -> None:
    """Ignore further stop signals; called when the process has stopped and is about to exit.

    Python restores the default actions while it exits. If a supervisor repeated SIGTERM at that
    moment, the signal would end the process, and the supervisor would see a failure (-15) instead
    of exit code 0. Ignored signals stay ignored (`_PySignal_Fini` in CPython's `signalmodule.c`).
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
