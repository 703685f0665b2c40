"""A conversation at the terminal: the prompt, the answer as it comes, and the line that says what it cost."""

import signal
import sys

import anyio
from prompt_toolkit import PromptSession
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from corolla.cli.answers import Answer, describe_cost
from corolla.cli.console import Output, without_controls
from corolla.cli.conversation import Conversation
from corolla.cli.orders import obey
from corolla.cli.signals import catch_signals
from corolla.cli.state import state_directory
from corolla.errors import Error, UsageError

__all__ = [
    "ask_interruptibly",
    "has_terminal",
    "read_question",
    "show_answer",
    "talk",
]


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
    output.note(f"Chatting with {without_controls(conversation.name)}. /help lists orders; Ctrl-D leaves.", "dim")
    prompt: PromptSession[str] = PromptSession("> ", key_bindings=_keys(), history=_earlier_questions())
    while True:
        try:
            line = (await prompt.prompt_async()).strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line == "/quit":
            return
        question: str | None = line
        if line.startswith("/"):
            try:
                question = obey(line, conversation, output)
            except Error as error:
                _show_error(error, output)
                continue
        if question:
            await ask_interruptibly(conversation, question, output)


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
            _show_error(error, output)


def read_question() -> str:
    """Read all of standard input as one question.

    Raises:
        UsageError: If there is none.
    """
    question = sys.stdin.read().strip()
    if not question:
        raise UsageError("standard input holds no question; write one into it, or use a terminal")
    return question


def _show_error(error: Error, output: Output) -> None:
    output.notes.print(f"error: {without_controls(error.message)}", style="red")


def _earlier_questions() -> History:
    """Give the questions of earlier chats, from a file that only this account can read; none if it cannot be had."""
    path = state_directory() / "questions"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError:
        return InMemoryHistory()
    return FileHistory(path)


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def begin_line(event: KeyPressEvent) -> None:
        """Go on writing on a new line."""
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    def interrupt(event: KeyPressEvent) -> None:
        """Clear what was typed, as a shell does; with nothing typed, leave."""
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt())

    return keys
