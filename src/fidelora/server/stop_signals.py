"""Signals that ask a server or a worker process to stop."""

from __future__ import annotations

import signal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def ignore_stop_signals() -> None:
    """Ignore further stop signals; called when the process has stopped and is about to exit.

    Python restores the default actions while it exits. A supervisor that repeats SIGTERM then would
    end the process with that signal, and see a failure (-15) in place of exit code 0. Signals that
    are ignored stay ignored (`_PySignal_Fini` in CPython's `signalmodule.c`).
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
