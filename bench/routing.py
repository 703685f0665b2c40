"""How long it takes to choose chains, and how good the choice is, in simulated swarms.

The model has 128 blocks. Each server has 16 to 48 of them, anywhere, decodes 1 to 100 tokens a second, prefills ten
times as many, is 1 to 300 ms from the client, and announces the round trips to eight servers that can follow it.
"""

import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from msgspec import structs

from bench.report import Row, write_report
from corolla.routing import Demand, Known, Measured, candidates, find_chain, find_chains
from corolla.terms import MAX_RTTS, RTT_PEER_LETTERS, Announcement, ModelId, PeerId, Rtt, Snapshot, Span, Speed

__all__ = ["main"]

MODEL = ModelId("0" * 64)
BLOCKS = 128
SIZES = (100, 1_000, 10_000)
LETTERS = "abcdefghijklmnopqrstuvwxyz234567"
GENERATION = Demand(
    model=MODEL, span=Span(0, BLOCKS), tokens=1000, prompt_tokens=200, decode_steps=200, token_bytes=16384
)
PUSHED = replace(GENERATION, is_pushed=True)
TRAINING = Demand(model=MODEL, span=Span(0, BLOCKS), prompt_tokens=4096, decode_steps=0, token_bytes=16384)
CHAINS = 8
ROUNDS = 9


def main() -> None:
    """Print the table and write the report."""
    rows: list[Row] = []
    for size in SIZES:
        rows += times(size)
    rows += [*quality(), *herding()]
    write_report("routing", rows, "Choosing chains through 128 blocks in simulated swarms: CPU time of one thread")


def times(size: int) -> list[Row]:
    """Say how long choices take in a swarm of some size."""
    snapshot, known = make_swarm(size)
    choices: dict[str, Callable[[], object]] = {
        "least latency": lambda: find_chain(snapshot, GENERATION, known, rng=random.Random(0)),
        "least latency with pushes": lambda: find_chain(snapshot, PUSHED, known, rng=random.Random(0)),
        f"{CHAINS} chains at once": lambda: find_chains(snapshot, TRAINING, known, limit=CHAINS),
        "whom to measure": lambda: candidates(snapshot, GENERATION, known),
    }
    return [Row(f"{name}, {size:,} servers", time_ms(choose), "ms") for name, choose in choices.items()]


def make_swarm(size: int, seed: int = 0) -> tuple[Snapshot, Known]:
    """Make servers, and what a client measured of them."""
    rng = random.Random(seed)
    spans: list[Span] = []
    for number in range(size):
        length = rng.randint(16, 48)
        # The first ones stand end to end, so that every block has a server however small the swarm is.
        start = 16 * number if 16 * (number + 1) <= BLOCKS else rng.randint(0, BLOCKS - length)
        spans.append(Span(start, min(start + length, BLOCKS)))
    announcements, known = [], {}
    for number, span in enumerate(spans):
        speed = rng.uniform(1, 100)
        announcements.append(
            Announcement(
                peer=peer(number),
                sequence=1,
                ttl_s=10.0,
                model=MODEL,
                model_name="",
                num_blocks=BLOCKS,
                span=span,
                state="online",
                precision="bfloat16",
                addresses=(),
                speed=Speed(decode_tokens_per_s=speed, prefill_tokens_per_s=10 * speed),
                free_tokens=100_000,
                bytes_per_s=rng.uniform(1e6, 1e8),
                rtts=tuple(successors(number, spans, rng)),
            )
        )
        known[peer(number)] = Measured(rtt_s=rng.uniform(0.001, 0.3))
    return Snapshot(announcements=tuple(announcements)), known


def successors(number: int, spans: Sequence[Span], rng: random.Random) -> list[Rtt]:
    """Give round trips to servers that can go on where one ends."""
    sample = rng.sample(range(len(spans)), min(len(spans), 400))
    following = [other for other in sample if other != number and spans[number].stop in spans[other]]
    return [Rtt(peer(other)[:RTT_PEER_LETTERS], rng.uniform(0.001, 0.1)) for other in following[:MAX_RTTS]]


def peer(number: int) -> PeerId:
    """Make a peer id."""
    return PeerId("".join(LETTERS[number // 32**place % 32] for place in range(4)).ljust(52, "a"))


def time_ms(choose: Callable[[], object]) -> float:
    """Take the median CPU time of some calls; other programs do not count."""
    times_s = []
    for _ in range(ROUNDS):
        started_s = time.process_time()
        choose()
        times_s.append(time.process_time() - started_s)
    return 1000 * statistics.median(times_s)


def quality() -> list[Row]:
    """Say what several chains bring, in a swarm of a thousand."""
    snapshot, known = make_swarm(1_000)
    lanes = find_chains(snapshot, TRAINING, known, limit=CHAINS)
    (single,) = find_chains(snapshot, TRAINING, known, limit=1)
    together = sum(lane.requests_per_s for lane in lanes)
    return [
        Row("1,000 servers: rate of several chains", together, "1/s", "one chain", together / single.requests_per_s),
    ]


def herding() -> list[Row]:
    """Let a hundred clients choose among four equal servers."""
    alike = Speed(decode_tokens_per_s=10.0, prefill_tokens_per_s=100.0)
    servers = [
        structs.replace(one, span=Span(0, BLOCKS), speed=alike, bytes_per_s=1e7)
        for one in make_swarm(100)[0].announcements[:4]
    ]
    snapshot = Snapshot(announcements=tuple(servers))
    chosen = Counter(find_chain(snapshot, GENERATION, {}, rng=random.Random(seed)).hops[0].peer for seed in range(100))
    return [
        Row("most clients of 100 at one of 4 equal servers", max(chosen.values()), ""),
        Row("fewest clients of 100 at one of 4 equal servers", min(chosen.values()), ""),
    ]


if __name__ == "__main__":
    main()
