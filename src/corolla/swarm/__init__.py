"""How peers find, reach and trust each other: identity, transports, channels, the directory and its gossip.

Knows messages as far as it must carry them; knows no tensor, no model's files, and not how a chain is chosen.
"""

from corolla.swarm.address import format_address, parse_address, split_address
from corolla.swarm.admission import check_may_use
from corolla.swarm.channel import Channel, Received
from corolla.swarm.config import LightConfig, RelayConfig, SwarmConfig
from corolla.swarm.contacts import Contact, Contacts
from corolla.swarm.dht import MainlineDht
from corolla.swarm.directory import Directory, Verdict
from corolla.swarm.endpoint import ChannelHandler, Endpoint
from corolla.swarm.gossip import Gossip
from corolla.swarm.identity import Identity, public_key_of, verify
from corolla.swarm.invite import Grant, Invite
from corolla.swarm.lan import LocalNetwork, Neighbour, is_loopback
from corolla.swarm.light import LightPeer
from corolla.swarm.meeting import Meeting
from corolla.swarm.membership import Membership, Revocations
from corolla.swarm.memory import MemoryNetwork, MemoryTransport
from corolla.swarm.pings import Pings
from corolla.swarm.reach import Reach, dial_through_relays
from corolla.swarm.relay import RelayLoad
from corolla.swarm.rendezvous import Topic
from corolla.swarm.spreading import spread_revocations
from corolla.swarm.tls import TlsTransport
from corolla.swarm.transport import Listener, Path, Stream, StreamHandler, Transport
from corolla.swarm.watcher import Watcher

__all__ = [
    "Channel",
    "ChannelHandler",
    "Contact",
    "Contacts",
    "Directory",
    "Endpoint",
    "Gossip",
    "Grant",
    "Identity",
    "Invite",
    "LightConfig",
    "LightPeer",
    "Listener",
    "LocalNetwork",
    "MainlineDht",
    "Meeting",
    "Membership",
    "MemoryNetwork",
    "MemoryTransport",
    "Neighbour",
    "Path",
    "Pings",
    "Reach",
    "Received",
    "RelayConfig",
    "RelayLoad",
    "Revocations",
    "Stream",
    "StreamHandler",
    "SwarmConfig",
    "TlsTransport",
    "Topic",
    "Transport",
    "Verdict",
    "Watcher",
    "check_may_use",
    "dial_through_relays",
    "format_address",
    "is_loopback",
    "parse_address",
    "public_key_of",
    "split_address",
    "spread_revocations",
    "verify",
]
