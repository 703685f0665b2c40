"""Where a peer listens, as text: ``tls://host:port``, with the peer's id as its path where one is expected there."""

import re
from typing import Final, NamedTuple

from corolla.errors import ConfigError, RemoteProtocolError
from corolla.swarm.identity import public_key_of
from corolla.terms import Address, PeerId

__all__ = ["Place", "format_address", "parse_address", "split_address"]

_SHAPE: Final = re.compile(
    r"(?P<scheme>[a-z][a-z0-9]{0,15})://(?:\[(?P<six>[0-9A-Fa-f:.%a-z]{2,64})\]|(?P<host>[^\s\[\]/:@?#]{1,200}))"
    r":(?P<port>[0-9]{1,5})(?:/(?P<peer>[^/\s]*))?"
)


class Place(NamedTuple):
    """The parts of an address.

    Args:
        scheme: Which transport.
        host: A name or an IP address, without brackets.
        port: From 1 to 65535.
    """

    scheme: str
    host: str
    port: int


def parse_address(text: str) -> tuple[PeerId | None, Address]:
    """Read an address that someone typed.

    Args:
        text: ``tls://host:port`` or ``tls://host:port/<peer id>``; IPv6 in brackets.

    Returns:
        The peer that must be there, or ``None`` for whoever is, and the address without it.

    Raises:
        ConfigError: If the text is no address.
    """
    match = _SHAPE.fullmatch(text.strip())
    if match is None or not 0 < int(match["port"]) < 65536:
        raise ConfigError(
            f"{text!r} is no address; write tls://host:port or tls://host:port/<peer id>, IPv6 in brackets"
        )
    address = format_address(match["scheme"], match["six"] or match["host"], int(match["port"]))
    if not match["peer"]:
        return None, address
    peer = PeerId(match["peer"])
    try:
        public_key_of(peer)
    except RemoteProtocolError as error:
        raise ConfigError(f"the address {text!r} ends in no peer id: {error.message}") from error
    return peer, address


def format_address(scheme: str, host: str, port: int) -> Address:
    """Write an address; an IPv6 host gets its brackets here."""
    return Address(f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}")


def split_address(address: Address) -> Place:
    """Take an address apart.

    Raises:
        ConfigError: If it is none.
    """
    match = _SHAPE.fullmatch(address)
    if match is None or not 0 < int(match["port"]) < 65536:
        raise ConfigError(f"{address!r} is no address; write tls://host:port")
    return Place(match["scheme"], match["six"] or match["host"], int(match["port"]))
