"""Who is worth measuring: all first hops of a small swarm, and of a large one no more than routing would consider."""

import random

from corolla.routing import Measured, candidates

from .swarms import BLOCKS, demand, peer, server, snapshot


def test_every_candidate_for_the_first_hop_is_measured():
    """Petals defect D: it measured none of them."""
    servers = [server(number, "0:4") for number in range(30)] + [server(100 + at, "4:8") for at in range(3)]
    assert {one.peer for one in candidates(snapshot(*servers), demand(), {})} == {one.peer for one in servers}


def test_nobody_is_measured_who_cannot_be_used():
    servers = [server(0, state="joining"), server(1, precision="float16"), server(2), server(3)]
    found = candidates(snapshot(*servers), demand(precision="float32", avoid=[peer(3)]), {})
    assert [one.peer for one in found] == [peer(2)]


def crowd(servers, seed=0):
    rng = random.Random(seed)
    spans = [f"{start}:{start + 2}" for start in range(BLOCKS - 1)]
    return [server(number, rng.choice(spans), rng.uniform(1, 100)) for number in range(servers)]


def test_measuring_ends_in_a_swarm_of_thousands():
    """Measure who is worth it, again and again, until all of those were measured: a few hundred of five thousand."""
    servers = crowd(5000)
    distance_s = {one.peer: random.Random(one.peer).uniform(0.005, 0.3) for one in servers}
    known = {}
    for _ in range(100):
        chosen = candidates(snapshot(*servers), demand(), known)
        assert len(chosen) <= 64 + 4 * BLOCKS
        new = [one for one in chosen if one.peer not in known][:8]
        if not new:
            break
        known |= {one.peer: Measured(rtt_s=distance_s[one.peer]) for one in new}
    assert not new
    assert 64 < len(known) < 700


def test_a_newcomer_that_is_fast_is_measured_at_once():
    servers = crowd(500)
    known = {one.peer: Measured(rtt_s=0.05) for one in servers}
    newcomer = server(900, "0:2", 99.0)
    assert newcomer in candidates(snapshot(*servers, newcomer), demand(), known)[:8]
