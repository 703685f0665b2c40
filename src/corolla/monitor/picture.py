"""A snapshot as people want to see it: models, blocks, servers, links, the bottleneck and what would help. Pure.

Everything here came from peers. Names lose what does not print, lists are bounded, and claimed speeds are bounded by
:mod:`corolla.routing`, so that a page or a terminal may show the result as it is.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from statistics import median_low
from typing import Final, Literal

import msgspec

from corolla.errors import NoChain
from corolla.routing import Demand, Measured, PlacementConfig, Sizes, choose_span, find_chain, predict_s, read_layout
from corolla.terms import (
    RTT_PEER_LETTERS,
    Address,
    Announcement,
    ModelId,
    PeerId,
    Precision,
    ServerState,
    Snapshot,
    Span,
)

__all__ = [
    "Answers",
    "HopView",
    "LinkView",
    "ModelView",
    "NextServer",
    "Picture",
    "ServerView",
    "draw",
    "model_title",
    "printable",
]

MAX_MODELS: Final = 32
"""Models in a picture, those of most servers first."""
MAX_SERVERS: Final = 512
"""Servers of a model in a picture, in the order of their spans; all count in its sums."""
MAX_LINKS: Final = 1024
MAX_NAME: Final = 64
_RELAY: Final = "relay:"

Reach = Literal["direct", "relayed", "unknown"]
"""How a server can be reached by its own account: dialled, through relays, or it does not say."""

Answers = Mapping[PeerId, float | None]
"""The round trip to each server that was measured, in seconds; ``None`` for one that did not answer."""


class ServerView(msgspec.Struct, frozen=True, kw_only=True):
    """One server.

    Args:
        peer: Who.
        name: What its owner calls it.
        span: Its blocks.
        next_span: Those that it is about to serve instead.
        state: What it is doing.
        progress: How much of its span it has loaded, from 0 to 1.
        precision: What it holds its weights in.
        adapters: Which it has.
        decode_tokens_per_s: For one session, over its span.
        prefill_tokens_per_s: For a prompt.
        free_tokens: KV tokens that it can still hold.
        sessions: That it serves.
        queue_s: How long a request waited lately.
        version: Of Corolla.
        reach: How it can be reached.
        is_relay: Whether it helps others to be reached.
        rtt_s: The way to it and back, if it answered.
        answers: Whether it did; ``None`` if nobody has asked yet.
        seen_s: For how long it has been seen without a break.
        addresses: Where to dial it; ``None`` if that is not to be shown.
    """

    peer: PeerId
    name: str
    span: Span
    next_span: Span | None
    state: ServerState
    progress: float
    precision: Precision
    adapters: tuple[str, ...]
    decode_tokens_per_s: float | None
    prefill_tokens_per_s: float | None
    free_tokens: int
    sessions: int
    queue_s: float
    version: str
    reach: Reach
    is_relay: bool
    rtt_s: float | None
    answers: bool | None
    seen_s: float
    addresses: tuple[Address, ...] | None


class LinkView(msgspec.Struct, frozen=True):
    """A round trip that one server measured to another."""

    source: PeerId
    target: PeerId
    rtt_s: float


class HopView(msgspec.Struct, frozen=True):
    """A server and the part of its span that a chain would use."""

    peer: PeerId
    span: Span


class NextServer(msgspec.Struct, frozen=True):
    """What one more server would bring, if it were like the usual one here.

    Args:
        span: The blocks that it would take.
        fills: How many blocks it would give their first server.
        before: Tokens a second of the weakest block without it, once all is loaded that is loading.
        after: The same with it.
    """

    span: Span
    fills: int
    before: float
    after: float


class ModelView(msgspec.Struct, frozen=True, kw_only=True):
    """One model.

    Args:
        model: Which weights.
        name: What most of its servers call it.
        blocks: How many it has.
        servers: Its servers.
        servers_total: How many there are, also beyond those listed.
        online: How many of them take sessions.
        rates: For each block, tokens a second of the servers online that have it.
        counts: For each block, how many those are.
        missing: How many blocks have none.
        bottleneck: The weakest blocks that lie together.
        tokens_per_s: Of the weakest block: what the whole swarm can do for many sessions.
        session_tokens_per_s: What one session would get, as seen from here; ``None`` if blocks are missing.
        chain: The servers that it would use.
        free_tokens: KV tokens that there is room for in every block.
        sessions: That there are, as far as can be told: the most through one block.
        next_server: What one more would bring.
        links: Ways between servers.
    """

    model: ModelId
    name: str
    blocks: int
    servers: tuple[ServerView, ...]
    servers_total: int
    online: int
    rates: tuple[float, ...]
    counts: tuple[int, ...]
    missing: int
    bottleneck: Span
    tokens_per_s: float
    session_tokens_per_s: float | None
    chain: tuple[HopView, ...]
    free_tokens: int
    sessions: int
    next_server: NextServer
    links: tuple[LinkView, ...]


class Picture(msgspec.Struct, frozen=True, kw_only=True):
    """A swarm at one time.

    Args:
        at_s: When, in seconds since 1970.
        age_s: How old the view is; ``None`` if the swarm was never seen.
        models: Those of most servers first.
        models_total: How many there are, also beyond those listed.
        relays: Peers that help others to be reached.
        versions: How many servers run which version of Corolla.
    """

    at_s: float
    age_s: float | None
    models: tuple[ModelView, ...] = ()
    models_total: int = 0
    relays: int = 0
    versions: dict[str, int] = {}


def printable(text: str, limit: int = MAX_NAME) -> str:
    """Keep of a peer's text what prints, so nothing that commands a terminal or turns the reading direction."""
    return "".join(letter for letter in text if letter.isprintable())[:limit]


def model_title(name: str) -> str:
    """Give what to call a model by its servers' name of it; of a path on somebody's disk, the end says enough."""
    shown = printable(name, 128)
    is_path = shown.startswith(("/", "~", ".")) or "\\" in shown
    return shown.replace("\\", "/").rstrip("/").rpartition("/")[2] if is_path else shown


def draw(
    snapshot: Snapshot,
    at_s: float,
    *,
    answers: Answers,
    since_s: Mapping[PeerId, float],
    show_addresses: bool = False,
) -> Picture:
    """Draw a picture of a snapshot.

    Args:
        snapshot: Of the swarm.
        at_s: When it was taken, in seconds since 1970.
        answers: What was measured of the ways to servers.
        since_s: Since when each server has been seen without a break.
        show_addresses: Whether the picture says where servers can be dialled.
    """
    by_model: dict[ModelId, list[Announcement]] = defaultdict(list)
    for server in snapshot.announcements:
        by_model[server.model].append(server)
    chosen = sorted(by_model.values(), key=lambda servers: (-len(servers), servers[0].model))[:MAX_MODELS]

    def view(server: Announcement) -> ServerView:
        seen_s = max(0.0, at_s - since_s.get(server.peer, at_s))
        return _draw_server(server, answers, seen_s, show_addresses)

    versions = Counter(printable(server.version) for server in snapshot.announcements)
    relays = sum(server.is_relay for server in snapshot.announcements) + len(snapshot.relay_offers)
    return Picture(
        at_s=at_s,
        age_s=None if snapshot.age_s == float("inf") else round(snapshot.age_s, 1),
        models=tuple(_draw_model(servers, answers, [*map(view, _listed(servers))]) for servers in chosen),
        models_total=len(by_model),
        relays=relays,
        versions=dict(versions.most_common(MAX_MODELS)),
    )


def _listed(servers: Sequence[Announcement]) -> list[Announcement]:
    return sorted(servers, key=lambda one: (one.span, one.peer))[:MAX_SERVERS]


def _draw_server(server: Announcement, answers: Answers, seen_s: float, show_addresses: bool) -> ServerView:
    direct = [address for address in server.addresses if not address.startswith(_RELAY)]
    speed = server.speed
    reach: Reach = "direct" if direct else "relayed" if server.addresses else "unknown"
    return ServerView(
        peer=server.peer,
        name=printable(server.name),
        span=server.span,
        next_span=server.next_span,
        state=server.state,
        progress=round(server.progress, 3),
        precision=server.precision,
        adapters=tuple(printable(name) for name in server.adapters),
        decode_tokens_per_s=None if speed is None else round(speed.decode_tokens_per_s, 2),
        prefill_tokens_per_s=None if speed is None else round(speed.prefill_tokens_per_s, 1),
        free_tokens=server.free_tokens,
        sessions=server.sessions,
        queue_s=server.queue_s,
        version=printable(server.version),
        reach=reach,
        is_relay=server.is_relay,
        rtt_s=answers.get(server.peer),
        answers=answers[server.peer] is not None if server.peer in answers else None,
        seen_s=round(seen_s),
        addresses=tuple(Address(printable(address, 256)) for address in server.addresses) if show_addresses else None,
    )


def _draw_model(servers: Sequence[Announcement], answers: Answers, views: list[ServerView]) -> ModelView:
    blocks = Counter(server.num_blocks for server in servers).most_common(1)[0][0]
    fitting = [server for server in servers if server.num_blocks == blocks and server.span.stop <= blocks]
    online = [msgspec.structs.replace(server, next_span=None) for server in fitting if server.state == "online"]
    model = servers[0].model
    rates = _rates(online, model, blocks)
    weakest = min(rates)
    chain, session_tokens_per_s = _find_chain(online, model, blocks, answers)
    return ModelView(
        model=model,
        name=model_title(Counter(server.model_name for server in servers).most_common(1)[0][0]),
        blocks=blocks,
        servers=tuple(views),
        servers_total=len(servers),
        online=len(online),
        rates=tuple(round(rate, 2) for rate in rates),
        counts=(counts := _sums(online, blocks, (1 for _ in online))),
        missing=counts.count(0),
        bottleneck=_first_stretch(rates, weakest),
        tokens_per_s=round(weakest, 2),
        session_tokens_per_s=session_tokens_per_s,
        chain=chain,
        free_tokens=min(_sums(online, blocks, (server.free_tokens for server in online))),
        sessions=max(_sums(online, blocks, (server.sessions for server in online))),
        next_server=_next_server(fitting, model, blocks),
        links=_links(servers),
    )


def _rates(servers: Sequence[Announcement], model: ModelId, blocks: int) -> list[float]:
    if not servers:
        return [0.0] * blocks
    sizes = Sizes([1] * blocks)  # which blocks are larger only those know who have the model
    layout = read_layout(Snapshot(announcements=tuple(servers)), model, sizes, PlacementConfig().max_claim)
    return layout.rates()


def _sums(servers: Sequence[Announcement], blocks: int, values: Iterable[int]) -> tuple[int, ...]:
    """Sum up, for each block, what the servers that have it give."""
    changes = [0] * (blocks + 1)
    for server, value in zip(servers, values, strict=True):
        changes[server.span.start] += value
        changes[server.span.stop] -= value
    return tuple(accumulate(changes[:-1]))


def _first_stretch(rates: Sequence[float], weakest: float) -> Span:
    """Give the first blocks in a row that are about as weak as the weakest."""
    limit = weakest * 1.001
    start = next(block for block, rate in enumerate(rates) if rate <= limit)
    stop = next((block for block in range(start, len(rates)) if rates[block] > limit), len(rates))
    return Span(start, stop)


def _find_chain(
    online: Sequence[Announcement], model: ModelId, blocks: int, answers: Answers
) -> tuple[tuple[HopView, ...], float | None]:
    demand = Demand(model=model, span=Span(0, blocks), is_pushed=True)
    known = {peer: Measured(rtt_s=rtt_s) for peer, rtt_s in answers.items() if rtt_s is not None}
    snapshot = Snapshot(announcements=tuple(online))
    try:
        chain = find_chain(snapshot, demand, known)
    except NoChain:
        return (), None
    token_s = predict_s(chain, snapshot, demand, known)
    return tuple(HopView(hop.peer, hop.span) for hop in chain.hops), round(1 / max(token_s, 1e-6), 2)


def _next_server(servers: Sequence[Announcement], model: ModelId, blocks: int) -> NextServer:
    snapshot = Snapshot(announcements=tuple(servers))
    usual = median_low([len(server.span) for server in servers]) if servers else blocks
    span = choose_span(snapshot, model, [1] * blocks, usual)
    layout = read_layout(snapshot, model, Sizes([1] * blocks), PlacementConfig().max_claim)
    rate = layout.newcomer(usual).power / len(span)
    before = layout.rates() if servers else [0.0] * blocks
    after = [value + rate * (block in span) for block, value in enumerate(before)]
    fills = sum(before[block] == 0 for block in span.indices)
    return NextServer(span, fills, round(min(before), 2), round(min(after), 2))


def _links(servers: Sequence[Announcement]) -> tuple[LinkView, ...]:
    by_letters = {server.peer[:RTT_PEER_LETTERS]: server.peer for server in servers}
    found = [
        LinkView(server.peer, by_letters[rtt.peer], rtt.rtt_s)
        for server in servers
        for rtt in server.rtts
        if rtt.peer in by_letters
    ]
    return tuple(sorted(found, key=lambda link: -link.rtt_s)[:MAX_LINKS])
