"""What work tells of a server: averages by kind of work, forgotten when they are old."""

import pytest

from corolla.routing import Experience, Measured, Work

from .swarms import peer

DECODE = Work(blocks=4, tokens=2, is_decode=True, nbytes=2000, total_s=0.5, queue_s=0.1, compute_s=0.2)
PREFILL = Work(blocks=4, tokens=100, is_decode=False, nbytes=2_000_000, total_s=1.7, queue_s=0.1, compute_s=0.4)


def test_decode_and_prefill_are_told_apart():
    experience = Experience()
    experience.note(peer(0), DECODE, now_s=0.0)
    assert experience.known({}, 0.0) == {peer(0): Measured(pytest.approx(0.2), pytest.approx(0.1), 0.05)}
    experience.note(peer(0), PREFILL, now_s=1.0)
    (found,) = experience.known({}, 1.0).values()
    assert (found.decode_block_s, found.prefill_block_s) == (0.05, pytest.approx(0.001))
    assert found.bytes_per_s == pytest.approx(2_000_000 / (1.2 - 0.2))


def test_pings_count_where_no_work_tells():
    experience = Experience()
    experience.note(peer(0), DECODE, now_s=0.0)
    experience.note(peer(1), PREFILL, now_s=0.0)
    found = experience.known({peer(0): 0.01, peer(1): 0.02, peer(2): 0.03}, now_s=0.0)
    assert [found[peer(number)].rtt_s for number in range(3)] == [pytest.approx(0.2), 0.02, 0.03]


def test_a_newer_measurement_moves_the_average():
    experience = Experience()
    experience.note(peer(0), DECODE, now_s=0.0)
    experience.note(peer(0), DECODE._replace(compute_s=0.4), now_s=1.0)
    assert experience.known({}, 1.0)[peer(0)].decode_block_s == pytest.approx(0.05 + (0.1 - 0.05) / 4)


def test_no_part_of_the_time_exceeds_the_whole():
    experience = Experience()
    experience.note(peer(0), DECODE._replace(queue_s=1e9, compute_s=1e9), now_s=0.0)
    assert experience.known({}, 0.0)[peer(0)] == Measured(0.0, 0.5, 0.0)


def test_what_no_way_can_take_counts_as_computing_where_outputs_are_pushed():
    experience = Experience()
    experience.note(peer(0), DECODE._replace(is_pushed=True), 0.0, 0.3)  # half a second: 0.1 + 0.2 and at most 0.3
    assert experience.known({}, 0.0)[peer(0)].decode_block_s == pytest.approx(0.2 / 4)
    experience.note(peer(1), DECODE._replace(is_pushed=True), 0.0, 0.05)
    assert experience.known({}, 0.0)[peer(1)] == Measured(None, pytest.approx(0.1), pytest.approx(0.35 / 4))
    experience.note(peer(2), DECODE._replace(is_pushed=True, total_s=None), 0.0, 0.05)
    assert experience.known({}, 0.0)[peer(2)].decode_block_s == pytest.approx(0.2 / 4)


def test_few_bytes_tell_nothing_about_bandwidth():
    experience = Experience()
    experience.note(peer(0), PREFILL._replace(nbytes=1000), now_s=0.0)
    assert experience.known({}, 0.0)[peer(0)].bytes_per_s is None


def test_what_is_old_is_forgotten_and_what_is_kept_is_bounded():
    experience = Experience()
    for number in range(5000):
        experience.note(peer(number), DECODE, now_s=0.0)
    assert len(experience.known({}, 1.0)) == 4096
    experience.note(peer(0), DECODE, now_s=599.0)
    assert list(experience.known({}, 600.0)) == [peer(0)]
