"""One generation over one chain: a session on every hop, and the walk of each step through them."""

# N packed tokens, D model width

import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import NamedTuple

import anyio
import torch

from corolla.client.directory import AsyncSwarm, ModelRouter, Target
from corolla.client.hop import HopSession
from corolla.client.retry import try_chains
from corolla.codec import check_preference
from corolla.errors import Error, SessionClosed
from corolla.terms import Chain, Hop, PeerId
from corolla.wire import OpenSession
from corolla.wire.limits import MAX_PAYLOAD_BYTES

__all__ = ["HopTiming", "Session", "StepResult", "StepTokens"]


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

    Raises:
        CodecError: If there is no codec of the target's name.
    """

    def __init__(self, swarm: AsyncSwarm, target: Target, *, rows: int, max_tokens: int) -> None:
        check_preference(target.codec)
        self._swarm = swarm
        self._target = target
        self._rows = rows
        self._max_tokens = max_tokens
        self._hops: list[HopSession] = []
        self._stack = AsyncExitStack()
        self._ended: Error | None = None
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
        self._swarm.close_with(self.close)

    async def step(self, tokens: StepTokens, *, taps: Sequence[int] = ()) -> StepResult:
        """Run new tokens through all blocks. One step at a time.

        A step that a server refuses may be sent again, once its cause is gone: hops that have taken it by then rewind.

        Args:
            tokens: The tokens, as the first block's input.
            taps: Absolute indices of blocks whose outputs are wanted as well.

        Raises:
            SessionClosed: If the session is not open, or has ended before.
            PeerError: If a hop failed; the session is over.
            Error: What a hop answered; if it refused the step, the session goes on.
        """
        if self.chain is None or self._ended is not None:
            raise self._closed()
        limit_tokens = max(1, MAX_PAYLOAD_BYTES // (tokens.hidden_ND[0].nbytes * (1 + len(taps))))
        self.timings = ()
        try:
            results = [await self._walk(piece, taps) for piece in tokens.pieces(limit_tokens)]
        except Error as error:
            if self._ended is not None:  # closed meanwhile, which is why the step failed
                raise self._closed() from error
            if self._is_fatal(error, tokens):
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
        self._ended = self._ended or SessionClosed("it was closed")
        self._swarm.closed(self.close)
        stack, self._stack = self._stack, AsyncExitStack()
        hops, self._hops = self._hops, []
        async with stack:
            await _close_all(hops)

    async def _open_on(self, chain: Chain) -> None:
        config = self._swarm.config
        hops: dict[int, HopSession] = {}
        failures: list[Error] = []
        async with AsyncExitStack() as stack:

            async def open_hop(index: int, hop: Hop) -> None:
                try:
                    channel = await stack.enter_async_context(self._swarm.dial(hop))
                    hops[index] = HopSession(hop, channel, codec=self._target.codec, step_s=config.step_s)
                    opening = OpenSession(
                        model=self._target.model,
                        span=hop.span,
                        rows=self._rows,
                        max_tokens=self._max_tokens,
                        codec=self._target.codec,
                    )
                    await hops[index].open(opening, config.open_s)
                except Error as error:
                    error.peer = error.peer or hop.peer
                    failures.append(error)
                    tasks.cancel_scope.cancel()
                else:
                    self._swarm.praise(hop.peer)

            async with anyio.create_task_group() as tasks:
                for index, hop in enumerate(chain.hops):
                    tasks.start_soon(open_hop, index, hop)
            if not failures:
                self._stack = stack.pop_all()
                self._hops = [hops[index] for index in range(len(chain.hops))]
                self.chain = chain
                return
            await _close_all(list(hops.values()))
        raise failures[0]

    async def _walk(self, tokens: StepTokens, taps: Sequence[int]) -> StepResult:
        """Take tokens through all hops, one after another."""
        hidden_ND = tokens.hidden_ND
        tapped: dict[int, torch.Tensor] = {}
        timings: list[HopTiming] = []
        for session in self._hops:
            hop = session.hop
            wanted = tuple(block for block in taps if block in hop.span)
            began_s = time.perf_counter()
            (hidden_ND, *extra), timing = await session.step(
                hidden_ND, tokens.starts, tokens.counts, tokens.order, wanted
            )
            timings.append(HopTiming(hop, time.perf_counter() - began_s, timing.queue_s, timing.compute_s))
            self.timings = tuple(timings)
            tapped.update(zip(wanted, extra, strict=True))
        return StepResult(hidden_ND, tapped)

    def _is_fatal(self, error: Error, tokens: StepTokens) -> bool:
        """Say whether the session is over: a hop is lost or not to be trusted, or what the hops hold cannot be told.

        Rewinding undoes a step that some hops have taken and others refused; it does not undo a reordering.
        """
        is_torn = tokens.order is not None and bool(self.timings)
        is_lost = error.ban_s > 0 or isinstance(error, SessionClosed) or not all(hop.is_open for hop in self._hops)
        return is_torn or is_lost

    async def _fail(self, error: Error) -> None:
        """End a session that cannot go on."""
        self._ended = error
        if error.peer is not None:
            self._swarm.blame(PeerId(error.peer), error)
        with anyio.CancelScope(shield=True):
            await self.close()

    def _closed(self) -> SessionClosed:
        why = "it was never opened" if self._ended is None else self._ended.message
        return SessionClosed(f"the session is over: {why}; open another one")


async def _close_all(hops: Sequence[HopSession]) -> None:
    async with anyio.create_task_group() as tasks:
        for hop in hops:
            tasks.start_soon(hop.close)
