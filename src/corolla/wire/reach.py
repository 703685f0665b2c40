"""What peers say to each other so that all of them can be reached, also behind home routers.

A peer asks others how it is seen and whether it can be dialled. One that cannot be dialled keeps a stream to a relay
open, on which it hears of whoever wants to reach it; it answers each by a stream of its own, and the relay joins the
two. On the joined streams the two peers do their own handshake, so the relay carries what it cannot read. Then they may
try to find a way without it.
"""

from typing import Annotated, Final

from msgspec import Meta

from corolla.terms import PEER_ID_PATTERN, Address, PeerId
from corolla.wire.root import Message

__all__ = [
    "MAX_PUNCH_ADDRESSES",
    "REACH_MESSAGES",
    "Accept",
    "Connect",
    "Connected",
    "DialBack",
    "DialedBack",
    "Incoming",
    "Observe",
    "Observed",
    "Punch",
    "Punched",
    "ReachMessage",
    "Reserve",
    "Reserved",
]

MAX_PUNCH_ADDRESSES: Final = 2
"""How a side is seen from outside, and how it is known at home: more would make a peer knock at strangers' doors."""

_PeerId = Annotated[PeerId, Meta(pattern=PEER_ID_PATTERN)]
_Address = Annotated[Address, Meta(max_length=256)]
_Addresses = Annotated[tuple[_Address, ...], Meta(max_length=MAX_PUNCH_ADDRESSES)]
_Port = Annotated[int, Meta(ge=0, le=65535)]
_Ticket = Annotated[bytes, Meta(min_length=16, max_length=16)]


class ReachMessage(Message, frozen=True):
    """The root of these messages."""


class Observe(ReachMessage, frozen=True, tag=True):
    """Asks how the stream that it comes on looks from the other side; answered by :class:`Observed`."""


class Observed(ReachMessage, frozen=True, tag=True):
    """Answers :class:`Observe`.

    Args:
        host: The IP address that the stream seems to come from; empty if it came through a relay.
        port: The port that it seems to come from.
        unix_s: What time it is for the other side, in seconds since 1970; for people only, since clocks may be wrong.
    """

    host: Annotated[str, Meta(max_length=64)] = ""
    port: _Port = 0
    unix_s: Annotated[float, Meta(ge=0, le=1e12)] = 0.0


class DialBack(ReachMessage, frozen=True, tag=True):
    """Asks to be dialled where this stream comes from, and nowhere else; answered by :class:`DialedBack`.

    Args:
        port: On which port.
    """

    port: Annotated[int, Meta(ge=1, le=65535)]


class DialedBack(ReachMessage, frozen=True, tag=True):
    """Answers :class:`DialBack`.

    Args:
        address: What was dialled.
        is_reached: Whether the peer that asked was there, by its key.
        problem: What went wrong if not, for people.
    """

    address: _Address
    is_reached: bool
    problem: Annotated[str, Meta(max_length=4096)] = ""


class Reserve(ReachMessage, frozen=True, tag=True):
    """Asks a relay to tell, on this stream, who wants to reach this peer; answered by :class:`Reserved`.

    From then on, the relay sends :class:`Incoming`, and answers a :class:`~corolla.wire.Ping` every now and then;
    a peer that sends none for long has gone.
    """


class Reserved(ReachMessage, frozen=True, tag=True):
    """The relay knows the peer, for as long as the stream lives."""


class Incoming(ReachMessage, frozen=True, tag=True):
    """Tells a peer that somebody wants to reach it; it is expected to open another stream and say :class:`Accept`.

    Args:
        ticket: What to say there.
        peer: Who it is, as the relay knows; the handshake will prove it.
    """

    ticket: _Ticket
    peer: _PeerId


class Connect(ReachMessage, frozen=True, tag=True):
    """Asks a relay for a peer; answered by :class:`Connected`, after which the stream belongs to the two peers.

    Args:
        peer: Whom to reach.
    """

    peer: _PeerId


class Accept(ReachMessage, frozen=True, tag=True):
    """Takes up what :class:`Incoming` has offered; answered by :class:`Connected`, as there.

    Args:
        ticket: From the offer.
    """

    ticket: _Ticket


class Connected(ReachMessage, frozen=True, tag=True):
    """All further bytes of the stream are the other peer's."""


class Punch(ReachMessage, frozen=True, tag=True):
    """Asks a peer to dial this one at the same time as this one dials it; answered by :class:`Punched`.

    Each side's router then takes the other side's packets for answers. Sent on a stream between the two peers that goes
    through a relay.

    Args:
        addresses: Where to, the likeliest first.
    """

    addresses: _Addresses


class Punched(ReachMessage, frozen=True, tag=True):
    """Answers :class:`Punch`, and says that dialling has begun.

    Args:
        addresses: Where to dial.
    """

    addresses: _Addresses


REACH_MESSAGES = (
    Observe | Observed | DialBack | DialedBack | Reserve | Reserved | Incoming | Connect | Accept | Connected
    | Punch | Punched
)  # fmt: skip
"""All of them."""
