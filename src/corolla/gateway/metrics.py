"""What the gateway tells Prometheus: how long requests take, what they cost, and what is under way."""

import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, ParamSpec, TypeVar

import anyio
from prometheus_client import CollectorRegistry, Counter, ProcessCollector

from corolla.errors import Error, ungrouped
from corolla.gateway.catalog import Offer
from corolla.gateway.generation import Answer
from corolla.telemetry.metrics import GenerationMetrics, Operation, Reading, Readings

__all__ = ["GatewayMetrics"]

_P = ParamSpec("_P")
_T = TypeVar("_T")


class GatewayMetrics:
    """The metrics of one gateway.

    Args:
        under_way: Gives how many answers are being computed.
        kept: Gives how many sessions are kept between turns.

    Attributes:
        registry: Where they all are.
    """

    def __init__(self, under_way: Callable[[], int], kept: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        self._generation = GenerationMetrics(self.registry)
        labels = ["gen_ai_request_model"]
        self._cached = Counter(
            "corolla_gateway_cached_tokens", "Of prompts, known to servers already.", labels, registry=self.registry
        )
        self._replays = Counter(
            "corolla_gateway_replays", "Servers replaced during answers.", labels, registry=self.registry
        )
        Readings(
            self.registry,
            [
                Reading("corolla_gateway_answers", "Being computed.", under_way),
                Reading("corolla_gateway_kept_sessions", "Kept on servers between turns.", kept),
            ],
        )
        ProcessCollector(registry=self.registry)

    def timed(
        self, operation: Operation, function: Callable[_P, Awaitable[_T]], offer: Offer
    ) -> Callable[_P, Coroutine[Any, Any, _T]]:
        """Have it noted how long a request takes and what ends it.

        Args:
            operation: What is asked for.
            function: What answers.
            offer: The model that is asked.

        Returns:
            The function, which raises what it did.
        """

        async def run(*args: _P.args, **kwargs: _P.kwargs) -> _T:
            began_s, error_type = time.perf_counter(), ""
            try:
                with ungrouped():
                    return await function(*args, **kwargs)
            except Error as error:
                error_type = error.code
                raise
            except anyio.get_cancelled_exc_class():
                error_type = "client_gone"
                raise
            finally:
                self._generation.note_request(operation, offer.name, time.perf_counter() - began_s, error_type)

        return run

    def note_answers(self, operation: Operation, model: str, answers: Sequence[Answer], read_tokens: int) -> None:
        """Note what a request has cost, also if it failed.

        Args:
            operation: What was asked for.
            model: Of which model.
            answers: What came of it.
            read_tokens: How many tokens its prompts had.
        """
        self._generation.note_usage(operation, model, read_tokens, "input")
        self._generation.note_usage(operation, model, sum(answer.tokens for answer in answers), "output")
        for answer in answers:
            self._cached.labels(model).inc(answer.cached_tokens)
            self._replays.labels(model).inc(len(answer.replays))
            if answer.first_s:
                self._generation.note_first_token(operation, model, answer.first_s)
            if answer.rest_s:
                self._generation.note_token(operation, model, answer.rest_s / (answer.tokens - 1))
