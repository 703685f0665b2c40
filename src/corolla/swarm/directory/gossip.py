"""A server's part in the gossip: its links as tasks and channels.

Owns the tasks. What is said on a link is decided in ``directory/exchange.py``, when this server speaks of itself in
``directory/voice.py``. Clients take no part; they subscribe (``directory/watcher.py``).
"""

import logging
import random
import time
from collections.abc import Callable
from functools import partial
from typing import Final

import anyio

from corolla.errors import Error, PeerTimeout, UsageError, ungrouped
from corolla.swarm.channel import Channel
from corolla.swarm.directory.directory import Directory
from corolla.swarm.directory.entry import Entry
from corolla.swarm.directory.exchange import Exchange
from corolla.swarm.directory.link import Link
from corolla.swarm.directory.neighbours import Neighbours, Visit
from corolla.swarm.directory.presence import Presence
from corolla.swarm.endpoint import Endpoint
from corolla.swarm.finding.contacts import Contact, Contacts, cause_of
from corolla.wire import Message, News, Ping, Pong, expect

__all__ = ["Gossip"]

_LOG = logging.getLogger(__name__)
_TICK_S: Final = 0.5
_GATHER_S: Final = 0.005  # so that what is learned in one moment goes into one message
_REMEMBER_EVERY_S: Final = 30.0


class Gossip(Presence):
    """Keeps one server's directory in step with the swarm's by links to a few others.

    Args:
        endpoint: How to reach peers, and who this one is.
        directory: What is kept in step.
        contacts: Whom to turn to first, and when all others are lost.
        rng: The dice that choose partners.
        wall_s: The clock on this machine's wall, in seconds since 1970.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        directory: Directory,
        contacts: Contacts,
        *,
        rng: random.Random,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(endpoint, directory, rng=rng, wall_s=wall_s)
        self._contacts = contacts
        neighbours = Neighbours(directory, endpoint.peer_id, contacts, endpoint.config, rng)
        self._exchange = Exchange(directory, endpoint.identity, neighbours, endpoint.config, rng)
        self._link_ended = anyio.Event()

    async def join(self) -> None:
        """Learn the swarm's announcements from the first contact that answers.

        Without any contact this peer starts a swarm of its own.

        Raises:
            BootstrapFailed: If the user named contacts and nobody answers; lists what went wrong with each.
            NotAMember: If they did, and one of them turns this peer away; says why.
            UsageError: If one of them is this peer itself, or of a swarm whose directory a store keeps.
        """
        await self._contacts.load(but=self._endpoint.peer_id)
        failures: list[Error] = []

        async def attempt(contact: Contact, ended: anyio.Event) -> None:
            try:
                with anyio.fail_after(self._config.handshake_s):
                    await self._meet(contact)
            except Error as error:
                failures.append(error)
            except TimeoutError:
                place, limit_s = ", ".join(contact.addresses), self._config.handshake_s
                failures.append(PeerTimeout(f"{place}: no answer within {limit_s:g} s", peer=contact.peer))
            else:
                tasks.cancel_scope.cancel()
            ended.set()

        async with anyio.create_task_group() as tasks:
            for contact in self._contacts.all():
                ended = anyio.Event()
                tasks.start_soon(attempt, contact, ended)
                with anyio.move_on_after(self._config.race_delay_s):
                    await ended.wait()
        if self._exchange.in_step_s is None and self._contacts.given:
            raise cause_of(failures)

    async def leave(self) -> None:
        """Tell everyone that this peer is gone, as far as they can be told within one request's deadline."""
        self._spread(self._voice.leave(anyio.current_time()))
        for link in self._exchange.links:
            link.leave()
        with anyio.move_on_after(self._config.request_s):
            while self._exchange.links:
                await self._link_ended.wait()

    async def run(self) -> None:
        """Keep in step until cancelled."""
        remember_s = _REMEMBER_EVERY_S / 10
        remember_at_s = anyio.current_time() + remember_s
        async with anyio.create_task_group() as tasks:
            while True:
                now_s = anyio.current_time()
                self._spread(self._voice.refresh(now_s))
                for visit in self._exchange.tick(now_s):
                    tasks.start_soon(self._visit, visit)
                if now_s >= remember_at_s:
                    remember_s = min(2 * remember_s, _REMEMBER_EVERY_S)
                    remember_at_s = now_s + remember_s
                    await self._contacts.remember(self.snapshot().announcements)
                await anyio.sleep(min(_TICK_S, self._config.gossip_interval_s / 2))

    async def handle(self, channel: Channel, message: Message) -> None:
        """Answer a message of another peer; for a link or a subscription, until one of the sides has gone.

        Args:
            channel: Where it came from.
            message: A ping, or one of those of the directory.

        Raises:
            PeerMisbehaved: If the other side says what no honest peer says.
            RemoteProtocolError: If it is another message.
            Error: If the answer cannot be sent.
        """
        if isinstance(message, News):
            await self._keep_link(channel, first=message)
        else:
            await super().handle(channel, message)

    def _spread(self, entry: Entry | None) -> None:
        if entry is not None:
            self._exchange.announced(entry)
            self._view.ring()

    async def _meet(self, contact: Contact) -> None:
        """Come into step with a contact."""
        async with self._endpoint.channel(contact.peer, contact.addresses) as channel:
            if channel.peer == self._endpoint.peer_id:
                raise UsageError(f"{', '.join(contact.addresses)} is this peer's own address; give that of another")
            await self._keep_link(channel, is_short=True)

    async def _visit(self, visit: Visit) -> None:
        contact, is_met = visit.contact, False
        try:
            async with self._endpoint.channel(contact.peer, contact.addresses) as channel:
                if visit.is_probe:
                    await channel.request(Ping(), expected=Pong, deadline_s=self._config.request_s)
                is_met = True
                self._exchange.visited(visit, anyio.current_time(), None)
                if not visit.is_probe and channel.peer != self._endpoint.peer_id:
                    await self._keep_link(channel)
        except Error as error:
            _LOG.debug("a link ended: %s", error.message)
            if not is_met:
                self._exchange.visited(visit, anyio.current_time(), error)
                if self._view.directory.entry(contact.peer) if contact.peer else None:
                    self._view.ring()

    async def _keep_link(self, channel: Channel, *, first: News | None = None, is_short: bool = False) -> None:
        """Speak and listen on one link, until one of the sides leaves it.

        Args:
            channel: Where.
            first: What the other side has begun with; ``None`` if this side begins.
            is_short: Whether to leave once the directories are in step.
        """
        bell = _Bell()
        link = self._exchange.open(channel.peer, anyio.current_time(), bell.ring, is_ours=first is None)
        reason: Error | None = None
        try:
            with ungrouped():
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._speak, channel, link, bell, tasks.cancel_scope)
                    await self._listen(channel, link, first, is_short=is_short)
                    tasks.cancel_scope.cancel()
        except Error as error:
            reason = error
            raise
        finally:
            self._exchange.close(link, anyio.current_time(), reason)
            self._link_ended.set()
            self._link_ended = anyio.Event()
        with anyio.CancelScope(shield=True):
            await channel.aclose()

    async def _speak(self, channel: Channel, link: Link, bell: "_Bell", scope: anyio.CancelScope) -> None:
        while True:
            bell.reset()
            message = self._exchange.say(link, anyio.current_time())
            await channel.send(message, deadline_s=self._config.request_s)
            if message.is_last:
                scope.cancel()
                return
            with anyio.move_on_after(self._config.heartbeat_s):
                await bell.wait()
                await anyio.sleep(_GATHER_S)

    async def _listen(self, channel: Channel, link: Link, first: News | None, *, is_short: bool) -> None:
        message = first
        while True:
            if message is None:
                received = await channel.receive(deadline_s=self._config.lost_after_s)
                message = expect(received.message, News, peer=channel.peer)
            now_s = anyio.current_time()
            self._exchange.hear(link, message, now_s)
            await self._view.merge(message.records, partial(self._exchange.take, link))
            self._exchange.settle(link, now_s)
            self._view.in_step_s = self._exchange.in_step_s
            if message.suspicions:
                self._view.ring()
            if message.is_last:
                return
            if is_short and link.is_in_step and not link.is_leaving:
                link.leave()
            message = None


class _Bell:
    """Wakes whoever speaks on a link."""

    def __init__(self) -> None:
        self._event = anyio.Event()

    def ring(self) -> None:
        self._event.set()

    def reset(self) -> None:
        self._event = anyio.Event()

    async def wait(self) -> None:
        await self._event.wait()
