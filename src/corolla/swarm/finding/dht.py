"""Finding peers through the BitTorrent Mainline DHT (BEP 5), the largest there is, by the libtorrent package.

A server announces its port under a hash of its private swarm, or of its model in a public one; whoever looks the hash
up gets addresses, from anyone, and believes only what the handshake there proves. Nothing else of BitTorrent is on.
"""

import importlib
from types import TracebackType
from typing import Any, Final, Self

import anyio
from anyio import to_thread

from corolla.errors import ConfigError
from corolla.swarm.address import format_address, split_address
from corolla.swarm.config import SwarmConfig
from corolla.swarm.finding.rendezvous import Topic
from corolla.terms import Address

__all__ = ["MainlineDht"]

_ASK_EVERY_S: Final = 2.0
_POLL_S: Final = 0.1
_MAX_FOUND: Final = 64
_FIRST_ANNOUNCEMENTS_S: Final = (0.0, *(10.0,) * 6)  # early ones may come before any other peer of the DHT is known
_ANNOUNCE_EVERY_S: Final = 600.0  # they are forgotten after 30 minutes


class MainlineDht:
    """This machine's part in a DHT. An async context manager.

    Args:
        config: Where to enter the DHT, and from which interface.

    Raises:
        ConfigError: When entered, if libtorrent is not there or an address is none.
    """

    def __init__(self, config: SwarmConfig) -> None:
        self._bootstrap = [_parse(text) for text in config.dht_bootstrap]
        self._interfaces = config.dht_listen or "0.0.0.0:0,[::]:0"
        self._libtorrent: Any = None
        self._session: Any = None

    async def __aenter__(self) -> Self:
        try:
            self._libtorrent = await to_thread.run_sync(importlib.import_module, "libtorrent")
        except ImportError as error:
            raise ConfigError(
                f"dht needs libtorrent ({error}); pip install 'corolla[dht]', or leave dht out"
            ) from error
        self._session = await to_thread.run_sync(self._libtorrent.session, self.settings)
        for place in self._bootstrap:
            self._session.add_dht_node(place)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ending, self._session = [self._session], None
        with anyio.CancelScope(shield=True):
            await to_thread.run_sync(ending.clear)  # its destructor waits for sockets to close

    @property
    def settings(self) -> dict[str, object]:
        """What libtorrent is told: to take part in the DHT, and to do nothing else."""
        categories = self._libtorrent.alert.category_t
        settings: dict[str, object] = {
            "listen_interfaces": self._interfaces,
            "alert_mask": categories.dht_notification | categories.dht_operation_notification,
            "enable_dht": True,
            **dict.fromkeys(("enable_lsd", "enable_upnp", "enable_natpmp"), False),
            **dict.fromkeys(("enable_incoming_tcp", "enable_incoming_utp"), False),
            **dict.fromkeys(("enable_outgoing_tcp", "enable_outgoing_utp"), False),
        }
        if self._bootstrap:  # a DHT of one's own, perhaps of few machines on one network: nobody else is asked
            settings |= {"dht_bootstrap_nodes": "", "dht_restrict_routing_ips": False, "dht_restrict_search_ips": False}
        return settings

    @property
    def place(self) -> str:
        """Where others can enter the DHT by this peer, from this machine."""
        return f"127.0.0.1:{self._session.listen_port()}"

    async def look(self, topic: Topic, limit_s: float) -> list[Address]:
        """Look up who has announced itself, until somebody is found.

        Args:
            topic: Whom to look for.
            limit_s: How long to look, in seconds.
        """
        key = self._libtorrent.sha1_hash(topic.key)
        found: dict[Address, None] = {}
        with anyio.move_on_after(limit_s):
            while not found:
                self._session.dht_get_peers(key)
                with anyio.move_on_after(_ASK_EVERY_S):
                    while not found:
                        found.update(dict.fromkeys(self._replies(key)))
                        await anyio.sleep(_POLL_S)
        return list(found)[:_MAX_FOUND]

    async def announce(self, topic: Topic, port: int) -> None:
        """Announce a server, again and again until cancelled.

        Args:
            topic: Its private swarm, or its model.
            port: Where it listens.
        """
        key = self._libtorrent.sha1_hash(topic.key)
        for wait_s in _FIRST_ANNOUNCEMENTS_S:
            await anyio.sleep(wait_s)
            self._session.dht_announce(key, port)
        while True:
            await anyio.sleep(_ANNOUNCE_EVERY_S)
            self._session.dht_announce(key, port)

    def _replies(self, key: object) -> list[Address]:
        replies = [
            one for one in self._session.pop_alerts() if isinstance(one, self._libtorrent.dht_get_peers_reply_alert)
        ]
        places = [place for reply in replies if reply.info_hash == key for place in reply.peers()]
        return [format_address("tls", host, port) for host, port in places if port]


def _parse(text: str) -> tuple[str, int]:
    try:
        place = split_address(Address(f"dht://{text}"))
    except ConfigError as error:
        raise ConfigError(f"dht_bootstrap has {text!r}; write host:port") from error
    return place.host, place.port
