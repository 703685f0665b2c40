"""One peer's presence in the swarm: its identity, its transports, its open ears, and the idle channels it keeps.

Knows nothing of what is said on the channels: handlers and callers do.
"""

import logging
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self

import anyio

from corolla.errors import ConfigError, Error, InternalError, NotAMember, PeerBusy, PeerUnreachable
from corolla.swarm.address import split_address
from corolla.swarm.channel import Channel
from corolla.swarm.config import SwarmConfig
from corolla.swarm.identity import Identity
from corolla.swarm.members.admission import admit, enter
from corolla.swarm.members.invite import Invite
from corolla.swarm.members.membership import Membership
from corolla.swarm.transports.race import race
from corolla.swarm.transports.transport import Listener, Stream, Transport
from corolla.terms import Address, Claim, PeerId

if TYPE_CHECKING:
    from anyio.abc import TaskGroup

__all__ = ["ChannelHandler", "Endpoint"]

_LOG = logging.getLogger(__name__)

ChannelHandler = Callable[[Channel], Awaitable[None]]
"""What is called for every channel that another peer opens; the channel is closed when it returns."""


class _Idle(NamedTuple):
    channel: Channel
    since_s: float


class Endpoint:
    """Dials peers, listens for them, and keeps idle channels for the next use. An async context manager.

    Args:
        identity: Who this peer is.
        transports: The ways to reach others.
        config: The limits.

    Attributes:
        membership: Its place in a private swarm, if the config has an invite; ``None`` in a public one.
        on_use: Called with every channel that :meth:`channel` gives, and the addresses of its peer.

    Raises:
        ConfigError: If two transports claim the same addresses.
        UsageError: If the invite is none, or has expired.
    """

    def __init__(self, identity: Identity, transports: Sequence[Transport], config: SwarmConfig | None = None) -> None:
        self.identity = identity
        self.config = SwarmConfig() if config is None else config
        self._transports: Mapping[str, Transport] = {transport.scheme: transport for transport in transports}
        if len(self._transports) < len(transports):
            raise ConfigError("two transports have the same scheme; give each once")
        self.membership = _membership(self.config, self.peer_id)
        self._listeners: list[Listener] = []
        self._idle: dict[PeerId, deque[_Idle]] = {}
        self._opened: set[Channel] = set()
        self._served: Counter[PeerId] = Counter()
        self._answering: dict[Channel, anyio.CancelScope] = {}
        self._held: dict[Channel, int] = {}
        self._tasks: TaskGroup | None = None
        self._is_open = False
        self.on_use: Callable[[Channel, Sequence[Address]], None] | None = None

    def __repr__(self) -> str:
        return f"Endpoint({self.peer_id[:8]}, {', '.join(self.addresses) or 'not listening'})"

    async def __aenter__(self) -> Self:
        self._tasks = await anyio.create_task_group().__aenter__()
        self._tasks.start_soon(self._close_stale)
        self._is_open = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_open = False
        try:
            if self._tasks is not None:
                self._tasks.cancel_scope.cancel()
                # Not told of the error, which it would wrap into a group: callers could not catch it by its name.
                await self._tasks.__aexit__(None, None, None)
        finally:
            await self._close_all()

    @property
    def peer_id(self) -> PeerId:
        """Who this peer is."""
        return self.identity.peer_id

    @property
    def addresses(self) -> tuple[Address, ...]:
        """Where this peer can be dialled; empty if it does not listen."""
        return tuple(address for listener in self._listeners for address in listener.addresses)

    @property
    def admits(self) -> Callable[[Claim], bool] | None:
        """What says whose announcements count, for a directory; ``None`` in a public swarm, where all do."""
        return None if self.membership is None else self.membership.admits

    @property
    def invited_to(self) -> tuple[Address, ...]:
        """The addresses of peers in this peer's invite."""
        return () if self.membership is None else self.membership.invite.peers

    def add_transport(self, transport: Transport) -> None:
        """Have another way to reach others, for addresses of its scheme."""
        self._transports = {**self._transports, transport.scheme: transport}

    def add_listener(self, listener: Listener) -> None:
        """Have another ear; a later :meth:`serve` answers it."""
        self._listeners.append(listener)

    async def listen(self, scheme: str, host: str, port: int, *, announce: Sequence[Address] = ()) -> Listener:
        """Open an ear; a later :meth:`serve` answers it.

        Args:
            scheme: Through which transport.
            host: Where, in its terms; for IP the address of an interface.
            port: Which port; 0 for any that is free.
            announce: What to give as addresses instead of what is found.

        Returns:
            The ear.

        Raises:
            ConfigError: If it cannot listen there; says why and what helps.
        """
        listener = await self._transport(scheme).listen(host, port, announce=announce)
        self.add_listener(listener)
        return listener

    async def serve(self, handler: ChannelHandler) -> None:
        """Answer all ears until cancelled: each channel that a peer opens is handled in a task of its own.

        Without any ear, it returns at once.

        An error that the handler raises is reported to the peer, if it can still be told, and costs that channel alone.

        Args:
            handler: What to do with a channel.
        """

        async def serve_stream(stream: Stream) -> None:
            await self._serve_stream(stream, handler)

        async with anyio.create_task_group() as tasks:
            for listener in self._listeners:
                tasks.start_soon(listener.serve, serve_stream)

    @asynccontextmanager
    async def channel(
        self, peer: PeerId | None, addresses: Sequence[Address], *, is_new: bool = False
    ) -> AsyncIterator[Channel]:
        """Have a channel to a peer for the length of a block: an idle one, or else a new one.

        When the block ends well and every message on the channel was answered, the channel is kept for another use; so
        end a session before the block ends, or close the channel in it. When the block fails, the channel is closed.

        Args:
            peer: Who must be there; ``None`` for whoever is.
            addresses: Where, the likeliest first; the next is tried if one fails or does not answer soon.
            is_new: Whether it must not be an idle one, because those may be lost without a sign of it.

        Raises:
            PeerUnreachable: If it cannot be dialled; says which addresses were tried and what went wrong at each.
            NotAMember: If it is of a private swarm and turns this peer away; says why.
            PeerStranger: If this swarm is private and it is no member.
            PeerError: If it fails to greet.
            WireError: If its greeting is none.
        """
        channel = (None if is_new else await self._take_idle(peer)) or await self._open(peer, addresses)
        is_done = False
        try:
            if self.on_use is not None:
                self.on_use(channel, addresses)
            yield channel
            is_done = True
        finally:
            if not (is_done and self._keep_idle(channel)):
                await self._close(channel)

    async def greet(self, peer: PeerId, addresses: Sequence[Address]) -> None:
        """Exchange news of who belongs to the private swarm with a peer, over a new stream.

        Args:
            peer: Who.
            addresses: Where.

        Raises:
            Error: As :meth:`channel`.
        """
        await self._close(await self._open(peer, addresses))

    async def _open(self, peer: PeerId | None, addresses: Sequence[Address]) -> Channel:
        return await self._enter(await self._dial(peer, addresses))

    async def _enter(self, stream: Stream) -> Channel:
        channel = Channel(stream)
        self._opened.add(channel)
        if self.membership is not None:
            try:
                await enter(channel, self.membership, deadline_s=self.config.handshake_s)
            except BaseException:
                await self._close(channel)
                raise
        return channel

    async def _close(self, channel: Channel) -> None:
        self._opened.discard(channel)
        with anyio.CancelScope(shield=True):
            await channel.aclose()

    async def adopt(self, stream: Stream) -> None:
        """Keep a stream to a peer, opened elsewhere, for the next use of it.

        Args:
            stream: The stream, which belongs to this endpoint from now on.

        Raises:
            Error: If the two are not in one swarm, as for :meth:`channel`.
        """
        channel = await self._enter(stream)
        if not self._keep_idle(channel):
            await self._close(channel)

    def has_direct(self, peer: PeerId) -> bool:
        """Say whether an idle channel to a peer that needs no relay is at hand."""
        return any(entry.channel.path == "direct" for entry in self._idle.get(peer, ()))

    def _transport(self, scheme: str) -> Transport:
        if scheme not in self._transports:
            known = ", ".join(sorted(self._transports)) or "none"
            raise ConfigError(f"there is no transport for {scheme} addresses here; there are: {known}")
        return self._transports[scheme]

    async def _take_idle(self, peer: PeerId | None) -> Channel | None:
        idle = self._idle.get(peer) if peer is not None else None
        while idle:
            # The one used last is the likeliest to live; any that needs no relay comes first.
            best = max(range(len(idle)), key=lambda index: (idle[index].channel.path != "relayed", index))
            channel = idle[best].channel
            del idle[best]
            if channel.is_reusable:
                return channel
            await self._close(channel)
        return None

    def _keep_idle(self, channel: Channel) -> bool:
        idle = self._idle.setdefault(channel.peer, deque())
        if not (self._is_open and channel.is_reusable and len(idle) < self.config.max_idle_per_peer):
            return False
        idle.append(_Idle(channel, anyio.current_time()))
        return True

    async def _close_stale(self) -> None:
        """While the endpoint is open, close idle channels that grew old, and all to peers that ceased to be members."""
        while True:
            with anyio.move_on_after(min(1.0, self.config.idle_s / 4)):
                await (anyio.sleep_forever() if self.membership is None else self.membership.changed.wait())
            await self._cut_off()
            oldest_s = anyio.current_time() - self.config.idle_s
            stale: list[Channel] = []
            for peer, idle in list(self._idle.items()):
                fresh = deque(entry for entry in idle if entry.since_s > oldest_s and entry.channel.is_reusable)
                stale += [entry.channel for entry in idle if entry not in fresh]
                self._idle[peer] = fresh
                if not fresh:
                    del self._idle[peer]
            for channel in stale:
                await self._close(channel)

    async def _cut_off(self) -> None:
        """End the streams of peers whose invites were revoked or have expired meanwhile."""
        for channel in [*self._opened, *self._answering]:
            if self._fault_of(channel) is None:
                continue
            if channel in self._answering:
                self._answering[channel].cancel()
            else:
                await self._close(channel)

    def _fault_of(self, channel: Channel) -> str | None:
        if self.membership is None or channel.grant is None:
            return None
        return self.membership.fault_of(channel.grant)

    async def _close_all(self) -> None:
        with anyio.CancelScope(shield=True):
            for listener in self._listeners:
                await listener.aclose()
            self._listeners.clear()
            while self._idle:
                for entry in self._idle.popitem()[1]:
                    await self._close(entry.channel)

    async def _dial(self, peer: PeerId | None, addresses: Sequence[Address]) -> Stream:
        """Try the addresses in order, each soon after the last or as soon as that failed; the first stream wins."""
        problems: list[str] = []

        async def attempt(address: Address) -> Stream | None:
            try:
                return await self._transport(split_address(address).scheme).dial(peer, address)
            except (PeerUnreachable, ConfigError) as error:
                problems.append(error.message)
                return None

        attempts = [partial(attempt, address) for address in addresses]
        stream = await race(attempts, self.config.race_delay_s, lambda stream: stream.aclose())
        if stream is None:
            who = "the peer" if peer is None else f"peer {peer[:8]}"
            what = "; ".join(problems) or "it has no address"
            raise PeerUnreachable(f"{who} could not be reached: {what}", peer=peer)
        return stream

    async def _serve_stream(self, stream: Stream, handler: ChannelHandler) -> None:
        """Handle one stream, whatever happens, without harm to the others."""
        channel = Channel(stream)
        channel.account(partial(self._hold, channel))
        scope = self._answering[channel] = anyio.CancelScope()
        self._served[stream.peer] += 1
        try:
            self._check_room(stream.peer)
            with scope:
                if self.membership is not None:
                    await admit(channel, self.membership, self.peer_id, deadline_s=self.config.handshake_s)
                await handler(channel)
            if scope.cancelled_caught:
                raise NotAMember(f"peer {self.peer_id[:8]} ended the stream: {self._fault_of(channel)}")
        except Exception as error:  # noqa: BLE001 (the supervisor: a bug in one handler must not end all channels)
            reason = _find_reason(error)
            if reason is None:
                _LOG.exception("a bug ended a channel of peer %s", stream.peer[:8])
                reason = InternalError("an internal error; its cause is in this peer's log")
            else:
                _LOG.debug("a channel of peer %s ended: %s", stream.peer[:8], reason.message)
            await channel.refuse(reason)
        finally:
            del self._answering[channel]
            self._held.pop(channel, None)
            self._served[stream.peer] -= 1
            if not self._served[stream.peer]:
                del self._served[stream.peer]
            with anyio.CancelScope(shield=True):
                await channel.aclose()

    def _hold(self, channel: Channel, nbytes: int) -> None:
        """Note how much of a frame waits for the rest; all of a peer's together must not be too much."""
        self._held[channel] = nbytes
        total = sum(held for other, held in self._held.items() if other.peer == channel.peer)
        if total > (limit := self.config.max_bytes_per_peer):
            raise PeerBusy(
                f"{total} bytes of messages that you have begun are held here, and {limit} is the limit for one peer; "
                "finish some before you begin others",
                peer=self.peer_id,
            )

    def _check_room(self, peer: PeerId) -> None:
        count, total = self._served[peer], self._served.total()
        if count > self.config.max_streams_per_peer or total > self.config.max_streams:
            raise PeerBusy(
                f"there are {count - 1} streams of yours and {total - 1} in all here, and no room for more",
                peer=self.peer_id,
            )


def _membership(config: SwarmConfig, peer: PeerId) -> Membership | None:
    if config.invite is None:
        return None
    invite = Invite.read(config.invite)
    path = config.state and config.state / "revoked" / f"{invite.grant.swarm}.list"
    return Membership(invite, peer, path=path)


def _find_reason(error: Exception) -> Error | None:
    """Give what a handler raised on purpose, also out of a task group; ``None`` if any of it was not on purpose."""
    if isinstance(error, ExceptionGroup):
        reasons = [_find_reason(inner) for inner in error.exceptions]
        return None if None in reasons else reasons[0]
    return error if isinstance(error, Error) else None
