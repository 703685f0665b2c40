"""``/v1/chat/completions``: a chat's next message, whole or as it comes."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import anyio

from corolla.gateway.accounts import Account
from corolla.gateway.catalog import Offer
from corolla.gateway.gateway import Gateway
from corolla.gateway.generation import Answer, Piece, Question
from corolla.gateway.prompts import ChatQuestion, ask_chat
from corolla.gateway.reports import chain_report, head, report, usage
from corolla.gateway.requests import ChatRequest, StreamOptions
from corolla.gateway.sampling import TokenLog
from corolla.gateway.streams import Emit
from corolla.gateway.text import StopFinder
from corolla.gateway.toolcalls import CallFormat, read_calls

if TYPE_CHECKING:
    from corolla.terms import Chain

__all__ = ["ChatAnswer", "chat", "copies", "stream_chat"]

_LOOK_S = 0.25
"""How often a chain is looked at that is told with the pieces."""


class ChatAnswer:
    """An answer told to a chat: calls of tools are kept out of what it says.

    Args:
        call_format: How the model writes calls; ``None`` if it has none to make.
        must_call: Whether it is nothing but calls.
    """

    def __init__(self, call_format: CallFormat | None, *, must_call: bool) -> None:
        self._format = call_format
        self._begin = None if call_format is None or not call_format.begin else StopFinder([call_format.begin])
        self._is_silent = must_call or (call_format is not None and not call_format.begin)
        self._told = 0

    def push(self, text: str) -> str:
        """Give what can be said of a piece already."""
        if self._is_silent:
            return ""
        said = text if self._begin is None else self._begin.push(text)
        self._told += len(said)
        return said

    def end(self, answer: Answer) -> tuple[str, list[dict[str, Any]]]:
        """Give the rest of what it says, and the calls."""
        if self._format is None:
            return "", []
        said, calls = read_calls(self._format, answer.text)
        return said[self._told :], calls


async def chat(gateway: Gateway, account: Account, request: ChatRequest, offer: Offer) -> tuple[Any, list[Answer]]:
    """Answer a chat at once.

    Args:
        gateway: Who answers.
        account: Who asks.
        request: The chat.
        offer: The model.

    Returns:
        The body, and the answers in it.

    Raises:
        Error: What is wrong with the chat, or what the swarm raises.
    """
    asked = await anyio.to_thread.run_sync(ask_chat, request, offer, account.id, gateway.config)
    answers = await gateway.answer(account, copies(asked.question, request.n))
    choices = []
    for index, answer in enumerate(answers):
        text, calls = (answer.text, []) if asked.call_format is None else read_calls(asked.call_format, answer.text)
        message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
        if calls:
            message["tool_calls"] = calls
        choices.append(
            {
                "index": index,
                "message": message,
                "logprobs": _logprobs(answer.logs, asked.question),
                "finish_reason": _reason(answer, calls),
                "corolla": report(answer),
            }
        )
    body = head("chatcmpl", "chat.completion", request.model)
    return body | {"choices": choices, "usage": usage(answers, len(asked.question.tokens))}, answers


async def stream_chat(gateway: Gateway, account: Account, request: ChatRequest, offer: Offer, emit: Emit) -> None:
    """Answer a chat in pieces.

    Args:
        gateway: Who answers.
        account: Who asks.
        request: The chat.
        offer: The model.
        emit: Sends an event.

    Raises:
        Error: What is wrong with the chat, or what the swarm raises.
    """
    asked = await anyio.to_thread.run_sync(ask_chat, request, offer, account.id, gateway.config)
    options = request.stream_options or StreamOptions()
    stream = _ChatStream(request, asked, emit, tells_chain=bool(options.include_chain))
    async with anyio.create_task_group() as tasks:
        if options.include_chain:
            tasks.start_soon(stream.look)
        answers = await gateway.answer(account, copies(asked.question, request.n), stream.tell)
        tasks.cancel_scope.cancel()
    for index, answer in enumerate(answers):
        await stream.end(index, answer)
    if options.include_usage:
        await emit(stream.head | {"choices": [], "usage": usage(answers, len(asked.question.tokens))})


def copies(question: Question, n: int | None) -> list[Question]:
    """Repeat a question, each time with other dice."""
    seed = question.sampling.seed
    return [
        replace(question, sampling=replace(question.sampling, seed=None if seed is None else seed + index))
        for index in range(n or 1)
    ]


class _ChatStream:
    """The events of a chat's answers."""

    def __init__(self, request: ChatRequest, asked: ChatQuestion, emit: Emit, *, tells_chain: bool) -> None:
        self.head = head("chatcmpl", "chat.completion.chunk", request.model)
        self._asked = asked
        self._emit = emit
        self._tells_chain = tells_chain
        self._told: dict[int, ChatAnswer] = {}
        self._answers: dict[int, Answer] = {}
        self._chains: dict[int, Chain | None] = {}
        self._looked_s = 0.0

    async def tell(self, index: int, answer: Answer, piece: Piece) -> None:
        """Send a piece of an answer."""
        self._answers[index] = answer
        text = (await self._begun(index)).push(piece.text)
        logs = _logprobs(piece.logs, self._asked.question)
        if text or logs:
            looks = time.perf_counter() - self._looked_s > _LOOK_S or answer.chain != self._chains.get(index)
            await self._choice(index, {"content": text}, logs, chain=answer if looks else None)

    async def look(self) -> None:
        """Tell of servers that were replaced, while there are no pieces as well."""
        while True:
            await anyio.sleep(_LOOK_S)
            for index, answer in self._answers.items():
                if answer.chain != self._chains.get(index):
                    await self._choice(index, {}, None, chain=answer)

    async def end(self, index: int, answer: Answer) -> None:
        """Send what is left of an answer, and why it ended."""
        text, calls = (await self._begun(index)).end(answer)
        if text:
            await self._choice(index, {"content": text}, None)
        if calls:
            await self._choice(index, {"tool_calls": [{"index": i} | call for i, call in enumerate(calls)]}, None)
        last = {"index": index, "delta": {}, "logprobs": None, "finish_reason": _reason(answer, calls)}
        await self._emit(self.head | {"choices": [last | {"corolla": report(answer)}]})

    async def _begun(self, index: int) -> ChatAnswer:
        if index not in self._told:
            self._told[index] = ChatAnswer(self._asked.call_format, must_call=self._asked.must_call)
            await self._choice(index, {"role": "assistant", "content": ""}, None)
        return self._told[index]

    async def _choice(self, index: int, delta: Any, logs: Any, *, chain: Answer | None = None) -> None:  # noqa: ANN401
        choice = {"index": index, "delta": delta, "logprobs": logs, "finish_reason": None}
        if self._tells_chain and chain is not None:
            self._chains[index], self._looked_s = chain.chain, time.perf_counter()
            choice["corolla"] = {"chain": chain_report(chain)}
        await self._emit(self.head | {"choices": [choice]})


def _reason(answer: Answer, calls: Sequence[object]) -> str:
    return "tool_calls" if calls else answer.reason


def _logprobs(logs: Sequence[TokenLog], question: Question) -> dict[str, Any] | None:
    if question.sampling.logprobs is None:
        return None

    def told(token: int, logprob: float | None) -> dict[str, Any]:
        text = question.offer.decode([token], skip_special=False)
        whole = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": logprob, "bytes": whole}

    content = [told(log.token, log.logprob) | {"top_logprobs": [told(*one) for one in log.top]} for log in logs]
    return {"content": content, "refusal": None}
