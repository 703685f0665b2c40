"""``/v1/completions``: texts that are continued; and how likely a model thinks them, which evaluations ask."""

from collections.abc import Sequence
from typing import Any

import anyio

from corolla.gateway.accounts import Account
from corolla.gateway.catalog import Offer
from corolla.gateway.chats import copies
from corolla.gateway.gateway import Gateway
from corolla.gateway.generation import Answer, Piece, Question
from corolla.gateway.prompts import ask_completion
from corolla.gateway.reports import head, report, usage
from corolla.gateway.requests import CompletionRequest, StreamOptions
from corolla.gateway.sampling import TokenLog
from corolla.gateway.streams import Emit

__all__ = ["complete", "stream_completion"]


async def complete(
    gateway: Gateway, account: Account, request: CompletionRequest, offer: Offer
) -> tuple[Any, list[Answer]]:
    """Continue texts at once.

    Args:
        gateway: Who answers.
        account: Who asks.
        request: The texts.
        offer: The model.

    Returns:
        The body, and the answers in it.

    Raises:
        Error: What is wrong with the request, or what the swarm raises.
    """
    questions = await _questions(gateway, account, request, offer)
    answers = await gateway.answer(account, questions)
    choices = [
        {
            "index": index,
            "text": _echo(request, question) + answer.text,
            "logprobs": _logprobs([*answer.prompt_logs, *answer.logs], question),
            "finish_reason": answer.reason,
            "corolla": report(answer),
        }
        for index, (question, answer) in enumerate(zip(questions, answers, strict=True))
    ]
    body = head("cmpl", "text_completion", request.model)
    return body | {"choices": choices, "usage": usage(answers, _read(questions, request))}, answers


async def stream_completion(
    gateway: Gateway, account: Account, request: CompletionRequest, offer: Offer, emit: Emit
) -> None:
    """Continue texts in pieces.

    Args:
        gateway: Who answers.
        account: Who asks.
        request: The texts.
        offer: The model.
        emit: Sends an event.

    Raises:
        Error: What is wrong with the request, or what the swarm raises.
    """
    questions = await _questions(gateway, account, request, offer)
    body = head("cmpl", "text_completion", request.model)

    async def choice(index: int, text: str, logs: Any, reason: str | None, **more: object) -> None:  # noqa: ANN401
        told = {"index": index, "text": text, "logprobs": logs, "finish_reason": reason} | more
        await emit(body | {"choices": [told]})

    async def tell(index: int, answer: Answer, piece: Piece) -> None:
        await choice(index, piece.text, _logprobs(piece.logs, questions[index]), None)

    if request.echo:
        for index, question in enumerate(questions):
            await choice(index, _echo(request, question), None, None)
    answers = await gateway.answer(account, questions, tell)
    for index, answer in enumerate(answers):
        await choice(index, "", None, answer.reason, corolla=report(answer))
    if (request.stream_options or StreamOptions()).include_usage:
        await emit(body | {"choices": [], "usage": usage(answers, _read(questions, request))})


async def _questions(gateway: Gateway, account: Account, request: CompletionRequest, offer: Offer) -> list[Question]:
    asked = await anyio.to_thread.run_sync(ask_completion, request, offer, account.id, gateway.config)
    return [copy for question in asked for copy in copies(question, request.n)]


def _read(questions: Sequence[Question], request: CompletionRequest) -> int:
    return sum(len(question.tokens) for question in questions[:: request.n or 1])


def _echo(request: CompletionRequest, question: Question) -> str:
    if not request.echo:
        return ""
    return request.prompt if isinstance(request.prompt, str) else question.offer.decode(question.tokens)


def _logprobs(logs: Sequence[TokenLog], question: Question) -> dict[str, Any] | None:
    if question.sampling.logprobs is None:
        return None
    texts = [question.offer.decode([log.token], skip_special=False) for log in logs]
    offsets = [0]
    for text in texts:
        offsets.append(offsets[-1] + len(text))
    tops = [{question.offer.decode([token], skip_special=False): logprob for token, logprob in log.top} for log in logs]
    return {
        "tokens": texts,
        "token_logprobs": [log.logprob for log in logs],
        "top_logprobs": [top if log.logprob is not None else None for top, log in zip(tops, logs, strict=True)],
        "text_offset": offsets[:-1],
    }
