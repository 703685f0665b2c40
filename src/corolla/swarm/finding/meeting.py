"""How a server meets others of its swarm and model without being told of any. Knows not what they say to each other."""

from contextlib import AsyncExitStack
from types import TracebackType
from typing import Final, Self

import anyio

from corolla.swarm.address import split_address
from corolla.swarm.endpoint import Endpoint
from corolla.swarm.finding.contacts import Contact, Contacts
from corolla.swarm.finding.dht import MainlineDht
from corolla.swarm.finding.lan import LocalNetwork, Neighbour, is_loopback
from corolla.swarm.finding.rendezvous import Topic

__all__ = ["Meeting"]

_LOOK_AGAIN_S: Final = 10.0
_LOOK_RARELY_S: Final = 600.0


class Meeting:
    """A server's ways to find others and be found. An async context manager.

    Args:
        endpoint: The server's place in the swarm.
        contacts: Those whom it was told of; those who are found are put down there as well.
        host: The interface that it listens on.
        is_apart: Whether it wants to start a swarm of its own, off the local network.
    """

    def __init__(self, endpoint: Endpoint, contacts: Contacts, *, host: str, is_apart: bool = False) -> None:
        self._endpoint = endpoint
        self._contacts = contacts
        self._host = host
        config = endpoint.config
        self._is_apart = is_apart or config.directory is not None
        has_neighbours = config.lan_interface is not None or not is_loopback(host)
        self._network = (
            LocalNetwork(config.lan_interface) if config.lan and has_neighbours and not self._is_apart else None
        )
        self._dht = MainlineDht(config) if config.dht else None
        self._stack = AsyncExitStack()

    @property
    def _seeks(self) -> bool:
        """Whether the server wants to find others: not if it was told of some, or wants a new swarm."""
        return not (self._contacts.given or self._is_apart)

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            for way in (self._network, self._dht):
                if way is not None:
                    await stack.enter_async_context(way)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def look(self, topic: Topic) -> list[Contact]:
        """Look for others for a moment, if the server does not know any.

        Args:
            topic: Its swarm and model.

        Returns:
            Who was found; the contacts have them.
        """
        found: list[Contact] = []
        if self._network is not None and self._seeks:
            neighbours = await self._network.look(lambda one: self._is_wanted(one, topic), self._endpoint.config.lan_s)
            found = [one.contact for one in neighbours]
        if self._dht is not None and self._seeks and not found:
            found = [Contact(None, (address,)) for address in await self._dht.look(topic, self._endpoint.config.dht_s)]
        return [one for one in found if self._contacts.meet(one)]

    async def run(self, topic: Topic, model_name: str) -> None:
        """Be found, and go on finding others, so that two that have missed each other still meet; until cancelled.

        Args:
            topic: The server's swarm and model.
            model_name: How its owner calls the model.
        """
        port = next((split_address(one).port for one in self._endpoint.addresses if one.startswith("tls:")), None)
        if port is None:
            return
        async with anyio.create_task_group() as tasks:
            if self._dht is not None:
                tasks.start_soon(self._dht.announce, topic, port)
                tasks.start_soon(self._meet_others, self._dht, topic)
            if self._network is not None:
                tasks.start_soon(self._meet_neighbours, self._network, topic)
                await self._network.announce(
                    self._endpoint.peer_id, self._host, port, topic=topic, model_name=model_name
                )

    async def _meet_neighbours(self, network: LocalNetwork, topic: Topic) -> None:
        while self._seeks:
            for one in network.found.values():
                if self._is_wanted(one, topic):
                    self._contacts.meet(one.contact)
            await network.wait_for_change()

    async def _meet_others(self, dht: MainlineDht, topic: Topic) -> None:
        wait_s = _LOOK_AGAIN_S
        while self._seeks:
            await anyio.sleep(wait_s)
            wait_s = min(2 * wait_s, _LOOK_RARELY_S)
            for address in await dht.look(topic, self._endpoint.config.dht_s):
                if address not in self._endpoint.addresses:
                    self._contacts.meet(Contact(None, (address,)))

    def _is_wanted(self, neighbour: Neighbour, topic: Topic) -> bool:
        return neighbour.fits(topic) and neighbour.contact.peer != self._endpoint.peer_id
