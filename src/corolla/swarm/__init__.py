"""How peers find, reach and trust each other: identity, transports, channels, the directory and its gossip.

Knows messages as far as it must carry them; knows no tensor, no model's files, and not how a chain is chosen.
"""

from corolla.swarm.address import format_address, parse_address, split_address
from corolla.swarm.channel import Channel, Received
from corolla.swarm.config import LightConfig, RelayConfig, SwarmConfig
from corolla.swarm.directory.directory import Directory, Verdict
from corolla.swarm.directory.gossip import Gossip
from corolla.swarm.directory.keeping import make_presence, make_watcher
from corolla.swarm.directory.presence import Presence
from corolla.swarm.directory.watcher import Watcher
from corolla.swarm.endpoint import ChannelHandler, Endpoint
from corolla.swarm.finding.contacts import Contact, Contacts, contacts_of
from corolla.swarm.finding.dht import MainlineDht
from corolla.swarm.finding.lan import LocalNetwork, Neighbour, is_loopback
from corolla.swarm.finding.meeting import Meeting
from corolla.swarm.finding.rendezvous import Topic
from corolla.swarm.identity import Identity, public_key_of, verify
from corolla.swarm.light import LightPeer
from corolla.swarm.members.admission import check_may_use
from corolla.swarm.members.invite import Grant, Invite
from corolla.swarm.members.membership import Membership, Revocations
from corolla.swarm.members.spreading import spread_revocations
from corolla.swarm.pings import Pings
from corolla.swarm.reach.outlook import Outlook, look_out
from corolla.swarm.reach.reach import Reach, dial_through_relays
from corolla.swarm.reach.relay import RelayLoad
from corolla.swarm.transports.memory import MemoryNetwork, MemoryTransport
from corolla.swarm.transports.tls import TlsTransport
from corolla.swarm.transports.transport import Listener, Path, Stream, StreamHandler, Transport

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
    "Outlook",
    "Path",
    "Pings",
    "Presence",
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
    "contacts_of",
    "dial_through_relays",
    "format_address",
    "is_loopback",
    "look_out",
    "make_presence",
    "make_watcher",
    "parse_address",
    "public_key_of",
    "split_address",
    "spread_revocations",
    "verify",
]
