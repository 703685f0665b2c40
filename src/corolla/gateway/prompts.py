"""From a request to questions for the model: chat templates, defaults, limits; and what cannot be honoured."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from corolla.errors import ContextTooLong, InvalidRequest
from corolla.gateway.catalog import Offer
from corolla.gateway.config import GatewayConfig
from corolla.gateway.generation import Question
from corolla.gateway.grammar import Form, json_form
from corolla.gateway.requests import ChatRequest, CompletionRequest, Message, SamplingFields, Tool, ToolChoice
from corolla.gateway.toolcalls import CallFormat, calls_form, find_format

if TYPE_CHECKING:
    from corolla.gateway.sampling import Sampling

__all__ = ["ChatQuestion", "ask_chat", "ask_completion", "read_texts"]

_COMPLETION_TOKENS = 16  # as in OpenAI's API


@dataclass(frozen=True, slots=True)
class ChatQuestion:
    """A chat as a question.

    Args:
        question: For the model.
        call_format: How it writes calls of tools; ``None`` if it has none to call.
        must_call: Whether its answer is nothing but calls.
    """

    question: Question
    call_format: CallFormat | None
    must_call: bool


def ask_chat(request: ChatRequest, offer: Offer, owner: str, config: GatewayConfig) -> ChatQuestion:
    """Make a question of a chat.

    Args:
        request: The chat.
        offer: The model.
        owner: Whose sessions it may go on with.
        config: The gateway's limits.

    Raises:
        InvalidRequest: If a field is wrong or cannot be honoured.
        ContextTooLong: If the chat leaves no room for an answer.
    """
    if len(request.messages) > config.max_messages:
        raise InvalidRequest(
            f"{len(request.messages)} messages are more than the {config.max_messages} that are read", field="messages"
        )
    tools, must_call = _tools(request)
    call_format = find_format(offer) if tools else None
    form = _form(request, offer, call_format, tools, must_call)
    tokens = _render(request.messages, tools, offer)
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidRequest("top_logprobs means something only with logprobs: true", field="top_logprobs")
    wanted = request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
    limit_tokens = _limit(len(tokens), wanted, offer, config)
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    question = _question(request, offer, owner, tokens, limit_tokens=limit_tokens, logprobs=logprobs)
    question = replace(question, form=form, shows_special=bool(call_format and call_format.begin), operation="chat")
    return ChatQuestion(question, call_format, must_call)


def ask_completion(request: CompletionRequest, offer: Offer, owner: str, config: GatewayConfig) -> list[Question]:
    """Make a question of each text to continue.

    Args:
        request: The texts.
        offer: The model.
        owner: Whose sessions they may go on with.
        config: The gateway's limits.

    Raises:
        InvalidRequest: If a field is wrong or cannot be honoured.
        ContextTooLong: If a text leaves no room to continue it.
    """
    wanted = _COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
    if wanted == 0 and not request.echo:
        raise InvalidRequest("max_tokens: 0 means something only with echo: true", field="max_tokens")
    if request.echo and request.stream and request.logprobs is not None:
        raise InvalidRequest("echo with logprobs cannot be streamed; leave one of the three out", field="stream")
    questions = []
    for tokens in read_texts(request.prompt, offer, "prompt"):
        limit_tokens = _limit(len(tokens), wanted, offer, config) if wanted else 0
        question = _question(request, offer, owner, tokens, limit_tokens=limit_tokens, logprobs=request.logprobs)
        questions.append(replace(question, scores_prompt=bool(request.echo) and request.logprobs is not None))
    return questions


def read_texts(given: str | list[str] | list[int] | list[list[int]], offer: Offer, field: str) -> list[list[int]]:
    """Read one or several texts, given as text or as tokens.

    Args:
        given: The texts.
        offer: The model whose tokens they become.
        field: Where they come from.

    Raises:
        InvalidRequest: If a token is none of the model's, or a text has no tokens.
        ContextTooLong: If one is longer than what the model was made for.
    """
    several: list[Any] = list(given) if isinstance(given, list) and not isinstance(given[0], int) else [given]
    texts: list[list[int]] = [offer.tokenizer.encode(one) if isinstance(one, str) else one for one in several]
    for tokens in texts:
        if not tokens:
            raise InvalidRequest(f"{field} has a text without a token", field=field)
        if max(tokens) >= offer.vocabulary:
            raise InvalidRequest(f"token {max(tokens)} is none of {offer.name}: it has {offer.vocabulary}", field=field)
        if len(tokens) > offer.context_tokens:
            raise ContextTooLong(f"{len(tokens)} tokens are more than the {offer.context_tokens} of {offer.name}")
    return texts


def _tools(request: ChatRequest) -> tuple[list[Tool], bool]:
    """Say which tools may be called, and whether one must."""
    tools, choice = request.tools or [], request.tool_choice
    if not tools and choice not in (None, "none"):
        raise InvalidRequest("tool_choice was given without tools", field="tool_choice")
    if isinstance(choice, ToolChoice):
        tools = [tool for tool in tools if tool.function.name == choice.function.name]
        if not tools:
            raise InvalidRequest(f"there is no tool {choice.function.name!r} to choose", field="tool_choice")
    must_call = isinstance(choice, ToolChoice) or choice == "required"
    if not must_call and any(tool.function.strict for tool in tools):
        raise InvalidRequest("strict tools are enforced only if one must be called: tool_choice", field="tools")
    return ([] if choice == "none" else tools), must_call


def _form(
    request: ChatRequest, offer: Offer, call_format: CallFormat | None, tools: Sequence[Tool], must_call: bool
) -> Form | None:
    """Give the form that the answer must have, checked."""
    wanted, field = request.response_format, "response_format"
    form = None
    if call_format is not None and must_call:
        form = calls_form(call_format, offer, tools, is_single=request.parallel_tool_calls is False)
        field = "tools"
    if wanted is not None and wanted.type != "text":
        if call_format is not None:
            raise InvalidRequest("response_format and tools cannot be honoured together", field=field)
        if (wanted.json_schema is None) != (wanted.type == "json_object"):
            raise InvalidRequest(f"json_schema does not go with the type {wanted.type}", field="response_format")
        form = json_form({"type": "object"} if wanted.json_schema is None else wanted.json_schema.schema_)
    if form is not None:
        offer.grammars.check(form, field)
    return form


def _render(messages: Sequence[Message], tools: Sequence[Tool], offer: Offer) -> list[int]:
    if offer.tokenizer.chat_template is None:
        raise InvalidRequest(f"{offer.name} has no chat template; use /v1/completions", field="model")
    try:
        tokens: list[int] = offer.tokenizer.apply_chat_template(
            [_message(message, f"messages[{index}]") for index, message in enumerate(messages)],
            tools=[tool.model_dump(exclude_none=True) for tool in tools] or None,
            add_generation_prompt=True,
            return_dict=False,
        )
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise InvalidRequest(f"the chat template of {offer.name} refuses this: {error}", field="messages") from error
    return tokens


def _message(message: Message, field: str) -> dict[str, Any]:
    """Write a message as chat templates take it."""
    if message.tool_calls and message.role != "assistant":
        raise InvalidRequest(f"{field}: only an assistant calls tools", field=f"{field}.tool_calls")
    if message.content is None and not message.tool_calls:
        raise InvalidRequest(f"{field} has no content", field=f"{field}.content")
    written: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": message.text,
    }
    if message.name is not None:
        written["name"] = message.name
    if message.tool_call_id is not None:
        written["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        written["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments, field)},
            }
            for call in message.tool_calls
        ]
    return written


def _arguments(text: str, field: str) -> Any:  # noqa: ANN401 - JSON
    try:
        return json.loads(text)
    except ValueError as error:
        raise InvalidRequest(f"{field} has arguments that are no JSON: {error}", field=f"{field}.tool_calls") from error


def _limit(prompt_tokens: int, wanted: int | None, offer: Offer, config: GatewayConfig) -> int:
    room = offer.context_tokens - prompt_tokens
    if room < max(1, wanted or 1):
        raise ContextTooLong(
            f"{prompt_tokens} tokens and an answer of {wanted or 1} are more than the {offer.context_tokens} of "
            f"{offer.name}; shorten the messages or the answer"
        )
    if wanted is not None and wanted > config.max_answer_tokens:
        raise InvalidRequest(
            f"an answer of {wanted} tokens is longer than the {config.max_answer_tokens} that are given here",
            field="max_tokens",
        )
    return min(room, config.max_answer_tokens) if wanted is None else wanted


def _question(
    request: SamplingFields, offer: Offer, owner: str, tokens: list[int], *, limit_tokens: int, logprobs: int | None
) -> Question:
    given = {
        name: value
        for name in (
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "repetition_penalty",
            "frequency_penalty",
            "presence_penalty",
            "seed",
        )
        if (value := getattr(request, name)) is not None
    }
    sampling: Sampling = replace(offer.defaults, **given, bias=_bias(request, offer), logprobs=logprobs)
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if "" in stops:
        raise InvalidRequest("a stop string is empty", field="stop")
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("stream_options means something only with stream: true", field="stream_options")
    return Question(
        owner=owner, offer=offer, tokens=tokens, limit_tokens=limit_tokens, sampling=sampling, stops=tuple(stops)
    )


def _bias(request: SamplingFields, offer: Offer) -> dict[int, float]:
    bias = {}
    for text, value in (request.logit_bias or {}).items():
        if not text.isdecimal() or int(text) >= offer.vocabulary:
            raise InvalidRequest(
                f"logit_bias has {text!r}, which is none of the {offer.vocabulary} tokens", field="logit_bias"
            )
        bias[int(text)] = value
    return bias
