"""One generation over one chain: the walk of each step through its hops, and going on when a hop fails."""

# N packed tokens, D model width

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import anyio
import torch

from corolla.client.directory import AsyncSwarm
from corolla.client.live_chain import LiveChain
from corolla.client.need import Need
from corolla.client.retry import try_chains
from corolla.client.steps import Answer, HopTiming, Replay, StepResult, StepTokens
from corolla.client.target import Target
from corolla.client.trace import Trace
from corolla.codec import all_finite, check_preference
from corolla.errors import Error, SessionClosed, UsageError
from corolla.terms import Chain
from corolla.wire.limits import MAX_PAYLOAD_BYTES

__all__ = ["Session"]

_AT_ONCE = 4
"""Pieces of a prompt that are under way at the same time, each at another hop."""


class Session:
    """A generation: rows of tokens whose keys and values the chain's servers hold.

    When a server fails, another is given the same tokens and the step goes on; the session ends only when it is closed.

    Args:
        swarm: Where to find servers.
        target: Which blocks of which weights to run.
        rows: How many rows there are.
        max_tokens: How many tokens each row is expected to reach.
        prompt_tokens: How many tokens, over all rows, the first step is expected to have.
        token_bytes: How many bytes the hidden state of a token takes on its way. Both help to choose the chain.

    Attributes:
        timings: For each hop, where its share of the last step went.

    Raises:
        CodecError: If there is no codec of the target's name.
    """

    def __init__(
        self,
        swarm: AsyncSwarm,
        target: Target,
        *,
        rows: int,
        max_tokens: int,
        prompt_tokens: int = 0,
        token_bytes: float = 0,
    ) -> None:
        check_preference(target.codec)
        self._swarm = swarm
        self._hops = LiveChain(swarm, Need(target, rows, max_tokens, prompt_tokens, token_bytes))
        self._is_open = False
        self._ended = ""
        self.timings: tuple[HopTiming, ...] = ()

    @property
    def chain(self) -> Chain | None:
        """The servers in use; ``None`` before :meth:`open` and after the end."""
        return self._hops.chain

    @property
    def trace(self) -> Trace:
        """What happened, in order."""
        return self._hops.trace

    @property
    def replays(self) -> tuple[Replay, ...]:
        """What servers were given because others had failed."""
        return tuple(self._hops.replays)

    async def open(self) -> None:
        """Choose a chain and open a session on each of its hops, all at once.

        Raises:
            NoChain: If some blocks have no server with room for the session.
            Error: What the last server said, after ``config.attempts`` chains.
        """
        try:
            async with self._hops.stepping:
                self._hops.begin()
                await self._try(self._hops.fill)
        except BaseException:
            await self._hops.close()
            raise
        self._is_open = True
        self._swarm.close_with(self.close)

    async def step(self, tokens: StepTokens, *, taps: Sequence[int] = ()) -> StepResult:
        """Run new tokens through all blocks. One step at a time.

        A step that failed has left no trace, and may be tried again.

        Args:
            tokens: The tokens, as the first block's input.
            taps: Absolute indices of blocks whose outputs are wanted as well.

        Raises:
            SessionClosed: If the session is not open, or has ended.
            UsageError: If a number is nan or infinite.
            NoChain: If some blocks have no server left with room for the session.
            Error: What the last server said, after ``config.attempts`` failures; or why none would take the step.
        """
        if self._ended or not self._is_open:
            raise self._closed()
        if not all_finite([tokens.hidden_ND]):
            raise UsageError("a step was given hidden states that are nan or infinite; see what made them")
        limit_tokens = max(1, MAX_PAYLOAD_BYTES // (tokens.hidden_ND[0].nbytes * (1 + len(taps))))
        walk = _Walk([*tokens.pieces(min(limit_tokens, self._swarm.config.piece_tokens))], tuple(taps))
        began_s = time.perf_counter()
        async with self._hops.stepping:
            mark = self._hops.begin()
            try:
                await self._try(partial(self._go, walk))
            except Error:
                await self._hops.rollback(mark)
                raise
            except BaseException:
                self._ended = "a step was interrupted"
                with anyio.CancelScope(shield=True):  # bounded: see HopSession.close
                    await self.close()
                raise
        self.timings = tuple(walk.timings[start] for start in sorted(walk.timings))
        self.trace.step(len(tokens.hidden_ND), time.perf_counter() - began_s, self.timings)
        return walk.result()

    async def close(self) -> None:
        """End the session on every hop; the servers free its pages. Doing it twice does no harm."""
        self._ended = self._ended or "it was closed"
        self.trace.end()
        self._swarm.closed(self.close)
        await self._hops.close()

    async def _try(self, attempt: Callable[[Chain], Awaitable[None]]) -> None:
        """Try something on the chain, and again whenever it has been mended, until it succeeds."""

        async def attempt_unless_closed(chain: Chain) -> None:
            try:
                await attempt(chain)
            except Error as error:
                if self._ended:  # closed meanwhile, which is why it failed
                    raise self._closed() from error
                raise

        config = self._swarm.config
        await try_chains(self._hops, attempt_unless_closed, attempts=config.attempts)

    async def _go(self, walk: "_Walk", chain: Chain) -> None:
        """Take a step on from where it stands, once the chain is whole."""
        await self._hops.fill(chain)
        while walk.pieces or self._hops.under_way:
            while walk.pieces and self._hops.under_way < _AT_ONCE:
                await self._hops.send(walk.pieces.pop(0), walk.taps)
            answer = await self._hops.answer()
            walk.note(answer, is_last=answer.hop.span.stop == chain.span.stop)

    def _closed(self) -> SessionClosed:
        return SessionClosed(f"the session is over: {self._ended or 'it was never opened'}; open another one")


@dataclass(slots=True)
class _Walk:
    """How far a step has come, and what has come of it.

    Attributes:
        pieces: What was not sent yet.
        taps: Blocks whose outputs are wanted as well.
        timings: For each hop, by its first block, where its share of the latest piece went.
    """

    pieces: list[StepTokens]
    taps: tuple[int, ...]
    timings: dict[int, HopTiming] = field(default_factory=dict)
    _outputs: dict[int, torch.Tensor] = field(default_factory=dict)
    _tapped: dict[int, dict[int, torch.Tensor]] = field(default_factory=dict)
    _heard_at_s: float = field(default_factory=time.perf_counter)

    def note(self, answer: Answer, *, is_last: bool) -> None:
        """Note what a hop says of a piece."""
        tensors = [*answer.tensors]
        if is_last:
            self._outputs[answer.number] = tensors.pop(0)
        for block, tap_ND in zip([one for one in self.taps if one in answer.hop.span], tensors, strict=True):
            self._tapped.setdefault(block, {})[answer.number] = tap_ND
        now_s, (queue_s, compute_s) = time.perf_counter(), (answer.timing.queue_s, answer.timing.compute_s)
        total_s = max(now_s - self._heard_at_s, queue_s + compute_s)
        earlier = self.timings.get(answer.hop.span.start)
        found = answer.timing.found_tokens + (earlier.found_tokens if earlier else 0)
        self.timings[answer.hop.span.start] = HopTiming(answer.hop, total_s, queue_s, compute_s, found)
        self._heard_at_s = now_s

    def result(self) -> StepResult:
        """Join what came of the pieces."""
        return StepResult(_join(self._outputs), {block: _join(taps) for block, taps in self._tapped.items()})


def _join(pieces: dict[int, torch.Tensor]) -> torch.Tensor:
    ordered = [pieces[number] for number in sorted(pieces)]
    return ordered[0] if len(ordered) == 1 else torch.cat(ordered)
