"""The glossary as frozen types: the words that every room shares, and nothing that acts.

Knows no torch, clock, socket or file. Everything here may travel over the wire, so everything validates itself when
made.
"""

from typing import Annotated, Literal, NewType

import msgspec
from msgspec import Meta

__all__ = [
    "Address",
    "Announcement",
    "Chain",
    "Claim",
    "DType",
    "Hop",
    "ModelId",
    "PeerId",
    "Precision",
    "RelayOffer",
    "Rtt",
    "ServerState",
    "Snapshot",
    "Span",
    "Speed",
]

PeerId = NewType("PeerId", str)
"""A network identity: the 32 bytes of an Ed25519 public key in lower-case base32 without padding, 52 characters."""

ModelId = NewType("ModelId", str)
"""What a set of weights is: the SHA-256 of its manifest, 64 hexadecimal digits."""

Address = NewType("Address", str)
"""Where a peer listens, by transport: ``tls://192.0.2.7:4001``."""

DType = Literal["float32", "bfloat16", "float16"]
"""A number format of tensors."""

Precision = Literal["float32", "bfloat16", "float16", "int8", "nf4"]
"""What a server holds its weights in: a number format, or one that rounds them and computes in bfloat16."""

ServerState = Literal["joining", "online", "draining"]
"""Loading its span; serving; finishing what it has before it leaves."""

PEER_ID_PATTERN = r"^[a-z2-7]{52}$"
MODEL_ID_PATTERN = r"^[0-9a-f]{64}$"
MAX_BLOCKS = 4096
"""More blocks than any model has: a bound on what a peer may claim."""
MAX_RTTS = 8
"""Round trips to other servers in one announcement."""
RTT_PEER_LETTERS = 8
"""How many letters of a peer's id stand for it there; whom they deceive is only misled about one latency."""

_PeerId = Annotated[PeerId, Meta(pattern=PEER_ID_PATTERN)]
_ModelId = Annotated[ModelId, Meta(pattern=MODEL_ID_PATTERN)]
_Count = Annotated[int, Meta(ge=0, le=2**53)]
_Rate = Annotated[float, Meta(ge=0, le=1e12)]
_Name = Annotated[str, Meta(max_length=128)]


class Span(msgspec.Struct, frozen=True, order=True, array_like=True):
    """A half-open range of a model's blocks: ``Span(4, 8)`` is blocks 4, 5, 6 and 7.

    Args:
        start: The first block.
        stop: One past the last block; greater than ``start``.

    Raises:
        ValueError: If the range is empty, negative or absurdly long.
    """

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop <= MAX_BLOCKS:
            raise ValueError(f"a span needs 0 <= start < stop <= {MAX_BLOCKS}, not {self.start}:{self.stop}")

    def __len__(self) -> int:
        return self.stop - self.start

    def __contains__(self, block: int) -> bool:
        return self.start <= block < self.stop

    def __str__(self) -> str:
        return f"{self.start}:{self.stop}"

    @property
    def indices(self) -> range:
        """Its blocks, in order."""
        return range(self.start, self.stop)

    def covers(self, other: "Span") -> bool:
        """Say whether every block of ``other`` is in this span."""
        return self.start <= other.start and other.stop <= self.stop

    @classmethod
    def parse(cls, text: str) -> "Span":
        """Read ``start:stop``.

        Raises:
            ValueError: If the text is not two numbers around a colon, or they make no span.
        """
        start, colon, stop = text.partition(":")
        if not (colon and start.strip().isdecimal() and stop.strip().isdecimal()):
            raise ValueError(f"a span is written start:stop, as in 0:16, not {text!r}")
        return cls(int(start), int(stop))


class Speed(msgspec.Struct, frozen=True, kw_only=True):
    """What a server measured of itself, over its whole span.

    Args:
        decode_tokens_per_s: One session, one token a step.
        prefill_tokens_per_s: One long prompt.
    """

    decode_tokens_per_s: _Rate
    prefill_tokens_per_s: _Rate


class Rtt(msgspec.Struct, frozen=True, array_like=True):
    """A server's measurement of the way to another one.

    Args:
        peer: The first letters of the other's id; announcements must be short.
        rtt_s: The round trip between the two.
    """

    peer: Annotated[str, Meta(pattern=f"^[a-z2-7]{{{RTT_PEER_LETTERS}}}$")]
    rtt_s: Annotated[float, Meta(ge=0, le=60)]


class Announcement(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A server's claim about itself, valid until it expires or a later one replaces it.

    It travels signed by ``peer``; see ``swarm/directory/directory.py``.

    Args:
        peer: Who claims.
        sequence: Rises with every announcement of this peer; the highest wins.
        ttl_s: For how many seconds after it was made the claim holds.
        model: Which weights.
        model_name: How its owner calls the model; for people only.
        num_blocks: How many blocks the whole model has.
        span: Which of them it serves, or will once it has joined.
        state: Whether it takes sessions.
        next_span: Which blocks it is about to serve instead; ``None`` if it stays.
        move_s: How long it would be away if it took another span; ``None`` if it takes none.
        progress: How much of its span it has loaded, from 0 to 1.
        precision: What it holds its weights in.
        addresses: Where to dial it, cheapest first.
        speed: Measured throughput; ``None`` before it has been measured.
        free_tokens: How many more tokens its KV pool can hold.
        sessions: How many sessions it serves now.
        queue_s: How long a request waited lately before it was computed.
        rtts: Round trips to servers that are likely to follow it in a chain.
        bytes_per_s: How fast it can send; ``None`` before it has been measured.
        adapters: The names of the adapters that it has.
        version: The release of Corolla that it runs.
        name: What its owner calls it; for people only.
        membership: In a private swarm, the proof that it belongs there.
        is_relay: Whether it helps others to be reached.
    """

    peer: _PeerId
    sequence: _Count
    ttl_s: Annotated[float, Meta(gt=0, le=3600)]
    model: _ModelId
    model_name: _Name
    num_blocks: Annotated[int, Meta(gt=0, le=MAX_BLOCKS)]
    span: Span
    state: ServerState
    next_span: Span | None = None
    move_s: Annotated[float, Meta(ge=0, le=86400)] | None = None
    progress: Annotated[float, Meta(ge=0, le=1)] = 0.0
    precision: Precision
    addresses: Annotated[tuple[Annotated[Address, Meta(max_length=256)], ...], Meta(max_length=16)]
    speed: Speed | None = None
    free_tokens: _Count = 0
    sessions: _Count = 0
    queue_s: Annotated[float, Meta(ge=0, le=3600)] = 0.0
    rtts: Annotated[tuple[Rtt, ...], Meta(max_length=MAX_RTTS)] = ()
    bytes_per_s: _Rate | None = None
    adapters: Annotated[tuple[_Name, ...], Meta(max_length=16)] = ()
    version: _Name = ""
    name: _Name = ""
    membership: Annotated[bytes, Meta(max_length=512)] = b""
    is_relay: bool = False


class RelayOffer(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The claim of a peer that serves no blocks and helps others to be reached; else like an :class:`Announcement`.

    Args:
        peer: Who claims.
        sequence: As there.
        ttl_s: As there.
        addresses: Where to dial it.
        version: The release of Corolla that it runs.
        name: What its owner calls it; for people only.
        membership: As there.
    """

    peer: _PeerId
    sequence: _Count
    ttl_s: Annotated[float, Meta(gt=0, le=3600)]
    addresses: Annotated[tuple[Annotated[Address, Meta(max_length=256)], ...], Meta(max_length=16)]
    version: _Name = ""
    name: _Name = ""
    membership: Annotated[bytes, Meta(max_length=512)] = b""


Claim = Announcement | RelayOffer
"""What a peer may say of itself to all others."""


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """An immutable view of the live announcements at one time.

    Args:
        announcements: At most one for each peer.
        relay_offers: Of peers that serve no blocks; servers say so in their announcements.
        age_s: Seconds since the directory was last known to be in step with the swarm.
    """

    announcements: tuple[Announcement, ...]
    relay_offers: tuple[RelayOffer, ...] = ()
    age_s: float = 0.0


class Hop(msgspec.Struct, frozen=True, kw_only=True):
    """One peer and the part of its span that a chain uses."""

    peer: _PeerId
    span: Span
    addresses: tuple[Address, ...]


class Chain(msgspec.Struct, frozen=True):
    """Ordered hops that cover a span of blocks, each block once.

    Raises:
        ValueError: If there is no hop, or two neighbours do not meet.
    """

    hops: tuple[Hop, ...]

    def __post_init__(self) -> None:
        if not self.hops:
            raise ValueError("a chain needs at least one hop")
        for left, right in zip(self.hops, self.hops[1:], strict=False):
            if left.span.stop != right.span.start:
                raise ValueError(f"hops {left.span} and {right.span} do not meet")

    @property
    def span(self) -> Span:
        """All blocks that the chain covers."""
        return Span(self.hops[0].span.start, self.hops[-1].span.stop)
