"""How long a tick waits for company: never without need, never longer than a tick."""

from corolla.cache import PagePool
from corolla.engine.gathering import Gathering
from corolla.engine.work import SessionRows
from corolla.terms import Span


def sessions_of(count):
    pool = PagePool(count)
    return [SessionRows(Span(0, 1), pool.lease(1, 1), ()) for _ in range(count)]


def gathering_of(sessions, tick_s=0.02):
    gathering = Gathering()
    for session in sessions:
        gathering.note([session], 10.0, tick_s)
    return gathering


def test_a_single_session_never_waits():
    for count in (0, 1, 2, 3):
        assert gathering_of(sessions_of(count)).wait_s(1, 10.02, 10.02) == 0


def test_a_tick_waits_for_half_of_those_that_decode_and_no_longer_than_a_tick_takes():
    gathering = gathering_of(sessions_of(8))
    assert 0.019 < gathering.wait_s(3, free_at_s=10.1, now_s=10.1) < 0.021
    assert 0.009 < gathering.wait_s(3, free_at_s=10.1, now_s=10.11) < 0.011
    assert gathering.wait_s(3, free_at_s=10.1, now_s=10.13) == 0
    assert gathering.wait_s(4, free_at_s=10.1, now_s=10.1) == 0


def test_nobody_waits_for_who_has_ended_or_fallen_silent():
    sessions = sessions_of(8)
    gathering = gathering_of(sessions)
    for session in sessions[1:]:
        session.end("its client has left")
    gathering.note(sessions[:1], 10.1, 0.02)
    assert gathering.wait_s(1, 10.2, 10.2) == 0
    gathering = gathering_of(sessions_of(8))
    gathering.note(sessions_of(1), 20.0, 0.02)
    assert gathering.wait_s(1, 20.1, 20.1) == 0


def test_prompts_are_cut_to_a_limit_in_time_while_others_decode():
    sessions = sessions_of(2)
    gathering = gathering_of(sessions)
    assert gathering.prompt_tokens(0.2, 10.1) is None  # nothing is known of prompts
    gathering.note_prompt([], 500, 10.1, 1.0)  # 2 ms a token
    assert gathering.prompt_tokens(0.2, 11.0) == 96  # 100, in whole sixteens
    assert gathering.prompt_tokens(0.001, 11.0) == 16
    assert gathering.prompt_tokens(0.2, 13.0) is None  # they are silent
    gathering.note_prompt(sessions[:1], 100, 12.0, 1.0)  # a long row: 10 ms a token
    assert gathering.prompt_tokens(0.2, 13.0) == 48
    sessions[0].end("its client has left")
    assert gathering.prompt_tokens(0.2, 13.0) is None
