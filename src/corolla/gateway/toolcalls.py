"""Tools as models write them: how each kind of chat template has its calls, and how to read and to enforce them."""

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llguidance import LLMatcher

from corolla.errors import InvalidRequest
from corolla.gateway.catalog import Offer
from corolla.gateway.grammar import Form
from corolla.gateway.requests import Tool

__all__ = ["CallFormat", "calls_form", "find_format", "read_calls"]


@dataclass(frozen=True, slots=True)
class CallFormat:
    """How a family of models writes calls.

    Args:
        sign: What its chat templates have in them.
        begin: What comes before a call, or before all; empty if an answer that begins with a brace is one.
        end: What comes after a call, or after all.
        arguments: What the arguments are called.
        is_list: Whether all calls are one list.
        named: What stands between the name of a call and its arguments; empty if a call is one object.
    """

    sign: str
    begin: str
    end: str = ""
    arguments: str = "arguments"
    is_list: bool = False
    named: str = ""


_ID_LETTERS = 9
"""Of the id of a call: Mistral's templates take no other."""

_FORMATS = (
    CallFormat(sign="<tool_call>", begin="<tool_call>", end="</tool_call>"),  # Hermes, Qwen, SmolLM3
    CallFormat(sign="[ARGS]", begin="[TOOL_CALLS]", named="[ARGS]"),  # Mistral since 2025
    CallFormat(sign="[TOOL_CALLS]", begin="[TOOL_CALLS]", is_list=True),  # Mistral before
    CallFormat(sign='"parameters"', begin="", arguments="parameters"),  # Llama 3
)


def find_format(offer: Offer) -> CallFormat:
    """Find out how a model writes calls.

    Args:
        offer: The model.

    Raises:
        InvalidRequest: If its chat template knows no tools, or has them in a way that is not known here.
    """
    template = str(offer.tokenizer.chat_template or "")
    if "tools" in template:
        for one in _FORMATS:
            if one.sign in template:
                return one
    raise InvalidRequest(f"{offer.name} has no chat template that knows tools; leave them out", field="tools")


def calls_form(call_format: CallFormat, offer: Offer, tools: Sequence[Tool], *, is_single: bool) -> Form:
    """Give the form of an answer that is nothing but calls.

    Args:
        call_format: How the model writes calls.
        offer: The model.
        tools: What may be called.
        is_single: Whether there is only one call.
    """
    if call_format.named:
        return _named_form(call_format, offer, tools, is_single=is_single)
    shapes = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                call_format.arguments: tool.function.parameters or {"type": "object"},
            },
            "required": ["name", call_format.arguments],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    schema: dict[str, Any] = shapes[0] if len(shapes) == 1 else {"anyOf": shapes}
    if call_format.is_list:
        schema = {"type": "array", "items": schema, "minItems": 1, **({"maxItems": 1} if is_single else {})}
    begin, end = _literal(call_format.begin, offer), _literal(call_format.end, offer)
    one = " ".join(part for part in (begin, '"\\n"' if end else "", "body", '"\\n"' if end else "", end) if part)
    start = "call" if is_single or not end else 'call ("\\n" call)*'
    return LLMatcher.grammar_from_lark(f"start: {start}\ncall: {one}\nbody: %json {_compact(schema)}\n")


def _named_form(call_format: CallFormat, offer: Offer, tools: Sequence[Tool], *, is_single: bool) -> Form:
    begin, between = _literal(call_format.begin, offer), _literal(call_format.named, offer)
    names = [f"{json.dumps(tool.function.name)} {between} body{index}" for index, tool in enumerate(tools)]
    bodies = [
        f"body{index}: %json {_compact(tool.function.parameters or {'type': 'object'})}"
        for index, tool in enumerate(tools)
    ]
    lines = [f"start: {'call' if is_single else 'call+'}", f"call: {begin} ({' | '.join(names)})", *bodies]
    return LLMatcher.grammar_from_lark("\n".join(lines) + "\n")


def _compact(schema: dict[str, Any]) -> str:
    return json.dumps({"x-guidance": {"whitespace_flexible": False}} | schema)


def read_calls(call_format: CallFormat, text: str) -> tuple[str, list[dict[str, Any]]]:
    """Tell the calls in an answer from its text.

    Args:
        call_format: How the model writes calls.
        text: The answer.

    Returns:
        What it says besides, and the calls as OpenAI's API has them; none if what looks like a call is not one.
    """
    said, calls = _split(call_format, text)
    found = [_call(one, call_format.arguments) for one in calls]
    if not found or any(call is None for call in found):
        return text, []
    return said.strip(), [call for call in found if call is not None]


def _split(call_format: CallFormat, text: str) -> tuple[str, list[Any]]:
    """Cut an answer into what it says and what it calls, read as JSON; ``None`` for what is not JSON."""
    if not call_format.begin:
        bare = text.strip().removeprefix("<|python_tag|>")
        return "", [_json(part) for part in bare.split(";") if part.strip()] if bare.startswith("{") else []
    said, *parts = text.split(call_format.begin)
    if call_format.named:
        return said, [_named(part.partition(call_format.named)) for part in parts]
    if call_format.is_list:
        listed = _json(parts[0]) if parts else []
        return said, listed if isinstance(listed, list) else [None]
    return said, [_json(part.partition(call_format.end)[0]) for part in parts]


def _named(written: tuple[str, str, str]) -> Any:  # noqa: ANN401 - whatever the model wrote
    name, mark, arguments = written
    name = name.partition("[CALL_ID]")[0].strip()
    return {"name": name, "arguments": _json(arguments)} if mark and name else None


def _json(text: str) -> Any:  # noqa: ANN401 - whatever the model wrote
    try:
        return json.loads(text)
    except ValueError:
        return None


def _call(written: Any, arguments: str) -> dict[str, Any] | None:  # noqa: ANN401 - whatever the model wrote
    if not isinstance(written, dict) or not isinstance(written.get("name"), str):
        return None
    given = written.get(arguments, written.get("arguments", {}))
    if given is None:
        return None
    text = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    function = {"name": written["name"], "arguments": text}
    return {"id": secrets.token_hex(_ID_LETTERS)[:_ID_LETTERS], "type": "function", "function": function}


def _literal(mark: str, offer: Offer) -> str:
    """Write a mark for a grammar: as the one token that it is to the model, or else as text."""
    if not mark:
        return ""
    added = offer.tokenizer.get_added_vocab()
    return f"<[{added[mark]}]>" if mark in added else json.dumps(mark)
