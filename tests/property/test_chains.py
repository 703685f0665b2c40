"""The chain is the cheapest there is, however it is searched; chains used at once carry almost what is possible."""

import random
import time
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corolla.errors import NoChain
from corolla.routing import Demand, Lane, Measured, RoutingConfig, find_chain, find_chains, predict_s, split, uncovered
from corolla.routing.chain import make_stays
from corolla.routing.costs import offers
from corolla.routing.sweep import Sweeper, _sweep
from corolla.terms import RTT_PEER_LETTERS, Announcement, ModelId, PeerId, Rtt, Snapshot, Span, Speed

MODEL, OTHER = ModelId("0" * 64), ModelId("1" * 64)
BLOCKS = 6
CONFIG = RoutingConfig()
LETTERS = "abcdefghijklmnopqrstuvwxyz234567"


def peer(number):
    return PeerId("".join(LETTERS[number // 32**place % 32] for place in (2, 1, 0)).ljust(52, "a"))


def announce(number, span, speed=None, **claims):
    measured = None if speed is None else Speed(decode_tokens_per_s=speed, prefill_tokens_per_s=8 * speed)
    usual = {"model": MODEL, "num_blocks": BLOCKS, "state": "online", "precision": "float32", "free_tokens": 100}
    claim = partial(Announcement, sequence=1, ttl_s=10, model_name="", addresses=())
    return claim(peer=peer(number), span=span, speed=measured, **usual | claims)


@st.composite
def spans(draw, stop=BLOCKS):
    start = draw(st.integers(0, stop - 1))
    return Span(start, draw(st.integers(start + 1, stop)))


ROUND_TRIPS = st.dictionaries(st.integers(0, 5).map(peer), st.floats(0, 0.5), max_size=5)


@st.composite
def swarms(draw):
    servers = [
        announce(
            number,
            draw(spans()),
            draw(st.sampled_from([None, 0.0, 5e-324, 1.0, 7.5, 40.0])),
            model=draw(st.sampled_from([MODEL] * 5 + [OTHER])),
            state=draw(st.sampled_from(["online"] * 4 + ["joining", "draining"])),
            precision=draw(st.sampled_from(["float32", "bfloat16"])),
            free_tokens=draw(st.sampled_from([5, 100])),
            sessions=draw(st.integers(0, 9)),
            queue_s=draw(st.sampled_from([0.0, 0.5])),
            bytes_per_s=draw(st.sampled_from([None, 0.0, 1e6])),
            adapters=draw(st.sampled_from([(), ("pirate",)])),
            rtts=tuple(Rtt(who[:RTT_PEER_LETTERS], rtt_s) for who, rtt_s in draw(ROUND_TRIPS).items()),
        )
        for number in range(draw(st.sampled_from([0, 1, 3, 5, 6])))
    ]
    return Snapshot(announcements=tuple(servers), age_s=draw(st.sampled_from([0.0, 12.3])))


DEMANDS = st.builds(
    Demand,
    model=st.just(MODEL),
    span=spans(),
    tokens=st.sampled_from([0, 50]),
    prompt_tokens=st.sampled_from([0, 100]),
    decode_steps=st.integers(1, 20),
    rows=st.integers(1, 2),
    token_bytes=st.sampled_from([0, 2048]),
    precision=st.sampled_from([None, "float32"]),
    adapter=st.sampled_from([None, None, "pirate"]),
    allow=st.sampled_from([(), (), [peer(0), peer(1), peer(3)]]),
    avoid=st.sampled_from([(), (peer(0),), [peer(1), peer(2)]]),
    trusted=st.sampled_from([(), [peer(0), peer(2)]]),
    trust=st.sampled_from(["any", "any", "ends", "all"]),
    is_pushed=st.booleans(),
)
TIMES = st.none() | st.floats(0, 0.5)
KNOWN = st.dictionaries(
    st.integers(0, 5).map(peer), st.builds(Measured, TIMES, TIMES, TIMES, TIMES, st.none() | st.floats(1, 1e6))
)


# What the documentation says a chain costs, in its own words and by the shortest way to write them.


def allows(server, demand, block):
    is_trusted = (
        demand.trust == "any"
        or server.peer in demand.trusted
        or (demand.trust == "ends" and 0 < block < server.num_blocks - 1)
    )
    return (
        (server.model, server.state) == (demand.model, "online")
        and demand.precision in (None, server.precision)
        and (demand.adapter is None or demand.adapter in server.adapters)
        and server.free_tokens >= demand.tokens
        and server.peer not in demand.avoid
        and (not demand.allow or server.peer in demand.allow)
        and is_trusted
        and block in server.span
    )


def chains(servers, demand, start, stop):
    """Every way to cut the blocks into hops, with every server for each."""
    if start == stop:
        yield []
    for server in servers:
        for end in range(start + 1, stop + 1):
            if not allows(server, demand, end - 1):
                break
            for rest in chains(servers, demand, end, stop):
                yield [(server, Span(start, end)), *rest]


def or_else(value, other):
    return other if value is None else value


def way_s(server, demand, known):
    found = known.get(server.peer, Measured())
    bytes_per_s = or_else(found.bytes_per_s, or_else(server.bytes_per_s, 12.5e6))
    steps = demand.decode_steps + bool(demand.prompt_tokens)
    nbytes = (demand.prompt_tokens + demand.rows * demand.decode_steps) * demand.token_bytes
    return steps * or_else(found.rtt_s, 0.1) / 2 + nbytes / max(bytes_per_s, 1)


def saved_s(left, right, demand, known):
    claimed = [rtt.rtt_s for rtt in left.rtts if right.peer.startswith(rtt.peer)]
    if not demand.is_pushed or not claimed or left is right:
        return 0.0
    rtts_s = [known.get(server.peer, Measured()).rtt_s for server in (left, right)]
    possible_s = 0.0 if None in rtts_s else abs(rtts_s[0] - rtts_s[1])
    steps = demand.decode_steps + bool(demand.prompt_tokens)
    by_client_s = sum(or_else(rtt_s, 0.1) for rtt_s in rtts_s)
    return max(0.0, steps * (by_client_s - max(claimed[0], possible_s)) / 2)


def cost(hops, demand, known):
    total_s, steps = 0.0, demand.decode_steps + bool(demand.prompt_tokens)
    for server, span in hops:
        found = known.get(server.peer, Measured())
        total_s += 2 * way_s(server, demand, known) + steps * (max(found.queue_s or 0.0, server.queue_s) + 0.002)
        decode_s = prefill_s = 0.01
        if server.speed is not None:
            load = 1 + server.sessions / 4
            decode_s = load / (max(server.speed.decode_tokens_per_s, 0.001) * len(server.span))
            prefill_s = load / (max(server.speed.prefill_tokens_per_s, 0.001) * len(server.span))
        block_s = demand.decode_steps * or_else(found.decode_block_s, decode_s)
        block_s += demand.prompt_tokens * or_else(found.prefill_block_s, prefill_s)
        total_s += len(span) * block_s
    for (left, _), (right, _) in zip(hops, hops[1:], strict=False):
        total_s -= saved_s(left, right, demand, known)
    return total_s


@settings(max_examples=400)
@given(snapshot=swarms(), demand=DEMANDS, known=KNOWN, seed=st.integers(0, 9))
def test_the_chain_is_the_cheapest_there_is(snapshot, demand, known, seed):
    servers = {server.peer: server for server in snapshot.announcements}
    all_chains = list(chains(snapshot.announcements, demand, demand.span.start, demand.span.stop))
    if not all_chains:
        with pytest.raises(NoChain) as caught:
            find_chain(snapshot, demand, known)
        check_refusal(caught.value, snapshot, demand)
        return
    lowest_s = min(cost(hops, demand, known) for hops in all_chains)
    for rng, most_s in ((None, lowest_s), (random.Random(seed), lowest_s * (1 + CONFIG.spread))):
        chain = find_chain(snapshot, demand, known, rng=rng)
        hops = [(servers[hop.peer], hop.span) for hop in chain.hops]
        assert chain.span == demand.span
        assert hops in all_chains
        assert cost(hops, demand, known) <= most_s * (1 + 1e-9) + 1e-9
        assert predict_s(chain, snapshot, demand, known) == pytest.approx(cost(hops, demand, known))


def check_refusal(error, snapshot, demand):
    blocks = range(demand.span.start, demand.span.stop)
    missing = [block for block in blocks if not any(allows(one, demand, block) for one in snapshot.announcements)]
    gaps = uncovered(snapshot, demand)
    assert [block for gap in gaps for block in range(gap.start, gap.stop)] == missing
    assert all(left.stop < right.start for left, right in zip(gaps, gaps[1:], strict=False))
    assert f"no server for blocks {' and '.join(map(str, gaps))} of model" in error.message
    assert f"the view is {snapshot.age_s:.0f} s old" in error.message


def test_a_refusal_names_every_gap_what_was_wished_and_how_old_the_view_is():
    servers = [announce(0, Span(1, 2)), announce(1, Span(4, 5)), announce(2, Span(0, 6), free_tokens=3)]
    demand = Demand(model=MODEL, span=Span(0, 6), tokens=7, precision="float32", avoid=[peer(9)])
    with pytest.raises(NoChain) as caught:
        find_chain(Snapshot(announcements=tuple(servers), age_s=42), demand, {})
    assert caught.value.message == (
        "no server for blocks 0:1 and 2:4 and 5:6 of model 000000000000 (with 7 free KV tokens, precision float32, "
        "1 peers avoided); 3 servers of the model are known, the view is 42 s old; wait, or serve them: "
        "corolla serve MODEL --blocks 0:1"
    )


# Large swarms: leaving servers out changes nothing


def large_swarm(seed, servers, blocks=32):
    """Servers of all sorts, or all alike, and what a client measured of most of them."""
    rng = random.Random(seed)
    longest, is_uniform = rng.choice([4, 16, blocks]), rng.random() < 0.3
    announcements, known = [], {}
    for number in range(servers):
        length = rng.randint(1, longest)
        start = rng.randint(0, blocks - length)
        speed = 10.0 if is_uniform else rng.uniform(1, 100)
        announcements.append(announce(number, Span(start, start + length), speed, num_blocks=blocks))
        if rng.random() < 0.8:
            known[peer(number)] = Measured(rtt_s=0.05 if is_uniform else rng.uniform(0.001, 0.3))
    return Snapshot(announcements=tuple(announcements)), known


@settings(max_examples=50)
@given(seed=st.integers(0, 10**6), steps=st.integers(0, 20), is_shaken=st.booleans())
def test_looking_at_few_servers_finds_what_looking_at_all_does(seed, steps, is_shaken):
    snapshot, known = large_swarm(seed, 400)
    demand = Demand(model=MODEL, span=Span(3, 30), prompt_tokens=20 - steps, decode_steps=steps)
    stays = make_stays(offers(snapshot, demand), demand, known, CONFIG)
    rng = random.Random(seed)
    for stay in stays:
        stay.raise_cost(1 + 0.1 * rng.random() * is_shaken)
    _, reached_s = _sweep(stays, demand.span)
    sweeper = Sweeper(stays, demand.span)
    assert len(sweeper._few) < len(stays)
    assert total_s(sweeper.find(), demand) == pytest.approx(reached_s[-1])
    for stay in rng.sample(stays, 50):
        stay.raise_cost(3)  # as prices rise while several chains are searched
    _, reached_s = _sweep(stays, demand.span)
    assert total_s(sweeper.find(), demand) == pytest.approx(reached_s[-1])


def total_s(way, demand):
    return sum(
        stay.enter_s + (stop - start) * stay.block_s + stay.leave_s for stay, start, stop in way.hops(demand.span.stop)
    )


@pytest.mark.parametrize("longest", [16, 64])
def test_a_chain_through_ten_thousand_servers_is_found_at_once(longest):
    rng = random.Random(0)
    servers, known = [], {}
    for number in range(10_000):
        length = rng.randint(1, longest)
        start = rng.randint(0, 128 - length)
        servers.append(announce(number, Span(start, start + length), rng.uniform(1, 100), num_blocks=128))
        known[peer(number)] = Measured(rtt_s=rng.uniform(0.001, 0.3))
    snapshot = Snapshot(announcements=tuple(servers))
    times_s = []
    for _ in range(3):
        started_s = time.process_time()
        chain = find_chain(snapshot, Demand(model=MODEL, span=Span(0, 128)), known, rng=rng)
        times_s.append(time.process_time() - started_s)
    assert min(times_s) < 0.5  # ten times what it takes on a quiet machine; bench/routing.py measures it
    assert chain.span == Span(0, 128)


# Several chains at once


TRAINING = Demand(model=MODEL, span=Span(0, 4), prompt_tokens=64, decode_steps=0, token_bytes=1000)


@st.composite
def small_swarms(draw):
    servers = [
        announce(number, draw(spans(4)), draw(st.floats(0.5, 20)), num_blocks=4)
        for number in range(draw(st.integers(1, 6)))
    ]
    return Snapshot(announcements=tuple(servers))


def columns(snapshot):
    """For every chain, how long it keeps each server busy with one request."""
    servers = list(snapshot.announcements)
    for hops in chains(servers, TRAINING, 0, 4):
        yield [sum(cost([(one, span)], TRAINING, {}) for one, span in hops if one is server) for server in servers]


def optimum(columns):
    """Solve the linear program: the greatest sum of rates at which no server is overloaded. The simplex method."""
    columns = list(columns)
    rows = [
        [column[at] for column in columns] + [float(at == other) for other in range(len(columns[0]))] + [1.0]
        for at in range(len(columns[0]))
    ]
    goal = [-1.0] * len(columns) + [0.0] * (len(rows) + 1)
    while (entering := next((at for at, value in enumerate(goal[:-1]) if value < -1e-9), None)) is not None:
        _, leaving = min((row[-1] / row[entering], at) for at, row in enumerate(rows) if row[entering] > 1e-9)
        pivot = [value / rows[leaving][entering] for value in rows[leaving]]
        rows = [
            pivot if at == leaving else [value - row[entering] * other for value, other in zip(row, pivot, strict=True)]
            for at, row in enumerate(rows)
        ]
        goal = [value - goal[entering] * other for value, other in zip(goal, pivot, strict=True)]
    return goal[-1]


def widest_first(columns):
    """Take the chain that carries most over what is left of the servers, again and again."""
    columns = list(columns)
    left, total = [1.0] * len(columns[0]), 0.0

    def width(column):
        return min(room / busy_s for room, busy_s in zip(left, column, strict=True) if busy_s)

    for _ in range(20):
        best = max(columns, key=width)
        rate = width(best)
        left = [max(0.0, room - rate * busy_s) for room, busy_s in zip(left, best, strict=True)]
        total += rate
    return total


def loads(snapshot, lanes):
    """Say which share of its time each server is busy."""
    servers = {server.peer: server for server in snapshot.announcements}
    busy = dict.fromkeys(servers, 0.0)
    for lane in lanes:
        for hop in lane.chain.hops:
            busy[hop.peer] += lane.requests_per_s * cost([(servers[hop.peer], hop.span)], TRAINING, {})
    return busy


@settings(max_examples=60, deadline=None)
@given(snapshot=small_swarms())
def test_chains_used_at_once_carry_almost_what_is_possible(snapshot):
    if uncovered(snapshot, TRAINING):
        with pytest.raises(NoChain):
            find_chains(snapshot, TRAINING, {}, limit=4)
        return
    best = optimum(columns(snapshot))
    lanes = find_chains(snapshot, TRAINING, {}, limit=16)
    assert max(loads(snapshot, lanes).values()) == pytest.approx(1.0)
    assert 0.97 * best <= sum(lane.requests_per_s for lane in lanes) <= best * 1.000001
    assert [lane.requests_per_s for lane in lanes] == sorted((lane.requests_per_s for lane in lanes), reverse=True)
    (single,) = find_chains(snapshot, TRAINING, {}, limit=1)
    assert 0 < single.requests_per_s <= best * 1.000001


def test_widest_first_stops_short_where_prices_do_not():
    """The whole model is at one server, and in halves at two that are almost as fast: the widest chain mixes them."""
    servers = [
        announce(0, Span(0, 4), 20.0, num_blocks=4),
        announce(1, Span(0, 2), 30.0, num_blocks=4),
        announce(2, Span(2, 4), 12.0, num_blocks=4),
    ]
    snapshot = Snapshot(announcements=tuple(servers))
    best = optimum(columns(snapshot))
    assert widest_first(columns(snapshot)) < 0.9 * best
    assert sum(lane.requests_per_s for lane in find_chains(snapshot, TRAINING, {}, limit=16)) > 0.98 * best


def test_at_least_one_chain_must_be_wanted():
    with pytest.raises(ValueError, match="0 chains were asked for"):
        find_chains(Snapshot(announcements=(announce(0, Span(0, 4)),)), TRAINING, {}, limit=0)


@given(st.integers(0, 200), st.lists(st.floats(0.01, 100), min_size=1, max_size=6))
def test_work_is_split_so_that_it_is_done_soonest(total, rates):
    lanes = [Lane(None, rate) for rate in rates]
    counts = split(total, lanes)
    assert sum(counts) == total
    done_s = max(count / rate for count, rate in zip(counts, rates, strict=True))
    assert done_s <= total / sum(rates) + 1 / min(rates)
    assert all((count + 1) / rate >= done_s * (1 - 1e-9) for count, rate in zip(counts, rates, strict=True))
