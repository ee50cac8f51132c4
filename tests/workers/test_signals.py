"""State shared by the pool and a worker process."""

from __future__ import annotations

import threading
import time

import pytest

from fidelora.workers.signals import Pulse, beating, new_signals


def test_a_pulse_stops_when_its_time_is_over():
    pulse = Pulse()
    assert not pulse.has_stopped(float("1e300"))
    pulse.beat(10)
    assert not pulse.has_stopped(time.monotonic())
    assert pulse.has_stopped(time.monotonic() + 11)


def test_a_long_block_beats_until_it_ends():
    beats: list[float] = []
    enough = threading.Event()

    def beat(seconds: float) -> None:
        beats.append(seconds)
        if len(beats) == 3:
            enough.set()

    with beating(beat, 0.001, 1000):
        assert enough.wait(60)
    count = len(beats)
    assert set(beats) == {0.003}
    assert "beats" not in {thread.name for thread in threading.enumerate()}
    assert len(beats) == count


def test_a_block_that_hangs_beats_only_for_a_limited_time():
    beats: list[float] = []
    with beating(beats.append, 0.001, 0):
        pass
    assert beats == []


def test_beats_end_if_the_block_raises():
    with pytest.raises(KeyError), beating(lambda seconds: None, 1000, 1000):
        raise KeyError
    assert "beats" not in {thread.name for thread in threading.enumerate()}


def test_waking_never_blocks_even_if_the_worker_does_not_listen():
    signals, sender = new_signals()
    for _ in range(200_000):  # a pipe has room for 65,536
        sender.wake()
    signals.wake.wait(3600)


def test_flags_are_set_once():
    signals, _ = new_signals()
    assert not signals.ready.is_set()
    assert not signals.finish.is_set()
    signals.ready.set()
    assert signals.ready.is_set()
    assert not signals.finish.is_set()
