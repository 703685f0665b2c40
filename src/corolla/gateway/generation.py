"""One answer of a model: generated on a thread by transformers' ``generate``, told piece by piece, stopped when asked.

Knows nothing of HTTP and of how requests look.
"""

# B batch (always 1), P prompt and answer so far, T prompt, V vocabulary

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import anyio
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from corolla.client import GenerationSession, Replay
from corolla.errors import CacheFull, Error, NoChain, PeerBusy, SessionClosed
from corolla.gateway.catalog import Offer
from corolla.gateway.grammar import Form
from corolla.gateway.sampling import Chooser, Sampling, TokenLog, log_tokens
from corolla.gateway.sessions import KeptSessions
from corolla.gateway.text import Spelling, StopFinder
from corolla.telemetry.metrics import Operation
from corolla.terms import Chain

__all__ = ["Answer", "Generation", "Piece", "Question", "Reason"]

Reason = Literal["stop", "length"]
_SCORED_AT_ONCE = 128
"""Prompt tokens whose logits are in memory at the same time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What a model is asked.

    Args:
        owner: Whose sessions it may go on with.
        offer: Which model.
        tokens: The prompt.
        limit_tokens: The longest answer; 0 for none.
        sampling: How to choose its tokens.
        stops: Strings that end it.
        form: The form that it must have.
        shows_special: Whether special tokens are part of its text.
        scores_prompt: Whether to say how likely the prompt was.
        operation: What the request is called in metrics.
    """

    owner: str
    offer: Offer
    tokens: list[int]
    limit_tokens: int
    sampling: Sampling
    stops: tuple[str, ...] = ()
    form: Form | None = None
    shows_special: bool = False
    scores_prompt: bool = False
    operation: Operation = "text_completion"


@dataclass(frozen=True, slots=True)
class Piece:
    """What is new of an answer.

    Args:
        text: The text; empty if only something else is new.
        logs: The tokens, if they are to be told.
    """

    text: str
    logs: tuple[TokenLog, ...] = ()


@dataclass(slots=True)
class Answer:
    """What came of a question.

    Attributes:
        text: All of it.
        logs: Its tokens, if they are to be told.
        prompt_logs: The prompt's, if they are to be told.
        reason: Why it ended.
        tokens: How many were generated.
        cached_tokens: How many of the prompt the servers knew already.
        first_s: From the question to the first token.
        rest_s: From the first to the last.
        session: Where it was computed.
        earlier_replays: How many servers had been replaced in its session before.
    """

    text: str = ""
    logs: list[TokenLog] = field(default_factory=list)
    prompt_logs: list[TokenLog] = field(default_factory=list)
    reason: Reason = "length"
    tokens: int = 0
    cached_tokens: int = 0
    first_s: float = 0.0
    rest_s: float = 0.0
    session: GenerationSession | None = None
    earlier_replays: int = 0

    @property
    def chain(self) -> Chain | None:
        """The servers that compute it."""
        return None if self.session is None else self.session.chain

    @property
    def replays(self) -> Sequence[Replay]:
        """What servers were given because others had failed meanwhile."""
        return () if self.session is None else self.session.replays[self.earlier_replays :]


class Generation:
    """The making of one answer.

    Args:
        question: What is asked.
        tell: Is given each piece, and the answer so far, on the thread that generates; ``None`` if nobody listens.
        kept: Where sessions are between turns.

    Attributes:
        answer: What has come of it so far.
    """

    def __init__(self, question: Question, tell: Callable[["Answer", Piece], None] | None, kept: KeptSessions) -> None:
        self.answer = Answer()
        self._question = question
        self._kept = kept
        self._tell = tell
        self._is_done = False

    async def run(self, limiter: anyio.CapacityLimiter) -> Answer:
        """Generate on a thread; if this is cancelled, the servers' pages are free again before it ends.

        Args:
            limiter: How many threads there may be.

        Raises:
            Error: What the swarm raises.
        """
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._abort_when_cancelled)
                await anyio.to_thread.run_sync(self._generate, limiter=limiter)
                tasks.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            raise _first(group) from None
        return self.answer

    async def _abort_when_cancelled(self) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            session = self.answer.session
            if not self._is_done and session is not None:
                with anyio.CancelScope(shield=True):  # bounded: see the session's close
                    await anyio.to_thread.run_sync(session.close)

    def _generate(self) -> None:
        try:
            try:
                self._ask()
            except (CacheFull, PeerBusy, NoChain):
                if self.answer.tokens or not self._kept.drop_all():
                    raise
                self._ask()  # what was kept for later turns has made room
        except SessionClosed:
            anyio.from_thread.check_cancelled()  # that is why it was closed
            raise
        finally:
            self._is_done = True

    def _ask(self) -> None:
        question, answer = self._question, self.answer
        room_tokens = len(question.tokens) + question.limit_tokens
        if question.scores_prompt:
            session = question.offer.model.session(room_tokens)
        else:
            session = self._kept.take(question.owner, question.offer, question.tokens, room_tokens)
        answer.session, answer.cached_tokens = session, session.position
        answer.earlier_replays = len(session.replays)
        try:
            self._answer(session)
        except BaseException:
            with suppress(Error):
                session.close()
            raise
        self._kept.give(question.owner, question.offer, session)

    @torch.inference_mode()
    def _answer(self, session: GenerationSession) -> None:
        question, answer = self._question, self.answer
        started_at_s = time.perf_counter()
        tokens_BT = torch.tensor([question.tokens])
        if question.scores_prompt:
            self._score_prompt(session, tokens_BT)
        if not question.limit_tokens:
            return
        matcher = None if question.form is None else question.offer.grammars.start(question.form)
        chooser = Chooser(question.sampling, len(question.tokens), matcher)
        listener = _Listener(self, chooser)
        question.offer.model.generate(
            tokens_BT,
            attention_mask=torch.ones_like(tokens_BT),
            session=session,
            logits_processor=[chooser],
            stopping_criteria=StoppingCriteriaList([listener]),
            max_new_tokens=question.limit_tokens,
            do_sample=False,
        )
        listener.end()
        answer.first_s = listener.first_at_s - started_at_s
        answer.rest_s = listener.last_at_s - listener.first_at_s

    def _score_prompt(self, session: GenerationSession, tokens_BT: torch.Tensor) -> None:
        top, tokens = self._question.sampling.logprobs or 0, self._question.tokens
        logs = [TokenLog(tokens[0], None, ())]
        for start in range(0, len(tokens), _SCORED_AT_ONCE):
            anyio.from_thread.check_cancelled()
            piece_BT = tokens_BT[:, start : start + _SCORED_AT_ONCE]
            logits_TV = self._question.offer.model(piece_BT, past_key_values=session, use_cache=True).logits[0].cpu()
            following = tokens[start + 1 : start + 1 + len(logits_TV)]
            logs += log_tokens(logits_TV[: len(following)], following, top)
        self.answer.prompt_logs = logs

    def hear(self, piece: Piece) -> None:
        """Note a piece, and tell it."""
        if piece.text or piece.logs:
            self.answer.text += piece.text
            self.answer.logs += piece.logs
            if self._tell is not None:
                self._tell(self.answer, piece)

    @property
    def question(self) -> Question:
        """What is asked."""
        return self._question


class _Listener(StoppingCriteria):  # type: ignore[misc]  # transformers has no types
    """Hears of each token, spells it, and says when the answer is over."""

    def __init__(self, generation: Generation, chooser: Chooser) -> None:
        question = generation.question
        self._generation = generation
        self._chooser = chooser
        self._end_tokens = question.offer.end_tokens
        self._stops = StopFinder(question.stops)
        self._spelling = Spelling(
            lambda tokens: question.offer.decode(tokens, skip_special=not question.shows_special), question.tokens
        )
        self.first_at_s = self.last_at_s = 0.0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        anyio.from_thread.check_cancelled()
        answer, token = self._generation.answer, int(input_ids[0, -1])
        self.last_at_s = time.perf_counter()
        self.first_at_s = self.first_at_s or self.last_at_s
        answer.tokens += 1
        logs, self._chooser.logs = tuple(self._chooser.logs), []
        if token in self._end_tokens:
            answer.reason = "stop"
        else:
            self._generation.hear(Piece(self._stops.push(self._spelling.push(token)), logs))
            if self._stops.found is not None:
                answer.reason = "stop"
        return torch.full((1,), answer.reason == "stop")

    def end(self) -> None:
        """Tell what was held back."""
        rest = self._stops.push(self._spelling.end()) + self._stops.end()
        if self._stops.found is not None:
            self._generation.answer.reason = "stop"
        self._generation.hear(Piece(rest))


def _first(group: BaseExceptionGroup) -> BaseException:
    """Give the first error of a group that says something."""
    rest: list[BaseException] = [group]
    while rest:
        first = rest.pop(0)
        if not isinstance(first, BaseExceptionGroup):
            return first
        rest = [*first.exceptions, *rest]
    return group
