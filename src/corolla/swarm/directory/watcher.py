"""How clients and monitors see the swarm: one subscription to any of its peers, and another when that peer is lost."""

import logging
import random
from collections.abc import Callable
from typing import Final

import anyio

from corolla.errors import BootstrapFailed, Error
from corolla.swarm.channel import Channel
from corolla.swarm.directory.directory import Directory
from corolla.swarm.directory.view import View
from corolla.swarm.endpoint import Endpoint
from corolla.swarm.finding.contacts import Contact, Contacts, cause_of
from corolla.terms import ModelId, Snapshot
from corolla.wire import Publish, Subscribe, expect

__all__ = ["Watcher"]

_LOG = logging.getLogger(__name__)
_REMEMBER_EVERY_S: Final = 30.0


class Watcher:
    """Keeps a directory up to date without taking part in the gossip.

    Args:
        endpoint: How to reach peers.
        directory: What is kept up to date.
        contacts: Whom to turn to first, and when all others are lost.
        rng: The dice that choose the next peer.
    """

    def __init__(self, endpoint: Endpoint, directory: Directory, contacts: Contacts, *, rng: random.Random) -> None:
        self._endpoint = endpoint
        self._config = endpoint.config
        self._view = View(directory, endpoint.config)
        self._contacts = contacts
        self._rng = rng
        self._failures: list[Error] = []

    @property
    def view(self) -> View:
        """What this program sees of the swarm."""
        return self._view

    @property
    def age_s(self) -> float:
        """Seconds since the followed peer was last heard; infinite before the whole of its directory has come."""
        return self._view.age_s

    def snapshot(self, model: ModelId | None = None) -> Snapshot:
        """View the announcements that hold now.

        Args:
            model: Only those of this model; ``None`` for all.
        """
        return self._view.snapshot(model)

    async def run(self) -> None:
        """Follow one peer after another until cancelled.

        Raises:
            BootstrapFailed: If there is no contact at all, or the first round finds none that answers.
            NotAMember: If one of them turns this peer away; says why.
        """
        await self._contacts.load(but=self._endpoint.peer_id)
        if not self._contacts.all():
            raise BootstrapFailed("no peer of the swarm is known; give the address of one")
        while True:
            self._failures = []
            await self._follow_any(self._candidates())
            if self._view.in_step_s is None:
                raise cause_of(self._failures)
            await anyio.sleep(self._config.gossip_interval_s * self._rng.uniform(0.1, 0.3))

    async def wait_for(self, predicate: Callable[[Snapshot], bool], deadline_s: float) -> Snapshot:
        """Wait until a snapshot is as it should be.

        Args:
            predicate: What it should be like; asked again after every change.
            deadline_s: How long to wait, in seconds.

        Returns:
            The first snapshot that is so.

        Raises:
            BootstrapFailed: If no peer could be reached by then.
            SwarmError: If peers could be reached, but it was not so.
        """
        return await self._view.wait_for(predicate, deadline_s, complaint=self._complaint)

    def _candidates(self) -> list[Contact]:
        """Give whom to follow: at first those that were named, later any server, in random order."""
        contacts = self._contacts.all()
        if self._view.in_step_s is None:
            return contacts
        servers = [Contact(claim.peer, claim.addresses) for claim in self.snapshot().announcements]
        self._rng.shuffle(servers)
        return servers + contacts

    async def _follow_any(self, candidates: list[Contact]) -> None:
        """Subscribe to the candidates, each soon after the last; follow the first that answers, until it is lost."""
        race = anyio.Event()  # is over

        async def attempt(candidate: Contact, ended: anyio.Event) -> None:
            with anyio.CancelScope() as scope:
                scopes.append(scope)
                if race.is_set():
                    return
                try:
                    await self._follow(candidate, lambda: win(scope))
                except Error as error:
                    self._failures.append(error)
                    _LOG.debug("stopped following a peer: %s", error.message)
            ended.set()

        def win(winner: anyio.CancelScope) -> None:
            race.set()
            for scope in scopes:
                if scope is not winner:
                    scope.cancel()

        scopes: list[anyio.CancelScope] = []
        async with anyio.create_task_group() as tasks:
            for candidate in candidates:
                ended = anyio.Event()
                tasks.start_soon(attempt, candidate, ended)
                with anyio.move_on_after(self._config.race_delay_s):
                    await ended.wait()
                if race.is_set():
                    break

    async def _follow(self, contact: Contact, begin: Callable[[], None]) -> None:
        """Subscribe to one peer and merge what it sends, until it is lost."""
        async with self._endpoint.channel(contact.peer, contact.addresses) as channel:
            await channel.send(Subscribe())
            publish = await self._next(channel)
            begin()
            remember_at_s = anyio.current_time()
            while True:
                await self._view.hear(publish)
                now_s = anyio.current_time()
                if publish.is_whole:
                    self._view.in_step_s = now_s
                    self._view.directory.expire(now_s)
                    self._view.ring()
                if now_s >= remember_at_s:
                    remember_at_s = now_s + _REMEMBER_EVERY_S
                    await self._contacts.remember(self.snapshot().announcements)
                publish = await self._next(channel)

    async def _next(self, channel: Channel) -> Publish:
        received = await channel.receive(deadline_s=self._config.lost_after_s)
        return expect(received.message, Publish, peer=channel.peer)

    def _complaint(self) -> str:
        return cause_of(self._failures).message
