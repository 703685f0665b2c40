"""One generation over one chain: a session on every hop, and the walk of each step through them."""

# N packed tokens, D model width

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import anyio
import torch

from corolla.client.directory import AsyncSwarm, ModelRouter, Target
from corolla.client.retry import try_chains
from corolla.codec import check_preference, decode, encode
from corolla.errors import Error, PeerTimeout, SessionClosed
from corolla.swarm import Channel
from corolla.telemetry import event, logger
from corolla.terms import Chain, Hop, PeerId
from corolla.wire import (
    Closed,
    CloseSession,
    OpenSession,
    Output,
    SessionOpened,
    SessionState,
    Step,
    Timing,
    expect,
    split_payload,
)
from corolla.wire.limits import MAX_PAYLOAD_BYTES

__all__ = ["HopTiming", "Session", "StepResult", "StepTokens", "limit"]

_LOG = logger(__name__)


class HopTiming(NamedTuple):
    """Where one hop's share of a step went, in seconds.

    Args:
        hop: Which hop.
        total_s: From sending to having decoded the answer.
        queue_s: Waiting at the server.
        compute_s: Computing at the server.
    """

    hop: Hop
    total_s: float
    queue_s: float
    compute_s: float

    @property
    def network_s(self) -> float:
        """What is left: encoding, sending, decoding."""
        return max(0.0, self.total_s - self.queue_s - self.compute_s)


class StepResult(NamedTuple):
    """What came of a step.

    Args:
        hidden_ND: The last block's output for the step's tokens.
        taps: The outputs of the blocks that were asked for, by block.
    """

    hidden_ND: torch.Tensor
    taps: dict[int, torch.Tensor]


@dataclass(frozen=True, slots=True)
class StepTokens:
    """New tokens of a session's rows: row ``i`` keeps ``starts[i]`` tokens and gets ``counts[i]`` of ``hidden_ND``."""

    hidden_ND: torch.Tensor
    starts: tuple[int, ...]
    counts: tuple[int, ...]
    order: tuple[int, ...] | None = None

    def pieces(self, limit_tokens: int) -> Iterator["StepTokens"]:
        """Cut the step into steps of at most ``limit_tokens`` tokens that do the same one after another."""
        total = len(self.hidden_ND)
        for first in range(0, total, limit_tokens):
            last = min(first + limit_tokens, total)
            starts, counts, offset = [], [], 0
            for start, count in zip(self.starts, self.counts, strict=True):
                done = min(max(first - offset, 0), count)
                starts.append(start + done)
                counts.append(min(max(last - offset, 0), count) - done)
                offset += count
            order = self.order if first == 0 else None
            yield StepTokens(self.hidden_ND[first:last], tuple(starts), tuple(counts), order)


class _HopSession:
    """A session's end at one hop."""

    def __init__(self, hop: Hop, channel: Channel, codec: str, limit_s: float) -> None:
        self.hop = hop
        self._channel = channel
        self._codec = codec
        self._limit_s = limit_s
        self._state = SessionState()

    async def open(self, opening: OpenSession, limit_s: float) -> None:
        self._state.sent(opening)
        with limit(self.hop, "opening a session", limit_s):
            await self._channel.send(opening, deadline_s=limit_s)
            received = await self._channel.receive()
        self._state.received(received.message)
        expect(received.message, SessionOpened, peer=self.hop.peer)

    async def step(self, tokens: StepTokens, taps: tuple[int, ...]) -> tuple[list[torch.Tensor], Timing]:
        encoded = encode(tokens.hidden_ND, self._codec)
        step = Step(starts=tokens.starts, counts=tokens.counts, order=tokens.order, taps=taps, hidden=encoded.meta)
        self._state.sent(step)
        with limit(self.hop, "a step", self._limit_s):
            await self._channel.send(step, encoded.buffers, deadline_s=self._limit_s)
            received = await self._channel.receive()
        self._state.received(received.message)
        output = expect(received.message, Output, peer=self.hop.peer)
        parts = split_payload(received.payload, [meta.nbytes for meta in output.tensors])
        tensors = [decode(meta, part) for meta, part in zip(output.tensors, parts, strict=True)]
        return tensors, output.timing

    @property
    def is_open(self) -> bool:
        return self._state.state == "open"

    async def close(self) -> None:
        """End the session in peace, so that the channel can be used again; or else end the channel."""
        try:
            closing = CloseSession()
            self._state.sent(closing)
            with limit(self.hop, "closing a session", 2.0):
                await self._channel.send(closing)
                received = await self._channel.receive()
            self._state.received(received.message)
            expect(received.message, Closed, peer=self.hop.peer)
        except Error as error:
            event(_LOG, "session not closed in peace", level=logging.DEBUG, peer=self.hop.peer[:8], code=error.code)
            await self._channel.aclose()


class Session:
    """A generation: rows of tokens whose keys and values the chain's servers hold.

    Args:
        swarm: Where to find servers.
        target: Which blocks of which weights to run.
        rows: How many rows there are.
        max_tokens: How many tokens each row is expected to reach.

    Attributes:
        chain: The servers in use; ``None`` before :meth:`open`.
        timings: For each hop, where its share of the last step went.
    """

    def __init__(self, swarm: AsyncSwarm, target: Target, *, rows: int, max_tokens: int) -> None:
        self._swarm = swarm
        self._target = target
        check_preference(target.codec)
        self._rows = rows
        self._max_tokens = max_tokens
        self._hops: list[_HopSession] = []
        self._stack = AsyncExitStack()
        self._failure: Error | None = None
        self.chain: Chain | None = None
        self.timings: tuple[HopTiming, ...] = ()

    async def open(self) -> None:
        """Choose a chain and open a session on each of its hops, all at once.

        Raises:
            NoChain: If some blocks have no server with room for the session.
            Error: What the last server said, after ``config.attempts`` chains.
        """
        router = ModelRouter(self._swarm, self._target, tokens=self._rows * self._max_tokens)
        await try_chains(router, self._open_on, attempts=self._swarm.config.attempts)

    async def step(self, tokens: StepTokens, *, taps: Sequence[int] = ()) -> StepResult:
        """Run new tokens through all blocks. One step at a time.

        Args:
            tokens: The tokens, as the first block's input.
            taps: Absolute indices of blocks whose outputs are wanted as well.

        Raises:
            SessionClosed: If the session is not open, or has failed before.
            PeerError: If a hop failed; the session is over.
            Error: What a hop answered; if it refused the step, the session is as it was.
        """
        if self.chain is None or self._failure is not None:
            raise SessionClosed(f"the session is not open{f': {self._failure}' if self._failure else ''}")
        limit_tokens = max(1, MAX_PAYLOAD_BYTES // (tokens.hidden_ND[0].nbytes * (1 + len(taps))))
        try:
            results = [await self._walk(piece, taps) for piece in tokens.pieces(limit_tokens)]
        except Error as error:
            if not all(hop.is_open for hop in self._hops):
                await self._fail(error)
            raise
        except BaseException:
            await self._fail(SessionClosed("a step was interrupted"))
            raise
        if len(results) == 1:
            return results[0]
        joined = {block: torch.cat([result.taps[block] for result in results]) for block in taps}
        return StepResult(torch.cat([result.hidden_ND for result in results]), joined)

    async def close(self) -> None:
        """End the session on every hop; the servers free its pages. Doing it twice does no harm."""
        self._failure = self._failure or SessionClosed("it was closed")
        hops, self._hops = self._hops, []
        async with anyio.create_task_group() as tasks:
            for hop in hops:
                tasks.start_soon(hop.close)
        await self._stack.aclose()

    async def _open_on(self, chain: Chain) -> None:
        config = self._swarm.config
        async with AsyncExitStack() as stack:
            hops: dict[int, _HopSession] = {}
            failures: list[Error] = []

            async def open_hop(index: int, hop: Hop) -> None:
                try:
                    channel = await stack.enter_async_context(self._swarm.dial(hop))
                    session = _HopSession(hop, channel, self._target.codec, config.step_s)
                    opening = OpenSession(
                        model=self._target.model,
                        span=hop.span,
                        rows=self._rows,
                        max_tokens=self._max_tokens,
                        codec=self._target.codec,
                    )
                    await session.open(opening, config.open_s)
                except Error as error:
                    error.peer = error.peer or hop.peer
                    failures.append(error)
                else:
                    hops[index] = session
                    self._swarm.praise(hop.peer)

            async with anyio.create_task_group() as tasks:
                for index, hop in enumerate(chain.hops):
                    tasks.start_soon(open_hop, index, hop)
            if failures:
                for session in hops.values():
                    await session.close()
                raise failures[0]
            self._stack = stack.pop_all()
            self._hops = [hops[index] for index in range(len(chain.hops))]
            self.chain = chain

    async def _walk(self, tokens: StepTokens, taps: Sequence[int]) -> StepResult:
        """Take tokens through all hops, one after another."""
        timings: list[HopTiming] = []
        tapped: dict[int, torch.Tensor] = {}
        for session in self._hops:
            hop = session.hop
            started_at_s = time.perf_counter()
            wanted = tuple(block for block in taps if block in hop.span)
            try:
                (hidden_ND, *extra), timing = await session.step(tokens, wanted)
            except Error as error:
                error.peer = error.peer or hop.peer
                raise
            timings.append(HopTiming(hop, time.perf_counter() - started_at_s, timing.queue_s, timing.compute_s))
            tapped.update(zip(wanted, extra, strict=True))
            tokens = StepTokens(hidden_ND, tokens.starts, tokens.counts, tokens.order)
        self.timings = tuple(timings)
        return StepResult(tokens.hidden_ND, tapped)

    async def _fail(self, error: Error) -> None:
        """End a session that cannot go on, because hops may now hold different tokens."""
        self._failure = error
        if error.peer is not None:
            self._swarm.blame(PeerId(error.peer), error)
        with anyio.CancelScope(shield=True):
            await self.close()


@contextmanager
def limit(hop: Hop, what: str, limit_s: float) -> Iterator[None]:
    """Give a hop so many seconds.

    Raises:
        PeerTimeout: If it takes longer.
    """
    try:
        with anyio.fail_after(limit_s):
            yield
    except TimeoutError as error:
        message = f"peer {hop.peer[:8]} (blocks {hop.span}) did not answer {what} within {limit_s:.0f} s"
        raise PeerTimeout(message, peer=hop.peer) from error
