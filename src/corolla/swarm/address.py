"""Where a peer can be reached, as text: ``tls://host:port``, with the peer's id as its path where one is expected.

One that cannot be dialled is reached through a relay, whose id comes first: ``relay://host:port/<relay's id>``.
"""

import re
from typing import Final, NamedTuple

from corolla.errors import ConfigError, RemoteProtocolError
from corolla.swarm.identity import public_key_of
from corolla.terms import Address, PeerId

__all__ = ["RELAY", "Place", "format_address", "parse_address", "relay_address", "split_address"]

RELAY: Final = "relay"
"""What addresses begin with at which a relay is, rather than the peer itself."""

_SHAPE: Final = re.compile(
    r"(?P<scheme>[a-z][a-z0-9]{0,15})://(?:\[(?P<six>[0-9A-Fa-f:.%a-z]{2,64})\]|(?P<host>[^\s\[\]/:@?#]{1,200}))"
    r":(?P<port>[0-9]{1,5})(?:/(?P<first>[^/\s]*))?(?:/(?P<second>[^/\s]*))?"
)


class Place(NamedTuple):
    """The parts of an address.

    Args:
        scheme: Which transport.
        host: A name or an IP address, without brackets.
        port: From 1 to 65535.
        relay: Who is there, if that is a relay.
    """

    scheme: str
    host: str
    port: int
    relay: PeerId | None = None


def parse_address(text: str) -> tuple[PeerId | None, Address]:
    """Read an address that someone typed.

    Args:
        text: ``tls://host:port`` or ``tls://host:port/<peer id>``; IPv6 in brackets.

    Returns:
        The peer that must be there, or ``None`` for whoever is, and the address without it.

    Raises:
        ConfigError: If the text is no address.
    """
    match = _match(text.strip())
    if match is None:
        raise ConfigError(
            f"{text!r} is no address; write tls://host:port or tls://host:port/<peer id>, IPv6 in brackets"
        )
    address = format_address(match["scheme"], match["six"] or match["host"], int(match["port"]))
    peer = match["first"]
    if match["scheme"] == RELAY:
        address = Address(f"{address}/{_peer_id(match['first'], text)}")
        peer = match["second"]
    return (_peer_id(peer, text) if peer else None), address


def format_address(scheme: str, host: str, port: int) -> Address:
    """Write an address; an IPv6 host gets its brackets here."""
    return Address(f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}")


def relay_address(address: Address, relay: PeerId) -> Address:
    """Write where peers behind a relay can be reached.

    Args:
        address: Where the relay itself can be dialled.
        relay: Who it is.

    Raises:
        ConfigError: If that is no address.
    """
    place = split_address(address)
    return Address(f"{format_address(RELAY, place.host, place.port)}/{relay}")


def split_address(address: Address) -> Place:
    """Take an address apart.

    Raises:
        ConfigError: If it is none.
    """
    match = _match(address)
    if match is None:
        raise ConfigError(f"{address!r} is no address; write tls://host:port")
    relay = _peer_id(match["first"], address) if match["scheme"] == RELAY else None
    return Place(match["scheme"], match["six"] or match["host"], int(match["port"]), relay)


def _match(text: str) -> re.Match[str] | None:
    """Take a text apart if it has the shape of an address: only one with a relay may name two peers."""
    match = _SHAPE.fullmatch(text)
    if match is None or not 0 < int(match["port"]) < 65536:
        return None
    return None if match["second"] is not None and match["scheme"] != RELAY else match


def _peer_id(text: str | None, whole: str) -> PeerId:
    peer = PeerId(text or "")
    try:
        public_key_of(peer)
    except RemoteProtocolError as error:
        raise ConfigError(f"the address {whole!r} ends in no peer id: {error.message}") from error
    return peer
