"""Messages in, messages out: what a server does on one stream.

Every request is answered, a refusal with its reason. Knows how messages and tensors meet the engine; nothing of how
the span came to be served.
"""

# B batch, T tokens, D model width, N packed tokens

from collections import Counter
from contextlib import ExitStack, suppress

import anyio
import torch

from corolla.blocks import Adapter
from corolla.cache import pages_for
from corolla.codec import check_preference, join_numbers
from corolla.engine import Engine, Sequences, SessionRows
from corolla.errors import Error, OutdatedView, PeerBusy, PeerTimeout, RemoteProtocolError, SessionExpired
from corolla.server.adapters import AdapterStore
from corolla.server.limits import PeerLimits
from corolla.server.line import Line
from corolla.server.outlet import Outlet
from corolla.server.session import ServedSession
from corolla.server.tensors import check_finite, decode_tensors, encode_tensors
from corolla.sharing import ServedShelf
from corolla.swarm import Channel, Presence, Reach, check_may_use
from corolla.terms import ModelId, PeerId, Span
from corolla.wire import (
    Ack,
    Adapt,
    Backward,
    Failure,
    Feed,
    Forward,
    Gradients,
    OpenSession,
    Output,
    ReachMessage,
    Resume,
    SessionOpened,
    Timing,
)
from corolla.wire.frames import Buffer
from corolla.wire.shelves import ShelfMessage

__all__ = ["Handler"]


class Handler:
    """Answers the streams that other peers open to a server.

    Args:
        gossip: What answers the swarm's own messages.
        outlet: What sessions send to other servers with.
        lease_s: A session that says nothing for so long is ended.
        reach: What answers who wants to be reached; ``None`` for nobody.
        limits: What one peer may have; ``None`` for the usual.
        adapters: Keeps the adapters that clients send; ``None`` to take none.

    Attributes:
        is_draining: Whether new sessions are turned away.
        adapters: The adapters that it has.
        refused: How many requests were refused, by the code of the error.
    """

    def __init__(
        self,
        gossip: Presence,
        outlet: Outlet,
        *,
        lease_s: float,
        reach: Reach | None = None,
        limits: PeerLimits | None = None,
        adapters: AdapterStore | None = None,
    ) -> None:
        self._gossip = gossip
        self._outlet = outlet
        self._reach = reach
        self.adapters = adapters or AdapterStore(0)
        self._lease_s = lease_s
        self._limits = limits or PeerLimits()
        self._served: tuple[Engine, ModelId] | None = None
        shelf = self.adapters.shelf
        self._shelf = None if shelf is None else ServedShelf(shelf, lambda: self._served and self._served[1])
        self._sessions: set[ServedSession] = set()
        self.is_draining = False
        self.refused = Counter[str]()

    def take_over(self, engine: Engine, model: ModelId) -> None:
        """Begin to serve; before, whoever asks for computing is told to come back.

        Args:
            engine: What computes.
            model: The weights that it has.
        """
        self._served = engine, model

    def release(self) -> None:
        """Serve nothing until the next :meth:`take_over`."""
        self._served = None

    async def serve(self, channel: Channel) -> None:
        """Answer one stream until the other side ends it.

        Raises:
            PeerLost: When it has ended.
            WireError: If the other side broke the protocol.
        """
        while True:
            received = await channel.receive()
            match received.message:
                case OpenSession() as message:
                    await self._serve_session(channel, message)
                case Forward() | Backward() as message:
                    await self._serve_request(channel, message, received.payload, received.deadline_s)
                case Resume() as message:
                    await self._resume_session(channel, message)
                case Adapt() as message:
                    await self._take_adapter(channel, message, received.payload)
                case Feed() as message:
                    await self._serve_feed(channel, message)
                case ReachMessage() as message if self._reach is not None:
                    await self._reach.handle(channel, message)
                case ShelfMessage() as message if self._shelf is not None:
                    await self._shelf.handle(channel, message)
                case message:
                    await self._gossip.handle(channel, message)

    async def _serve_request(
        self, channel: Channel, message: Forward | Backward, payload: memoryview, deadline_s: float | None
    ) -> None:
        try:
            check_may_use(channel)
            engine = self._engine_for(message.model, message.span)
            lending = self.adapters.lend(engine.span, message.span, message.adapters)
            with lending as adapter, anyio.fail_after(deadline_s):
                reply, buffers = await _compute(engine, message, payload, adapter, channel.peer)
        except Error as error:
            self.refused[error.code] += 1
            await channel.send(Failure.of(error))
        except TimeoutError:
            await channel.send(Failure.of(_too_late(deadline_s)))
        else:
            await channel.send(reply, buffers, deadline_s=deadline_s)

    async def _take_adapter(self, channel: Channel, message: Adapt, payload: memoryview) -> None:
        try:
            check_may_use(channel)
            engine = self._engine_for(message.model, Span(min(message.blocks), max(message.blocks) + 1))
            await self.adapters.take(engine.span, message, payload)
        except Error as error:
            self.refused[error.code] += 1
            await channel.send(Failure.of(error))
        else:
            await channel.send(Ack())

    async def _serve_session(self, channel: Channel, opening: OpenSession) -> None:
        line = Line(channel, opening, step_s=self._outlet.step_s, resume_s=self._outlet.resume_s)
        with ExitStack() as lending:
            try:
                check_may_use(channel)
                engine = self._engine_for(opening.model, opening.span)
                lent = self.adapters.lend(engine.span, opening.span, opening.adapters)
                rows = self._open_session(engine, opening, channel.peer, lending.enter_context(lent))
            except Error as error:
                self.refused[error.code] += 1
                await channel.send(Failure.of(error))
                return
            await self._run_session(line, opening, engine, rows)

    async def _run_session(self, line: Line, opening: OpenSession, engine: Engine, rows: SessionRows) -> None:
        session = ServedSession(line, opening, engine, rows, self._outlet)
        self._sessions.add(session)
        try:
            await line.tell(SessionOpened(lease_s=self._lease_s))
            await session.run(self._lease_s)
        finally:
            self._sessions.remove(session)
            engine.close_session(rows)

    def _open_session(self, engine: Engine, opening: OpenSession, peer: PeerId, adapter: Adapter | None) -> SessionRows:
        check_preference(opening.codec)
        if self.is_draining:
            raise PeerBusy("the server is leaving and takes no new sessions", retry_after_s=60.0)
        more = opening.rows * pages_for(opening.max_tokens)
        self._limits.check(peer, more, [one.holding for one in self._open_on(engine)], engine.kv_pages)
        scope = self._limits.scope(peer, opening.adapters)
        while True:
            try:
                return engine.open_session(
                    opening.span, opening.rows, opening.max_tokens, adapter, scope=scope, client=peer
                )
            except PeerBusy:
                if not self._make_room(engine, peer):
                    raise

    def _open_on(self, engine: Engine) -> list[ServedSession]:
        return [one for one in self._sessions if one.engine is engine and not one.rows.ended]

    def _make_room(self, engine: Engine, peer: PeerId) -> bool:
        """End a session for a peer that has none: one whose client is away, or that has to yield."""
        sessions = self._open_on(engine)
        if parked := next((one for one in sessions if one.line.is_parked), None):
            parked.line.is_parked = False
            parked.line.give_up()
            engine.close_session(parked.rows)
            return True
        index = self._limits.find_yielding(peer, [one.holding for one in sessions], engine.kv_pages)
        if index is None:
            return False
        silent_s = sessions[index].holding.silent_s
        sessions[index].expire(f"after {silent_s:.0f} s of silence, the session's room was needed by another peer")
        engine.close_session(sessions[index].rows)
        return True

    async def _resume_session(self, channel: Channel, resume: Resume) -> None:
        """Let a client go on with its session on another stream."""
        found = [one for one in self._sessions if one.line.key == resume.key and one.line.peer == channel.peer]
        try:
            check_may_use(channel)
            if not found or found[0].rows.ended:
                raise SessionExpired("the session is over; open another one")
        except Error as error:
            await channel.send(Failure.of(error))
            return
        (session,) = found
        await session.line.resume(channel, resume, SessionOpened(lease_s=self._lease_s, taken=session.taken))

    def expire_sessions(self) -> None:
        """End all leases at once, but for those of sessions that a step is computed for."""
        for session in self._sessions:
            session.expire()

    async def drop_sessions(self, client: PeerId | None = None) -> None:
        """Lose what sessions hold, and their streams, without a word, as a crash does.

        Args:
            client: Whose; ``None`` for all.
        """
        for session in [one for one in self._sessions if client in (None, one.line.peer)]:
            await session.line.drop()

    async def ask_to_leave(self, engine: Engine, left_s: float) -> None:
        """Tell the clients of an engine's sessions that it will be gone, so that they move.

        Args:
            engine: Which.
            left_s: How long it still computes.
        """
        async with anyio.create_task_group() as tasks:
            for session in [one for one in self._sessions if one.engine is engine]:
                tasks.start_soon(_tell_of_leaving, session, left_s)

    async def _serve_feed(self, channel: Channel, feed: Feed) -> None:
        """Let the hop before feed a session, until it is over or fed by another."""
        session = next((one for one in self._sessions if one.token == feed.token), None)
        if session is None:
            raise SessionExpired("no session here is fed with that token; it is over, or fed by another")
        await session.be_fed(channel)
        raise SessionExpired("the session is not fed on this stream any more")

    def _engine_for(self, wanted: ModelId, span: Span) -> Engine:
        """Give what computes; who asks for something that is not here has an old view of the swarm."""
        if self._served is None:
            raise PeerBusy("the server is still loading its blocks", retry_after_s=5.0)
        engine, model = self._served
        if wanted != model or not engine.span.span.covers(span):
            raise OutdatedView(
                f"blocks {span} of model {wanted[:12]} were asked of a server that has "
                f"{engine.span.span} of model {model[:12]}; look at the swarm again"
            )
        return engine


async def _tell_of_leaving(session: ServedSession, left_s: float) -> None:
    with suppress(Error), anyio.move_on_after(left_s):
        await session.leave(left_s)


def _too_late(deadline_s: float | None) -> PeerTimeout:
    return PeerTimeout(
        f"it was not done within the {deadline_s or 0:g} s that were given; ask for less at once, or give it more time"
    )


async def _compute(
    engine: Engine, message: Forward | Backward, payload: memoryview, adapter: Adapter | None, client: PeerId
) -> tuple[Output | Gradients, list[Buffer]]:
    metas = (message.hidden,) if isinstance(message, Forward) else message.tensors
    hidden_BTD, *grads_BTD = decode_tensors(engine, metas, payload, axes=3)
    if isinstance(message, Backward) and len(grads_BTD) != 1 + len(message.taps):
        raise RemoteProtocolError(f"{len(grads_BTD)} gradients came for an output and {len(message.taps)} taps")
    if any(grad_BTD.shape != hidden_BTD.shape for grad_BTD in grads_BTD):
        raise RemoteProtocolError("a gradient's shape differs from that of the input")
    rows, tokens = hidden_BTD.shape[:2]
    check_preference(message.codec)
    result = await engine.forward(
        message.span,
        Sequences(
            hidden_BTD,
            _integers(message.attention_mask, torch.uint8, rows, tokens),
            _integers(message.position_ids, torch.int32, rows, tokens),
            client,
        ),
        taps=message.taps,
        grads_BTD=tuple(grads_BTD) or None,
        adapter=adapter,
        trains=isinstance(message, Backward) and message.trains,
    )
    if isinstance(message, Forward):  # gradients may overflow: whoever scales a loss counts on it
        check_finite([hidden_BTD], result.tensors, engine, adapter)
    if isinstance(message, Forward) or len(result.tensors) == 1:
        tensors, buffers = encode_tensors(result.tensors, message.codec)
    else:  # what trains is small, and rounding it would show
        input_grad_BTD, *adapter_grads = result.tensors
        tensors, buffers = encode_tensors((input_grad_BTD,), message.codec)
        adapter_tensors, adapter_buffers = encode_tensors((join_numbers(adapter_grads),), "raw")
        tensors, buffers = (*tensors, *adapter_tensors), [*buffers, *adapter_buffers]
    answer = Output if isinstance(message, Forward) else Gradients
    return answer(tensors=tensors, timing=Timing(result.queue_s, result.compute_s)), buffers


def _integers(data: bytes | None, dtype: torch.dtype, rows: int, tokens: int) -> torch.Tensor | None:
    """Read integers ``[B, T]`` that came inside a message."""
    if data is None:
        return None
    if len(data) != rows * tokens * dtype.itemsize:
        raise RemoteProtocolError(f"{len(data)} bytes of {dtype} came for {rows} x {tokens} tokens")
    return torch.frombuffer(bytearray(data), dtype=dtype).view(rows, tokens).long()
