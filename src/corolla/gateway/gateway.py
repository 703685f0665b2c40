"""What the endpoints have in common: who asks, how many answers are computed at once, and what they cost."""

from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

import anyio

from corolla.engine import give_back
from corolla.errors import GatewayBusy, InvalidRequest, ungrouped
from corolla.gateway.accounts import Account, Accounts
from corolla.gateway.catalog import Catalog
from corolla.gateway.config import GatewayConfig
from corolla.gateway.generation import Answer, Generation, Piece, Question
from corolla.gateway.metrics import GatewayMetrics
from corolla.gateway.sessions import KeptSessions
from corolla.gateway.telling import Telling

__all__ = ["Gateway", "Tell"]

Tell = Callable[[int, Answer, Piece], Coroutine[Any, Any, None]]
"""Is given each piece, in order, with its answer's number and the answer so far."""

_T = TypeVar("_T")
_LOOKS_PER_LIFE = 4
_GIVE_BACK_S = 30.0
"""Answers leave holes between what stays; so often they are returned to the system, or memory would grow for hours."""


class Gateway:
    """Answers questions. Use it as an async context manager; its methods belong to one event loop.

    Args:
        catalog: What is offered.
        accounts: Who may ask.
        config: How much.

    Attributes:
        catalog: What is offered.
        config: How much.
        kept: Sessions between turns.
        metrics: What it tells of itself.
    """

    def __init__(self, catalog: Catalog, accounts: Accounts, config: GatewayConfig) -> None:
        self.catalog = catalog
        self.config = config
        self.kept = KeptSessions(config)
        self._accounts = accounts
        self._stack = AsyncExitStack()
        self._threads = anyio.CapacityLimiter(config.max_answers)
        self._lookups = anyio.CapacityLimiter(8)
        self._under_way = 0
        self.metrics = GatewayMetrics(lambda: self._under_way, lambda: len(self.kept))

    async def __aenter__(self) -> Self:
        tasks = await self._stack.enter_async_context(anyio.create_task_group())
        self._stack.callback(tasks.cancel_scope.cancel)
        tasks.start_soon(self._drop_old)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with anyio.CancelScope(shield=True):  # bounded: see the session's close
            await anyio.to_thread.run_sync(self.kept.close)
        await self._stack.__aexit__(kind, error, trace)

    async def admit(self, key: str | None) -> Account:
        """Let a request in.

        Args:
            key: Its API key.

        Raises:
            InvalidKey: If it is none, or is not in force.
            RateLimited: If it has had its requests of this minute.
            QuotaSpent: If it has had its tokens of this day.
            DatabaseFailed: If the database does not answer.
        """
        return await anyio.to_thread.run_sync(self._accounts.admit, key, limiter=self._lookups)

    async def answer(self, account: Account, questions: Sequence[Question], tell: Tell | None = None) -> list[Answer]:
        """Answer questions, all at once.

        Args:
            account: Who asks.
            questions: What is asked.
            tell: Hears of each piece.

        Raises:
            InvalidRequest: If they are too many.
            GatewayBusy: If too many others are under way.
            Error: What the swarm raises.
        """
        if len(questions) > self.config.max_choices:
            raise InvalidRequest(
                f"{len(questions)} answers are more than the {self.config.max_choices} of a request", field="n"
            )
        with self._counted(len(questions)):
            tellings = [None if tell is None else Telling(partial(tell, index)) for index in range(len(questions))]
            generations = [
                Generation(question, None if telling is None else telling.put, self.kept)
                for question, telling in zip(questions, tellings, strict=True)
            ]
            try:
                with ungrouped():
                    async with anyio.create_task_group() as tasks:
                        for generation, telling in zip(generations, tellings, strict=True):
                            tasks.start_soon(self._generate, generation, telling)
            finally:
                read = sum(len(tokens) for tokens in {tuple(one.tokens) for one in questions})
                answers = [generation.answer for generation in generations]
                self.metrics.note_answers(questions[0].operation, questions[0].offer.name, answers, read)
                await self.record(account, read, sum(answer.tokens for answer in answers))
        return answers

    async def _generate(self, generation: Generation, telling: Telling | None) -> None:
        if telling is None:
            await generation.run(self._threads)
            return
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(telling.run)
            await generation.run(self._threads)
            telling.end()

    async def run(self, functions: Sequence[Callable[[], _T]]) -> list[_T]:
        """Run what is no generation on threads, one after another, as one answer under way.

        Args:
            functions: What to run.

        Raises:
            GatewayBusy: If too many answers are under way.
            Error: What they raise.
        """
        with self._counted(1):
            return [await anyio.to_thread.run_sync(one, limiter=self._threads) for one in functions]

    async def record(self, account: Account, read_tokens: int, written_tokens: int) -> None:
        """Write down what a request has cost, also when whoever asked has gone.

        Raises:
            DatabaseFailed: If the database does not answer.
        """
        with anyio.CancelScope(shield=True):  # bounded: the database answers or fails
            await anyio.to_thread.run_sync(
                self._accounts.record, account, read_tokens, written_tokens, limiter=self._lookups
            )

    @contextmanager
    def _counted(self, answers: int) -> Iterator[None]:
        if self._under_way + answers > self.config.max_answers:
            raise GatewayBusy(f"{self._under_way} answers are under way here, of {self.config.max_answers} at most")
        self._under_way += answers
        try:
            yield
        finally:
            self._under_way -= answers

    async def _drop_old(self) -> None:
        while True:
            await anyio.sleep(min(self.config.kept_s / _LOOKS_PER_LIFE, _GIVE_BACK_S))
            await anyio.to_thread.run_sync(self.kept.drop_old)
            await anyio.to_thread.run_sync(give_back)
