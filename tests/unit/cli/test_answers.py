import pytest

from corolla.cli.answers import Cost, describe_chain, describe_cost
from corolla.client import HopTiming, Replay
from corolla.terms import Chain, Hop, PeerId, Span

HOPS = (
    Hop(peer=PeerId("a" * 52), span=Span(0, 10), addresses=()),
    Hop(peer=PeerId("b" * 52), span=Span(10, 12), addresses=()),
)


def test_a_chain_is_written_as_peers_with_their_blocks():
    assert describe_chain(Chain(HOPS)) == "aaaaaaaa 0:10 -> bbbbbbbb 10:12"
    assert describe_chain(None) == "no chain yet"


@pytest.mark.parametrize(("rate", "shown"), [(12.34, ", 12.3 tokens/s"), (None, "")])
def test_a_cost_says_how_fast_and_where_the_time_went(rate, shown):
    timings = (HopTiming(HOPS[0], total_s=0.005, queue_s=0.001, compute_s=0.002),)
    cost = Cost(tokens=5, ttft_s=0.5, tokens_per_s=rate, chain=Chain(HOPS), timings=timings)
    assert describe_cost(cost).splitlines() == [
        f"[aaaaaaaa 0:10 -> bbbbbbbb 10:12] 5 tokens, first after 0.50 s{shown}",
        "[last step, ms of compute + network: aaaaaaaa 2.0 + 2.0]",
    ]


def test_a_cost_says_what_was_survived():
    timings = (HopTiming(HOPS[0], total_s=0.005, queue_s=0.001, compute_s=0.002),)
    replays = (Replay(HOPS[1], tokens=40, elapsed_s=0.25),)
    cost = Cost(tokens=5, ttft_s=0.5, tokens_per_s=None, chain=Chain(HOPS), timings=timings, replays=replays)
    last = describe_cost(cost).splitlines()[-1]
    assert last == "[a server was lost: bbbbbbbb took over 10:12, given 40 tokens in 0.25 s]"
