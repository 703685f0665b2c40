"""What is typed behind a slash in a chat: orders to the program, not questions to the model."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from corolla.cli.answers import describe_chain
from corolla.cli.console import Output, without_controls
from corolla.errors import UsageError

if TYPE_CHECKING:
    from corolla.cli.conversation import Conversation

__all__ = ["obey"]

_MAX_BYTES = 16 << 20
_ORDERS = {
    "/help": "show this",
    "/new": "forget the chat and begin again",
    "/system [TEXT]": "begin again and tell the model this first; without TEXT, show what it was told",
    "/retry": "ask the last question again",
    "/rewind [N]": "forget the last question and its answer, or the last N of them",
    "/save FILE": "write the chat to a file, as JSON in OpenAI's form",
    "/load FILE": "go on with a chat from such a file",
    "/chain": "show which servers compute",
    "/quit": "leave; so does Ctrl-D",
}


class _Message(msgspec.Struct, forbid_unknown_fields=True):
    role: Literal["system", "user", "assistant"]
    content: str


def obey(line: str, conversation: "Conversation", output: Output) -> str | None:
    """Do what an order says.

    Args:
        line: The order.
        conversation: The chat that it is about.
        output: Where to write.

    Returns:
        A question to ask now, if that is what the order is for.

    Raises:
        UsageError: If it cannot be done; says why.
    """
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    match name:
        case "/help":
            _help(output)
        case "/new":
            conversation.forget()
            output.result("a new chat", "dim")
        case "/system":
            _tell(rest, conversation, output)
        case "/retry":
            return conversation.rewind(1)
        case "/rewind":
            _rewind(rest, conversation, output)
        case "/save":
            _save(rest, conversation, output)
        case "/load":
            _load(rest, conversation, output)
        case "/chain":
            output.result(describe_chain(conversation.chain))
        case _:
            raise UsageError(f"there is no order {name}; /help lists them")
    return None


def _help(output: Output) -> None:
    for usage, meaning in _ORDERS.items():
        output.result(f"  {usage:<16}{meaning}")
    output.result("  Alt-Enter begins a new line, arrows up and down find earlier questions.", "dim")


def _tell(rest: str, conversation: "Conversation", output: Output) -> None:
    if rest:
        conversation.forget(rest)
        output.result("a new chat; the model was told so", "dim")
    else:
        output.result(conversation.system or "the model was told nothing; /system TEXT tells it something")


def _rewind(rest: str, conversation: "Conversation", output: Output) -> None:
    if rest and not (rest.isdecimal() and int(rest) > 0):
        raise UsageError(f"/rewind takes a number of questions, not {rest!r}")
    question = conversation.rewind(int(rest or 1))
    output.result(f"forgot all from here on: {question.splitlines()[0][:60]}", "dim")


def _save(rest: str, conversation: "Conversation", output: Output) -> None:
    path = _path(rest, "/save")
    data = msgspec.json.format(msgspec.json.encode(conversation.messages), indent=1)
    try:
        path.write_bytes(data + b"\n")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from error
    output.result(f"saved {len(conversation.messages)} messages in {path}", "dim")


def _load(rest: str, conversation: "Conversation", output: Output) -> None:
    path = _path(rest, "/load")
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        messages = msgspec.json.decode(data, type=list[_Message])
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} holds no chat: {error}") from error
    conversation.restore([{"role": one.role, "content": one.content} for one in messages])
    for one in messages:
        if one.role != "system":
            output.result(("> " if one.role == "user" else "") + without_controls(one.content), "dim")


def _path(rest: str, name: str) -> Path:
    if not rest:
        raise UsageError(f"{name} needs the name of a file")
    return Path(rest).expanduser()
