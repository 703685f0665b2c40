"""Being a relay: joining streams of peers that cannot reach each other, within what the owner of this machine gives.

A peer that cannot be dialled keeps a stream open here. Whoever asks for it is announced to it there with a ticket; it
comes back with the ticket on a stream of its own, and the two streams are joined. The two peers shake hands on what is
joined, so what passes here is ciphertext. Owns the joined streams and the accounts of them.
"""

import secrets
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, NamedTuple

import anyio

from corolla.errors import PeerBusy, PeerTimeout, PeerUnreachable, RemoteProtocolError
from corolla.swarm.channel import Channel
from corolla.swarm.config import RelayConfig
from corolla.swarm.transports.transport import Stream
from corolla.telemetry import event, logger
from corolla.wire import Accept, Connect, Connected, Incoming, Ping, Pong, Reserve, Reserved, expect

if TYPE_CHECKING:
    from anyio.streams.memory import MemoryObjectSendStream

    from corolla.terms import PeerId

__all__ = ["Relay", "RelayLoad"]

_LOG = logger(__name__)
_RECEIVE_BYTES: Final = 1 << 17
_MAX_UNTOLD: Final = 64  # offers that wait to be sent to one peer
_HALF_OPEN_S: Final = 60.0  # for a stream that one side has ended
_DAY_S: Final = 86400.0


class RelayLoad(NamedTuple):
    """What a relay is doing, and has done.

    Args:
        peers: That can be reached through it now.
        streams: That it joins now.
        passed_bytes: In all.
        day_bytes: Since its present day began.
        refused: Requests that were over a limit.
    """

    peers: int
    streams: int
    passed_bytes: int
    day_bytes: int
    refused: int


class Relay:
    """Answers those who want to be reached, and those who want to reach them.

    Args:
        config: The limits.
        lost_after_s: A peer that was silent for so long has gone.
    """

    def __init__(self, config: RelayConfig, *, lost_after_s: float) -> None:
        self._config = config
        self._lost_after_s = lost_after_s
        self._places: dict[PeerId, _Place] = {}
        self._offers: dict[bytes, _Offer] = {}
        self._streams: Counter[str] = Counter()  # by peer and by host
        self._joined = 0
        self._meter = _Meter(config)
        self._refused = 0

    @property
    def load(self) -> RelayLoad:
        """What it is doing."""
        meter = self._meter
        return RelayLoad(len(self._places), self._joined, meter.passed_bytes, meter.day_bytes, self._refused)

    async def handle(self, channel: Channel, message: Reserve | Connect | Accept) -> None:
        """Answer a request; returns when the channel has served its purpose.

        Args:
            channel: Where it came from.
            message: The request.

        Raises:
            PeerBusy: If it is over a limit.
            PeerError: If the peer it is about is not here, does not answer, or was lost.
            WireError: If the other side broke the protocol.
        """
        try:
            match message:
                case Reserve():
                    await self._keep(channel)
                case Connect():
                    await self._connect(channel, message.peer)
                case Accept():
                    await self._accept(channel, message.ticket)
        except PeerBusy:
            self._refused += 1
            raise

    async def _keep(self, channel: Channel) -> None:
        """Tell a peer who wants to reach it, until it has gone; its newest stream counts."""
        before = self._places.pop(channel.peer, None)
        if before is not None:
            before.scope.cancel()
        if len(self._places) >= self._config.max_peers:
            raise PeerBusy(f"this relay has its {self._config.max_peers} peers; ask another", retry_after_s=60.0)
        outbox, untold = anyio.create_memory_object_stream[Incoming | Pong](_MAX_UNTOLD)
        place = _Place(outbox, anyio.CancelScope())
        self._places[channel.peer] = place
        event(_LOG, "relay keeps a peer", peer=channel.peer[:8], peers=len(self._places))
        try:
            with outbox, untold, place.scope:
                async with anyio.create_task_group() as tasks:
                    await channel.send(Reserved())
                    tasks.start_soon(self._answer_pings, channel, outbox)
                    async for told in untold:
                        await channel.send(told, deadline_s=self._lost_after_s)
        finally:
            if self._places.get(channel.peer) is place:
                del self._places[channel.peer]

    async def _answer_pings(self, channel: Channel, outbox: "MemoryObjectSendStream[Incoming | Pong]") -> None:
        while True:
            received = await channel.receive(deadline_s=self._lost_after_s)
            expect(received.message, Ping, peer=channel.peer)
            try:
                outbox.send_nowait(Pong())
            except anyio.WouldBlock:
                raise PeerBusy(f"{_MAX_UNTOLD} messages wait for peer {channel.peer[:8]}", peer=channel.peer) from None

    async def _connect(self, channel: Channel, target: "PeerId") -> None:
        place = self._places.get(target)
        if place is None:
            raise PeerUnreachable(f"peer {target[:8]} is not behind this relay; look at the swarm again", peer=target)
        with self._room_for(channel, target):
            offer = _Offer(target)
            ticket = secrets.token_bytes(16)
            self._offers[ticket] = offer
            try:
                place.outbox.send_nowait(Incoming(ticket=ticket, peer=channel.peer))
                with anyio.move_on_after(self._config.accept_s):
                    await offer.taken.wait()
            except anyio.WouldBlock:
                raise PeerBusy(f"{_MAX_UNTOLD} others want to reach peer {target[:8]} already", peer=target) from None
            finally:
                self._offers.pop(ticket, None)
            if offer.channel is None:
                waited = f"within {self._config.accept_s:g} s"
                raise PeerTimeout(f"peer {target[:8]} was told and did not come {waited}", peer=target)
            try:
                await self._join(channel, offer.channel)
            finally:
                offer.done.set()

    async def _accept(self, channel: Channel, ticket: bytes) -> None:
        offer = self._offers.get(ticket)
        if offer is None:
            raise PeerTimeout("whoever wanted to reach this peer does not wait any more", peer=channel.peer)
        if offer.target != channel.peer:
            raise RemoteProtocolError(f"peer {channel.peer[:8]} came with the ticket of peer {offer.target[:8]}")
        del self._offers[ticket]
        offer.channel = channel
        offer.taken.set()
        await offer.done.wait()

    @contextmanager
    def _room_for(self, channel: Channel, target: "PeerId") -> Iterator[None]:
        """Reserve a stream for both peers and for the dialler's host, where other peers may live as well."""
        keys = [channel.peer, target, *([] if channel.ends is None else [channel.ends.there.host])]
        if self._joined >= self._config.max_streams:
            raise PeerBusy(f"this relay joins {self._joined} streams and has no room for more", retry_after_s=5.0)
        for key in keys:
            if self._streams[key] >= self._config.max_streams_per_peer:
                raise PeerBusy(
                    f"this relay joins {self._streams[key]} streams for {key[:8]} and has no room for more of them",
                    retry_after_s=5.0,
                )
        self._meter.check()
        self._streams.update(keys)
        self._joined += 1
        try:
            yield
        finally:
            self._joined -= 1
            self._streams.subtract(keys)
            self._streams = +self._streams

    async def _join(self, dialler: Channel, target: Channel) -> None:
        begin_s = anyio.current_time()
        await target.send(Connected(), deadline_s=self._config.accept_s)
        await dialler.send(Connected(), deadline_s=self._config.accept_s)
        joined = _Joined(self._meter, dialler.release(), target.release())
        try:
            await joined.run(self._config.idle_s)
        finally:
            seconds = round(anyio.current_time() - begin_s, 1)
            event(
                _LOG, "relayed", peer=dialler.peer[:8], to=target.peer[:8], bytes=joined.passed_bytes, seconds=seconds
            )


class _Place(NamedTuple):
    """A peer that can be reached here."""

    outbox: "MemoryObjectSendStream[Incoming | Pong]"
    scope: anyio.CancelScope


class _Offer:
    """Somebody who waits for a peer to come."""

    def __init__(self, target: "PeerId") -> None:
        self.target = target
        self.channel: Channel | None = None
        self.taken = anyio.Event()
        self.done = anyio.Event()


class _Joined:
    """Two streams, each of whose bytes are passed on to the other."""

    def __init__(self, meter: "_Meter", one: tuple[Stream, bytes], other: tuple[Stream, bytes]) -> None:
        self._meter = meter
        self._ways = (*one, other[0]), (*other, one[0])
        self._active_s = anyio.current_time()
        self._ended = 0
        self.passed_bytes = 0

    async def run(self, idle_s: float) -> None:
        """Pass bytes on until both sides have ended, one broke, or nothing came for too long."""
        async with anyio.create_task_group() as tasks:
            for here, received, there in self._ways:
                tasks.start_soon(self._pass_on, here, received, there, tasks.cancel_scope)
            while self._ended < 2:
                limit_s = min(idle_s, _HALF_OPEN_S) if self._ended else idle_s
                left_s = self._active_s + limit_s - anyio.current_time()
                if left_s <= 0:
                    break
                await anyio.sleep(min(left_s, 1.0))
            tasks.cancel_scope.cancel()

    async def _pass_on(self, here: Stream, data: bytes, there: Stream, scope: anyio.CancelScope) -> None:
        try:
            while True:
                if data:
                    await self._meter.spend(len(data))
                    await there.send(data)
                    self.passed_bytes += len(data)
                    self._active_s = anyio.current_time()
                data = await here.receive(_RECEIVE_BYTES)
        except anyio.EndOfStream:
            self._ended += 1
            try:
                await there.send_eof()
            except (anyio.BrokenResourceError, anyio.ClosedResourceError):
                scope.cancel()
        except (anyio.BrokenResourceError, anyio.ClosedResourceError, PeerBusy):
            scope.cancel()
        if self._ended == 2:
            scope.cancel()


class _Meter:
    """What was passed on, and what may be."""

    def __init__(self, config: RelayConfig) -> None:
        self._config = config
        self._day_began_s = -_DAY_S
        self._due_s = 0.0  # when all that was passed on so far is within the limit of a second
        self.passed_bytes = 0
        self.day_bytes = 0

    def check(self) -> None:
        """See whether anything may be passed on today."""
        now_s = anyio.current_time()
        if now_s - self._day_began_s >= _DAY_S:
            self._day_began_s, self.day_bytes = now_s, 0
        limit = self._config.day_bytes
        if limit is not None and self.day_bytes >= limit:
            left_s = self._day_began_s + _DAY_S - now_s
            raise PeerBusy(f"this relay has passed on its {limit} bytes of the day", retry_after_s=left_s)

    async def spend(self, nbytes: int) -> None:
        """Wait until some bytes are within the limit of a second, and note them."""
        self.check()
        self.passed_bytes += nbytes
        self.day_bytes += nbytes
        limit = self._config.second_bytes
        if limit is not None:
            now_s = anyio.current_time()
            self._due_s = max(self._due_s, now_s) + nbytes / limit
            await anyio.sleep(self._due_s - now_s)
