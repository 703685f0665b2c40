"""How servers keep their directories in step: pushes at once, and anti-entropy for whatever a push has missed.

Every interval a peer compares digests with a random other, and each sends what the other lacks (van Renesse et al.,
2008, *Efficient Reconciliation and Flow Control for Anti-Entropy Protocols*). A change is pushed on at once besides:
one's own to everyone in a small swarm, others' to a few. Clients take no part; they subscribe (``swarm/watcher.py``).
"""

import logging
import random
import time
from collections.abc import Sequence
from typing import Final

import anyio
import msgspec
from anyio import lowlevel

from corolla.errors import BootstrapFailed, Error, NotAMember, RemoteProtocolError
from corolla.swarm.channel import Channel
from corolla.swarm.contacts import Contact, Contacts
from corolla.swarm.directory import Directory
from corolla.swarm.endpoint import Endpoint
from corolla.terms import Address, Announcement, Claim, ModelId, Snapshot
from corolla.wire import Ack, Greeting, Message, Ping, Pong, Publish, Reconcile, Reconciled, Record, Subscribe

__all__ = ["Gossip", "merge_records"]

_LOG = logging.getLogger(__name__)
_FAREWELL_S: Final = 1.0  # for how long a leaver's last announcement is seen
_REMEMBER_EVERY: Final = 30  # rounds
_VERIFIED_AT_ONCE: Final = 8


class Gossip:
    """Keeps one server's directory in step with the swarm's, and answers what peers ask of it.

    Args:
        endpoint: How to reach peers, and who this one is.
        directory: What is kept in step.
        contacts: Whom to turn to first, and when all others are lost.
        rng: The dice that choose partners.
    """

    def __init__(self, endpoint: Endpoint, directory: Directory, contacts: Contacts, *, rng: random.Random) -> None:
        self._endpoint = endpoint
        self._config = endpoint.config
        self._directory = directory
        self._contacts = contacts
        self._rng = rng
        self._own: Claim | None = None
        self._announced_s = 0.0
        self._in_step_s: float | None = None
        self._pushed_revision = 0
        self._pushing: set[Contact] = set()
        self._changed = anyio.Event()

    def snapshot(self, model: ModelId | None = None) -> Snapshot:
        """View the announcements that hold now.

        Args:
            model: Only those of this model; ``None`` for all.
        """
        now_s = anyio.current_time()
        age_s = 0.0 if self._in_step_s is None else now_s - self._in_step_s
        return self._directory.snapshot(now_s, model=model, age_s=age_s)

    async def join(self) -> None:
        """Learn the swarm's announcements from the first contact that answers.

        Without any contact this peer starts a swarm of its own.

        Raises:
            BootstrapFailed: If the user named contacts and nobody answers; lists what went wrong with each.
        """
        await self._contacts.load()
        problems: list[str] = []

        async def attempt(contact: Contact) -> None:
            try:
                with anyio.fail_after(self._config.handshake_s):
                    await self._reconcile(contact)
            except Error as error:
                problems.append(error.message)
            except TimeoutError:
                problems.append(f"{', '.join(contact.addresses)}: no answer within {self._config.handshake_s:g} s")
            else:
                tasks.cancel_scope.cancel()

        async with anyio.create_task_group() as tasks:
            for contact in self._contacts.all():
                tasks.start_soon(attempt, contact)
        if self._in_step_s is None and self._contacts.given:
            raise BootstrapFailed(
                "no peer of the swarm could be reached; check the addresses and that one of the peers runs: "
                + "; ".join(problems)
            )

    async def announce(self, announcement: Claim) -> None:
        """Say something new of this peer to the swarm; it is refreshed until :meth:`leave`.

        Args:
            announcement: The claim. Its sequence does not matter: it gets the next one.

        Raises:
            FrameTooLarge: If the claim is over the limit of one record.
        """
        # From the clock, so that a restarted peer overrules its former self; failing that, it finds itself overtaken.
        sequence = max(self._directory.sequence_of(announcement.peer) + 1, round(time.time() * 1000))
        membership = self._endpoint.membership
        proof = b"" if membership is None else membership.proof
        self._own = msgspec.structs.replace(announcement, sequence=sequence, membership=proof)
        self._announced_s = anyio.current_time()
        self._directory.announce(self._own, self._endpoint.identity, self._announced_s)
        self._ring()

    async def move(self, addresses: tuple[Address, ...]) -> None:
        """Tell the swarm that this peer is reached elsewhere now, if it has said anything of itself.

        Args:
            addresses: Where.
        """
        if self._own is not None and self._own.addresses != addresses:
            await self.announce(msgspec.structs.replace(self._own, addresses=addresses))

    async def leave(self) -> None:
        """Tell everyone that this peer is gone, as far as they can be told within one request's deadline."""
        if self._own is None:
            return
        revision = self._directory.revision
        farewell = msgspec.structs.replace(self._own, ttl_s=_FAREWELL_S)
        if isinstance(farewell, Announcement):
            farewell = msgspec.structs.replace(farewell, state="draining")
        await self.announce(farewell)
        self._own = None
        self._pushed_revision = self._directory.revision  # :meth:`run` need not push it as well
        with anyio.move_on_after(self._config.request_s):
            async with anyio.create_task_group() as tasks:
                for target in self._partners():
                    tasks.start_soon(self._push, target, revision)

    async def run(self) -> None:
        """Keep in step until cancelled."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._refresh_often)
            tasks.start_soon(self._reconcile_often)
            while True:
                changed = self._changed
                for target in self._push_targets():
                    tasks.start_soon(self._push_once, target, self._pushed_revision)
                self._pushed_revision = self._directory.revision
                await changed.wait()

    async def handle(self, channel: Channel, message: Message) -> None:
        """Answer a message of another peer; for a subscription, until the other side has gone.

        Args:
            channel: Where it came from.
            message: A ping, or one of those of the directory.

        Raises:
            RemoteProtocolError: If it is another message.
            Error: If the answer cannot be sent.
        """
        match message:
            case Ping():
                await channel.send(Pong())
            case Reconcile():
                records, wanted = self._directory.delta(message.digest, anyio.current_time())
                await channel.send(Reconciled(records=records, wanted=wanted), deadline_s=self._config.request_s)
            case Publish():
                await self._merge(message.records)
                await channel.send(Ack())
            case Subscribe():
                await self._serve_subscriber(channel)
            case Greeting():
                own = self._endpoint.peer_id[:8]
                raise NotAMember(f"peer {own} is of a public swarm; to join it, leave your invite out")
            case _:
                raise RemoteProtocolError(f"{type(message).__name__} does not begin a conversation about the directory")

    async def _serve_subscriber(self, channel: Channel) -> None:
        revision = 0
        while True:
            changed = self._changed
            peers = self._directory.changed_since(revision)
            revision = self._directory.revision
            batches = list(self._directory.batches(peers, anyio.current_time())) or [()]
            for number, batch in enumerate(batches, start=1):
                publish = Publish(records=batch, is_whole=number == len(batches))
                await channel.send(publish, deadline_s=self._config.request_s)
            with anyio.move_on_after(self._config.heartbeat_s):
                await changed.wait()

    async def _refresh_often(self) -> None:
        """Repeat this peer's announcement before it expires, or once another is heard under its name."""
        while True:
            await anyio.sleep(self._config.gossip_interval_s)
            if self._own is None:
                continue
            is_overtaken = self._directory.sequence_of(self._own.peer) > self._own.sequence
            if is_overtaken:
                _LOG.warning(
                    "an announcement newer than this peer's own was heard: does another use its identity file?"
                )
            if is_overtaken or anyio.current_time() - self._announced_s >= self._config.refresh_s:
                await self.announce(self._own)

    async def _reconcile_often(self) -> None:
        rounds = 0
        while True:
            await anyio.sleep(self._config.gossip_interval_s * self._rng.uniform(0.8, 1.2))
            self._directory.expire(anyio.current_time())
            partners = self._partners()
            if partners:
                try:
                    with anyio.move_on_after(self._config.request_s):
                        await self._reconcile(self._rng.choice(partners))
                except Error as error:
                    _LOG.debug("could not reconcile: %s", error.message)
            if rounds % _REMEMBER_EVERY == 0:
                await self._contacts.remember(self.snapshot().announcements, but=self._endpoint.peer_id)
            rounds += 1

    async def _reconcile(self, contact: Contact) -> None:
        """Compare directories with a peer and exchange what either lacks."""
        limit_s = self._config.request_s
        async with self._endpoint.channel(contact.peer, contact.addresses) as channel:
            asked = Reconcile(digest=self._directory.digest())
            answer = (await channel.request(asked, expected=Reconciled, deadline_s=limit_s)).message
            await self._merge(answer.records)
            for batch in self._directory.batches(answer.wanted, anyio.current_time()):
                await channel.request(Publish(records=batch), expected=Ack, deadline_s=limit_s)
        self._in_step_s = anyio.current_time()

    async def _merge(self, records: Sequence[Record]) -> None:
        revision = self._directory.revision
        await merge_records(self._directory, records)
        if self._directory.revision > revision:
            self._ring()

    def _partners(self) -> list[Contact]:
        """Give everyone to gossip with: the live servers and the named contacts, which may announce nothing."""
        servers = self._directory.snapshot(anyio.current_time()).announcements
        found = [Contact(claim.peer, claim.addresses) for claim in servers if claim.peer != self._endpoint.peer_id]
        known = {address for claim in servers for address in claim.addresses} | set(self._endpoint.addresses)
        contacts = self._contacts.given if found else self._contacts.all()
        return found + [contact for contact in contacts if not known.intersection(contact.addresses)]

    def _push_targets(self) -> list[Contact]:
        changed = self._directory.changed_since(self._pushed_revision)
        if not changed:
            return []
        partners = self._partners()
        if self._endpoint.peer_id in changed and len(partners) <= self._config.max_push_all:
            return partners
        return self._rng.sample(partners, min(self._config.fanout, len(partners)))

    async def _push_once(self, target: Contact, revision: int) -> None:
        """Push unless a push to that peer is under way: that one goes on until nothing is left."""
        if target not in self._pushing:
            self._pushing.add(target)
            try:
                await self._push(target, revision)
            finally:
                self._pushing.discard(target)

    async def _push(self, target: Contact, revision: int) -> None:
        """Send a peer what changed after a revision, until it has all; what fails is left to reconciliation."""
        try:
            async with self._endpoint.channel(target.peer, target.addresses) as channel:
                while changed := self._directory.changed_since(revision):
                    revision = self._directory.revision
                    for batch in self._directory.batches(changed, anyio.current_time()):
                        publish = Publish(records=batch)
                        await channel.request(publish, expected=Ack, deadline_s=self._config.request_s)
        except Error as error:
            _LOG.debug("could not push: %s", error.message)

    def _ring(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()


async def merge_records(directory: Directory, records: Sequence[Record]) -> None:
    """Merge records into a directory, letting other tasks run in between, because each signature takes 0.1 ms.

    Args:
        directory: Into which.
        records: From whomever.
    """
    for number, record in enumerate(records, start=1):
        directory.merge(record, anyio.current_time())
        if number % _VERIFIED_AT_ONCE == 0:
            await lowlevel.checkpoint()
