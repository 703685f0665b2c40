"""A conversation at the terminal: the prompt, the answer as it comes, and the line that says what it cost."""

import signal
import sys

import anyio
from prompt_toolkit import PromptSession
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from corolla.cli.answers import Answer, describe_chain, describe_cost
from corolla.cli.console import Output, without_controls
from corolla.cli.conversation import Conversation
from corolla.cli.signals import catch_signals
from corolla.errors import Error, UsageError

__all__ = [
    "ask_interruptibly",
    "has_terminal",
    "read_question",
    "show_answer",
    "talk",
]

_COMMANDS = {
    "/help": "show this",
    "/new": "forget the chat and begin again",
    "/system TEXT": "begin again, and tell the model this first",
    "/chain": "show which servers compute",
    "/quit": "leave; so does Ctrl-D",
}


def has_terminal() -> bool:
    """Say whether a person sits at both ends."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def show_answer(conversation: Conversation, question: str, output: Output) -> Answer:
    """Ask, write the answer as it comes, and what it cost below."""
    answer = conversation.ask(question, output.stream)
    output.result("")
    output.result(describe_cost(answer.cost), "dim")
    return answer


async def talk(conversation: Conversation, output: Output) -> None:
    """Chat until the person leaves.

    Args:
        conversation: With whom.
        output: Where to write.
    """
    output.note(f"Chatting with {without_controls(conversation.name)}. /help lists commands; Ctrl-D leaves.", "dim")
    prompt: PromptSession[str] = PromptSession("> ", key_bindings=_keys())
    while True:
        try:
            line = (await prompt.prompt_async()).strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line == "/quit":
            return
        if line.startswith("/"):
            _obey(line, conversation, output)
        elif line:
            await ask_interruptibly(conversation, line, output)


async def ask_interruptibly(conversation: Conversation, question: str, output: Output) -> None:
    """Ask so that Ctrl-C ends the answer, not the chat; show an error and go on. A second Ctrl-C ends the chat."""

    def interrupt() -> None:
        if conversation.is_stopped:
            raise KeyboardInterrupt
        conversation.stop()

    with catch_signals(interrupt, signal.SIGINT):
        try:
            await anyio.to_thread.run_sync(show_answer, conversation, question, output, abandon_on_cancel=True)
        except Error as error:
            output.result("")
            output.notes.print(f"error: {without_controls(error.message)}", style="red")


def read_question() -> str:
    """Read all of standard input as one question.

    Raises:
        UsageError: If there is none.
    """
    question = sys.stdin.read().strip()
    if not question:
        raise UsageError("standard input holds no question; write one into it, or use a terminal")
    return question


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("c-c")
    def interrupt(event: KeyPressEvent) -> None:
        """Clear what was typed, as a shell does; with nothing typed, leave."""
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt())

    return keys


def _obey(line: str, conversation: Conversation, output: Output) -> None:
    name, _, rest = line.partition(" ")
    if name == "/help":
        for usage, meaning in _COMMANDS.items():
            output.result(f"  {usage:<14}{meaning}")
    elif name == "/new":
        conversation.forget()
        output.result("a new chat", "dim")
    elif name == "/system" and rest.strip():
        conversation.forget(rest.strip())
        output.result("a new chat; the model was told so", "dim")
    elif name == "/system":
        output.result(conversation.system or "the model was told nothing; /system TEXT tells it something")
    elif name == "/chain":
        output.result(describe_chain(conversation.chain))
    else:
        output.result(f"there is no command {name}; /help lists them")
