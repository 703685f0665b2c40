"""Bans end, grow while a peer keeps failing, and are forgotten when it succeeds."""

from corolla.routing import Bans
from corolla.terms import PeerId

PEER, OTHER = PeerId("a" * 52), PeerId("b" * 52)


def test_a_ban_ends():
    bans = Bans()
    bans.ban(PEER, 15, now_s=100)
    assert bans.banned(114.9) == {PEER}
    assert bans.banned(115) == frozenset()


def test_a_peer_that_fails_again_soon_after_its_ban_is_banned_twice_as_long():
    bans, now_s = Bans(), 0.0
    for length_s in (15, 30, 60, 120):
        bans.ban(PEER, 15, now_s)
        assert bans.banned(now_s + length_s - 0.1) == {PEER}
        now_s += length_s + 1
        assert bans.banned(now_s) == frozenset()


def test_many_who_notice_one_failure_are_counted_once():
    bans = Bans()
    for _ in range(10):
        bans.ban(PEER, 15, now_s=0)
    bans.ban(PEER, 15, now_s=5)
    assert bans.banned(19) == {PEER}
    assert bans.banned(20) == frozenset()


def test_a_graver_failure_prolongs_a_ban_and_a_lesser_one_does_not_shorten_it():
    bans = Bans()
    bans.ban(PEER, 15, now_s=0)
    bans.ban(PEER, 600, now_s=1)
    bans.ban(PEER, 15, now_s=2)
    assert bans.banned(600) == {PEER}
    assert bans.banned(601) == frozenset()


def test_a_failure_long_after_is_a_first_one():
    bans = Bans()
    bans.ban(PEER, 15, now_s=0)
    bans.ban(PEER, 15, now_s=30)  # the ban ended at 15, and its length passed once more
    assert bans.banned(45) == frozenset()


def test_bans_stop_growing_at_an_hour_unless_the_failure_itself_asks_for_more():
    bans, now_s = Bans(), 0.0
    for _ in range(20):
        bans.ban(PEER, 15, now_s)
        while bans.banned(now_s):
            now_s += 5
    bans.ban(PEER, 15, now_s)
    assert bans.banned(now_s + 3599) == {PEER}
    assert bans.banned(now_s + 3600) == frozenset()
    bans.ban(OTHER, 7200, now_s=0)
    assert bans.banned(7199) >= {OTHER}


def test_a_success_is_a_fresh_start():
    bans = Bans()
    bans.ban(PEER, 15, now_s=0)
    bans.forgive(PEER)
    assert bans.banned(0) == frozenset()
    bans.forgive(PEER)
    bans.ban(PEER, 15, now_s=16)
    assert bans.banned(31) == frozenset()


def test_a_failure_that_bans_nobody_does_nothing():
    bans = Bans()
    bans.ban(PEER, 0, now_s=0)
    assert bans.banned(0) == frozenset()


def test_the_first_use_after_a_ban_is_a_probe_that_nobody_joins():
    bans = Bans()
    bans.ban(PEER, 15, now_s=0)
    bans.use([PEER, OTHER], now_s=10)  # there was no other chain: not a probe
    assert bans.banned(15) == frozenset()
    bans.use([PEER], now_s=16)
    assert bans.banned(16) == {PEER}
    bans.forgive(PEER)
    assert bans.banned(16) == frozenset()


def test_a_probe_that_fails_is_a_longer_ban():
    bans = Bans()
    bans.ban(PEER, 15, now_s=0)
    bans.use([PEER], now_s=16)
    bans.ban(PEER, 15, now_s=17)
    assert bans.banned(46.9) == {PEER}
    assert bans.banned(47) == frozenset()


def test_a_probe_of_which_nothing_is_heard_makes_room_for_another():
    bans = Bans()
    bans.ban(PEER, 15, now_s=0)
    bans.use([PEER], now_s=29)  # almost forgotten by then
    assert bans.banned(43.9) == {PEER}
    assert bans.banned(44) == frozenset()
