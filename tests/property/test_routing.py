"""The chain is the cheapest there is; the chosen span is the weakest; servers that join together settle apart."""

import random
import time
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corolla.errors import NoChain
from corolla.routing import Demand, RoutingConfig, choose_span, claims_before, coverage, find_chain, uncovered
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


@given(snapshot=swarms(), length=st.integers(1, BLOCKS))
def test_the_chosen_span_is_the_weakest(snapshot, length):
    rates = coverage(snapshot, MODEL, BLOCKS)
    alternatives = [(sorted(rates[start : start + length]), start) for start in range(BLOCKS - length + 1)]
    assert choose_span(snapshot, MODEL, BLOCKS, length).start == min(alternatives)[1]
    assert len(choose_span(snapshot, MODEL, BLOCKS, length)) == length


@given(snapshot=swarms())
def test_coverage_sums_what_serves_or_will(snapshot):
    servers = [server for server in snapshot.announcements if server.model == MODEL and server.state != "draining"]
    rates = [server.speed.decode_tokens_per_s for server in servers if server.speed]
    usual = sum(rates) / len(rates) if rates else 1.0
    for block, rate in enumerate(coverage(snapshot, MODEL, BLOCKS)):
        here = [server for server in servers if block in server.span]
        assert rate == pytest.approx(
            sum(server.speed.decode_tokens_per_s if server.speed else usual for server in here)
        )


@pytest.mark.parametrize("length", [0, 7])
def test_a_span_longer_than_the_model_is_refused(length):
    with pytest.raises(ValueError, match=f"a span of {length} blocks cannot be chosen from a model of 6"):
        choose_span(Snapshot(announcements=()), MODEL, 6, length)


def settle(count, num_blocks, length, before=()):
    """Let servers that join together claim and look again, all at once, until each sees no reason to move."""
    claims, settled = {}, set()
    while len(settled) < count:
        joining = [announce(number, span, state="joining") for number, span in claims.items()]
        snapshot = Snapshot(announcements=(*before, *joining))
        chosen = {
            number: choose_span(claims_before(snapshot, peer(number)), MODEL, num_blocks, length)
            for number in range(count)
            if number not in settled
        }
        settled |= {number for number, span in chosen.items() if claims.get(number) == span}
        claims |= chosen
    return claims


@given(length=st.integers(1, 5), servers=st.integers(1, 8))
def test_servers_that_join_together_settle_on_disjoint_spans_that_cover_the_model(length, servers):
    claims = settle(servers, servers * length, length)
    assert sorted(claims.values()) == [Span(at * length, (at + 1) * length) for at in range(servers)]


@given(num_blocks=st.integers(1, 20), count=st.integers(1, 8), data=st.data())
def test_servers_that_join_together_settle_as_if_one_after_another(num_blocks, count, data):
    length = data.draw(st.integers(1, num_blocks))
    before = tuple(
        announce(100 + at, data.draw(spans(stop=num_blocks)), 2.0) for at in range(data.draw(st.integers(0, 3)))
    )
    one_by_one = {}
    for number in range(count):
        taken = [announce(other, span, state="joining") for other, span in one_by_one.items()]
        snapshot = Snapshot(announcements=(*before, *taken))
        one_by_one[number] = choose_span(snapshot, MODEL, num_blocks, length)
    assert settle(count, num_blocks, length, before) == one_by_one


def test_a_server_that_has_not_measured_itself_is_not_taken_for_a_weak_one():
    online = [announce(10 + at, Span(at, at + 1), 50.0) for at in range(1, 6)]
    joining = announce(0, Span(0, 1), state="joining")
    snapshot = Snapshot(announcements=(*online, joining))
    assert coverage(snapshot, MODEL, BLOCKS) == [50.0] * BLOCKS
