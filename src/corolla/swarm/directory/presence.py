"""One server's part in the swarm's directory, whatever keeps that: its voice, its view, and what it answers.

Where records go and come from is known to ``directory/gossip.py`` and ``directory/store.py``.
"""

import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable

import anyio
import msgspec

from corolla.errors import NotAMember, RemoteProtocolError
from corolla.swarm.channel import Channel
from corolla.swarm.directory.directory import Directory
from corolla.swarm.directory.entry import Entry
from corolla.swarm.directory.view import View
from corolla.swarm.directory.voice import Voice
from corolla.swarm.endpoint import Endpoint
from corolla.terms import Address, Claim, ModelId, Snapshot
from corolla.wire import Greeting, Message, Ping, Pong, Subscribe

__all__ = ["Presence"]


class Presence(ABC):
    """Keeps one server's directory in step with the swarm's, and answers what peers ask of it.

    Args:
        endpoint: How to reach peers, and who this one is.
        directory: What is kept in step.
        rng: The dice that decide when.
        wall_s: The clock on this machine's wall, in seconds since 1970.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        directory: Directory,
        *,
        rng: random.Random,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        self._endpoint = endpoint
        self._config = endpoint.config
        self._view = View(directory, endpoint.config)
        self._voice = Voice(directory, endpoint.identity, endpoint.config, wall_s, rng)

    @property
    def view(self) -> View:
        """What this server sees of the swarm."""
        return self._view

    def snapshot(self, model: ModelId | None = None) -> Snapshot:
        """View the announcements that hold now.

        Args:
            model: Only those of this model; ``None`` for all.
        """
        age_s = 0.0 if self._view.in_step_s is None else self._view.age_s  # who is alone knows all there is
        return self._view.directory.snapshot(anyio.current_time(), model=model, age_s=age_s)

    @abstractmethod
    async def join(self) -> None:
        """Learn the swarm's announcements.

        Raises:
            BootstrapFailed: If that which the directory is to be learned from cannot be reached.
            NotAMember: If it turns this peer away; says why.
        """

    async def announce(self, announcement: Claim) -> None:
        """Say something new of this peer to the swarm at once; it is repeated until :meth:`leave`.

        Args:
            announcement: The claim. Its sequence does not matter: it gets the next one.

        Raises:
            FrameTooLarge: If the claim is over the limit of one record.
        """
        self._spread(self._voice.announce(self._proved(announcement), anyio.current_time()))

    async def note(self, announcement: Claim) -> None:
        """Take note of how this peer is; others hear of it soon if it matters to them, else when it is due.

        Args:
            announcement: The claim. Its sequence does not matter: it gets the next one.

        Raises:
            FrameTooLarge: If the claim is over the limit of one record.
        """
        self._spread(self._voice.note(self._proved(announcement), anyio.current_time()))

    async def move(self, addresses: tuple[Address, ...]) -> None:
        """Tell the swarm that this peer is reached elsewhere now, if it has said anything of itself.

        Args:
            addresses: Where.
        """
        said = self._voice.truth
        if said is not None and said.addresses != addresses:
            await self.announce(msgspec.structs.replace(said, addresses=addresses))

    @abstractmethod
    async def leave(self) -> None:
        """Tell everyone that this peer is gone, as far as they can be told within one request's deadline."""

    @abstractmethod
    async def run(self) -> None:
        """Keep in step until cancelled."""

    async def handle(self, channel: Channel, message: Message) -> None:
        """Answer a message of another peer; for a subscription, until one of the sides has gone.

        Args:
            channel: Where it came from.
            message: A ping, or one of those of the directory.

        Raises:
            PeerMisbehaved: If the other side says what no honest peer says.
            RemoteProtocolError: If it is another message.
            Error: If the answer cannot be sent.
        """
        match message:
            case Ping():
                await channel.send(Pong())
            case Subscribe():
                await self._view.serve_subscriber(channel)
            case Greeting():
                own = self._endpoint.peer_id[:8]
                raise NotAMember(f"peer {own} is of a public swarm; to join it, leave your invite out")
            case _:
                raise RemoteProtocolError(f"{type(message).__name__} does not begin a conversation about the directory")

    @abstractmethod
    def _spread(self, entry: Entry | None) -> None:
        """Let others know of what this peer says of itself now, if it says anything."""

    def _proved(self, announcement: Claim) -> Claim:
        membership = self._endpoint.membership
        proof = b"" if membership is None else membership.proof
        return msgspec.structs.replace(announcement, membership=proof)
