"""The chain is the cheapest there is."""

import random
import time
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corolla.errors import NoChain
from corolla.routing import Demand, RoutingConfig, find_chain, uncovered
from corolla.terms import Announcement, ModelId, PeerId, Snapshot, Span, Speed

MODEL, OTHER = ModelId("0" * 64), ModelId("1" * 64)
BLOCKS = 6
CONFIG = RoutingConfig()
LETTERS = "abcdefghijklmnopqrstuvwxyz234567"


def peer(number):
    digits = [LETTERS[number // 32**place % 32] for place in (2, 1, 0)]
    return PeerId("".join(digits).ljust(52, "a"))


def announce(number, span, speed=None, **claims):
    measured = None if speed is None else Speed(decode_tokens_per_s=speed, prefill_tokens_per_s=0)
    usual = {"model": MODEL, "num_blocks": BLOCKS, "state": "online", "dtype": "float32", "free_tokens": 100}
    claim = partial(Announcement, sequence=1, ttl_s=10, model_name="", addresses=())
    return claim(peer=peer(number), span=span, speed=measured, **usual | claims)


@st.composite
def spans(draw, stop=BLOCKS):
    start = draw(st.integers(0, stop - 1))
    return Span(start, draw(st.integers(start + 1, stop)))


@st.composite
def swarms(draw):
    servers = [
        announce(
            number,
            draw(spans()),
            draw(st.sampled_from([None, 0.0, 5e-324, 1.0, 7.5, 40.0])),
            model=draw(st.sampled_from([MODEL] * 5 + [OTHER])),
            state=draw(st.sampled_from(["online"] * 4 + ["joining", "draining"])),
            dtype=draw(st.sampled_from(["float32", "bfloat16"])),
            free_tokens=draw(st.sampled_from([5, 100])),
            sessions=draw(st.integers(0, 9)),
        )
        for number in range(draw(st.sampled_from([0, 1, 3, 5, 6])))
    ]
    return Snapshot(announcements=tuple(servers), age_s=draw(st.sampled_from([0.0, 12.3])))


DEMANDS = st.builds(
    Demand,
    model=st.just(MODEL),
    span=spans(),
    tokens=st.sampled_from([0, 50]),
    dtype=st.sampled_from([None, "float32"]),
    avoid=st.sampled_from([(), (peer(0),), [peer(1), peer(2)]]),
)
RTTS = st.dictionaries(st.integers(0, 5).map(peer), st.floats(0, 0.5))


def offers(server, demand):
    return (
        (server.model, server.state) == (demand.model, "online")
        and demand.dtype in (None, server.dtype)
        and server.free_tokens >= demand.tokens
        and server.peer not in demand.avoid
    )


def chains(servers, start, stop):
    """Every way to cut the blocks into hops, with every server for each."""
    if start == stop:
        yield []
    for server in servers:
        for end in range(start + 1, stop + 1):
            if server.span.covers(Span(start, end)):
                for rest in chains(servers, end, stop):
                    yield [(server, Span(start, end)), *rest]


def cost(hops, rtts_s):
    total_s = 0.0
    for server, span in hops:
        total_s += 0.002 + rtts_s.get(server.peer, 0.1)
        if server.speed is None:
            total_s += len(span) * 0.01
        else:
            tokens_per_s = max(server.speed.decode_tokens_per_s, 0.001) * len(server.span)
            total_s += len(span) * (1 + server.sessions / 4) / tokens_per_s
    return total_s


@settings(max_examples=400)
@given(snapshot=swarms(), demand=DEMANDS, rtts_s=RTTS)
def test_the_chain_is_the_cheapest_there_is(snapshot, demand, rtts_s):
    servers = {server.peer: server for server in snapshot.announcements if offers(server, demand)}
    all_chains = list(chains(list(servers.values()), demand.span.start, demand.span.stop))
    if not all_chains:
        with pytest.raises(NoChain) as caught:
            find_chain(snapshot, demand, rtts_s)
        check_refusal(caught.value, snapshot, demand, servers.values())
        return
    chain = find_chain(snapshot, demand, rtts_s)
    assert chain.span == demand.span
    assert [block for hop in chain.hops for block in range(hop.span.start, hop.span.stop)] == list(
        range(demand.span.start, demand.span.stop)
    )
    found = [(servers[hop.peer], hop.span) for hop in chain.hops]
    assert all(server.span.covers(span) for server, span in found)
    assert cost(found, rtts_s) == pytest.approx(min(cost(hops, rtts_s) for hops in all_chains))
    assert find_chain(snapshot, demand, rtts_s, CONFIG) == chain


def check_refusal(error, snapshot, demand, servers):
    blocks = range(demand.span.start, demand.span.stop)
    missing = [block for block in blocks if not any(block in server.span for server in servers)]
    gaps = uncovered(snapshot, demand)
    assert [block for gap in gaps for block in range(gap.start, gap.stop)] == missing
    assert all(left.stop < right.start for left, right in zip(gaps, gaps[1:], strict=False))
    assert f"no server for blocks {' and '.join(map(str, gaps))} of model" in error.message
    assert f"the view is {snapshot.age_s:.0f} s old" in error.message


def test_a_refusal_names_every_gap_what_was_wished_and_how_old_the_view_is():
    servers = [announce(0, Span(1, 2)), announce(1, Span(4, 5)), announce(2, Span(0, 6), free_tokens=3)]
    demand = Demand(model=MODEL, span=Span(0, 6), tokens=7, dtype="float32", avoid=[peer(9)])
    with pytest.raises(NoChain) as caught:
        find_chain(Snapshot(announcements=tuple(servers), age_s=42), demand, {})
    assert caught.value.message == (
        "no server for blocks 0:1 and 2:4 and 5:6 of model 000000000000 (with 7 free KV tokens, precision float32, "
        "1 peers avoided); 3 servers of the model are known, the view is 42 s old; wait, or serve them: "
        "corolla serve MODEL --blocks 0:1"
    )


@pytest.mark.parametrize("longest", [16, 64])
def test_a_chain_through_ten_thousand_servers_is_found_at_once(longest):
    rng = random.Random(0)
    servers, rtts_s = [], {}
    for number in range(10_000):
        length = rng.randint(1, longest)
        start = rng.randint(0, 128 - length)
        servers.append(announce(number, Span(start, start + length), rng.uniform(1, 100), num_blocks=128))
        rtts_s[peer(number)] = rng.uniform(0.001, 0.3)
    snapshot = Snapshot(announcements=tuple(servers))
    started_s = time.process_time()
    chain = find_chain(snapshot, Demand(model=MODEL, span=Span(0, 128)), rtts_s)
    assert time.process_time() - started_s < 0.5  # several times what it takes
    assert chain.span == Span(0, 128)
