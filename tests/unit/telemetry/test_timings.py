"""Timings add up."""

import pytest

from corolla.telemetry import Timing, Timings


def test_durations_add_up_by_name():
    timings = Timings()
    for elapsed_s in (1.0, 3.0, 2.0):
        timings.record("step", elapsed_s)
    assert timings.read() == {"step": Timing(count=3, total_s=6.0, max_s=3.0)}
    assert timings.read()["step"].mean_s == 2.0


def test_a_body_is_timed_even_if_it_fails():
    ticks = iter([10.0, 12.5])
    timings = Timings(clock=lambda: next(ticks))
    with pytest.raises(ZeroDivisionError), timings.measure("step"):
        _ = 1 / 0
    assert timings.read() == {"step": Timing(count=1, total_s=2.5, max_s=2.5)}


def test_nothing_was_done_before_the_first():
    assert Timings().read() == {}
    assert Timing().mean_s == 0.0
