"""How a server meets others of its swarm and model without being told of any. Knows not what they say to each other."""

from types import TracebackType
from typing import Self

import anyio

from corolla.server.config import ServerConfig
from corolla.swarm import Contact, Contacts, Endpoint, LocalNetwork, Neighbour, Topic, is_loopback, split_address

__all__ = ["Meeting"]


class Meeting:
    """A server's ways to find others and be found. An async context manager.

    Args:
        config: Where the server listens, and whether it wants to be alone.
        endpoint: The server's place in the swarm; it listens before anything is done here.
        contacts: Where those who were found are put down.
    """

    def __init__(self, config: ServerConfig, endpoint: Endpoint, contacts: Contacts) -> None:
        self._config = config
        self._swarm = endpoint.config
        self._endpoint = endpoint
        self._contacts = contacts
        has_neighbours = self._swarm.lan_interface is not None or not is_loopback(config.host)
        is_on = self._swarm.lan and has_neighbours and not config.new_swarm
        self._network = LocalNetwork(self._swarm.lan_interface) if is_on else None

    @property
    def _seeks(self) -> bool:
        """Whether the server wants to find others: not if it was told of some, or wants a new swarm."""
        return not (self._contacts.given or self._config.new_swarm)

    async def __aenter__(self) -> Self:
        if self._network is not None:
            await self._network.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._network is not None:
            await self._network.__aexit__(kind, error, trace)

    async def look(self, topic: Topic) -> list[Contact]:
        """Look for others for a moment, if the server does not know any.

        Args:
            topic: Its swarm and model.

        Returns:
            Who was found; the contacts have them.
        """
        if self._network is None or not self._seeks:
            return []
        found = await self._network.look(lambda one: self._is_wanted(one, topic), self._swarm.lan_s)
        return [one.contact for one in found if self._contacts.meet(one.contact)]

    async def run(self, topic: Topic, model_name: str) -> None:
        """Be found, and go on finding others, so that two that have missed each other still meet; until cancelled.

        Args:
            topic: The server's swarm and model.
            model_name: How its owner calls the model.
        """
        network = self._network
        port = next((split_address(one).port for one in self._endpoint.addresses if one.startswith("tls:")), None)
        if network is None or port is None:
            return
        own = self._endpoint.peer_id
        await network.announce(own, self._config.host, port, topic=topic, model_name=model_name)
        while self._seeks:
            for one in network.found.values():
                if self._is_wanted(one, topic):
                    self._contacts.meet(one.contact)
            await network.wait_for_change()
        await anyio.sleep_forever()

    def _is_wanted(self, neighbour: Neighbour, topic: Topic) -> bool:
        return neighbour.fits(topic) and neighbour.contact.peer != self._endpoint.peer_id
