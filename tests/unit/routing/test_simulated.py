"""Many clients at once, and servers that lie: what comes of the choices of each."""

import random
from collections import Counter

import pytest

from corolla.routing import Experience, Work, find_chain
from corolla.terms import Span, Speed

from .swarms import BLOCKS, demand, peer, server, snapshot


def loads(servers, clients=100, **changes):
    """Let clients choose chains, each with its own dice; count who is chosen, by first block."""
    seen = snapshot(*servers)
    chains = [find_chain(seen, demand(**changes), {}, rng=random.Random(seed)) for seed in range(clients)]
    return Counter((hop.span.start, hop.peer) for chain in chains for hop in chain.hops)


def test_a_hundred_clients_spread_over_four_equal_servers():
    """Petals defect: all clients of a region took the same best chain."""
    chosen = loads([server(number) for number in range(4)])
    assert sorted(chosen) == sorted((0, peer(number)) for number in range(4))
    assert 15 <= min(chosen.values()) <= max(chosen.values()) <= 35  # 25 each, give or take two deviations


def test_clients_spread_at_every_stage_of_a_chain():
    halves = [server(number, "0:4" if number < 4 else "4:8") for number in range(8)]
    chosen = loads(halves)
    assert len(chosen) == 8
    assert 15 <= min(chosen.values()) <= max(chosen.values()) <= 35


def test_a_server_that_is_much_slower_is_left_alone_and_one_that_is_little_slower_gets_less():
    chosen = loads([server(0), server(1), server(2, tokens_per_s=9.5), server(3, tokens_per_s=5.0)])
    assert chosen[0, peer(3)] == 0
    assert 0 < chosen[0, peer(2)] < chosen[0, peer(0)]


def test_without_dice_the_choice_is_always_the_best():
    seen = snapshot(*(server(number, tokens_per_s=10.0 + number % 7) for number in range(20)))
    assert {find_chain(seen, demand(), {}).hops[0].peer for _ in range(5)} == {peer(6)}


@pytest.mark.parametrize("is_timing_false", [False, True])
@pytest.mark.parametrize("use", ["training", "by client", "pushed"])
def test_a_server_that_lies_about_its_speed_loses_its_traffic(is_timing_false, use):
    """It claims a hundred times what it does; it may also say that it computed in no time, but cannot answer sooner."""
    true = {peer(0): 1.0, peer(1): 10.0, peer(2): 9.0}  # tokens a second
    liar = server(0, speed=Speed(decode_tokens_per_s=100.0, prefill_tokens_per_s=100.0))
    honest = [
        server(number, speed=Speed(decode_tokens_per_s=true[peer(number)], prefill_tokens_per_s=true[peer(number)]))
        for number in (1, 2)
    ]
    seen, experience, rtts_s = snapshot(liar, *honest), Experience(), dict.fromkeys(true, 0.02)
    is_training = use == "training"
    tokens = 20 if is_training else 1
    work = demand(prompt_tokens=20, decode_steps=0, token_bytes=10_000) if is_training else demand(decode_steps=20)
    chosen = []
    for step in range(10):
        known = experience.known(rtts_s, now_s=float(step))
        (hop,) = find_chain(seen, work, known, rng=random.Random(step)).hops
        chosen.append(hop.peer)
        compute_s = tokens / true[hop.peer]
        said_s = 0.0 if is_timing_false and hop.peer == peer(0) else compute_s
        done = Work(
            blocks=BLOCKS,
            tokens=tokens,
            is_decode=not is_training,
            nbytes=tokens * 20_000,
            total_s=compute_s + 0.02,
            queue_s=0.0,
            compute_s=said_s,
            is_pushed=use == "pushed",
        )
        experience.note(hop.peer, done, float(step), rtts_s[hop.peer])
    assert chosen[0] == peer(0)
    assert peer(0) not in chosen[1:]


def test_a_server_with_a_longer_queue_than_it_says_is_used_again_when_that_may_have_passed():
    seen, experience = snapshot(server(0), server(1)), Experience()
    waited = Work(blocks=8, tokens=1, is_decode=True, nbytes=0, total_s=2.1 + 0.1, queue_s=2.0, compute_s=0.1)
    experience.note(peer(0), waited, now_s=0.0)
    rtts_s = {peer(0): 0.1, peer(1): 0.15}
    assert find_chain(seen, demand(), experience.known(rtts_s, now_s=1.0)).hops[0].peer == peer(1)
    assert find_chain(seen, demand(), experience.known(rtts_s, now_s=300.0)).hops[0].peer == peer(0)


def test_a_part_of_a_span_may_be_all_that_is_used():
    seen = snapshot(server(0, "0:6", 100.0), server(1, "2:8", 10.0))
    chain = find_chain(seen, demand(), {})
    assert [hop.span for hop in chain.hops] == [Span(0, 6), Span(6, 8)]
