"""``corolla chat``: questions and answers with a model of a swarm."""

import anyio

from corolla.cli.config import OutputConfig
from corolla.cli.console import Output
from corolla.cli.finding import find_peers
from corolla.cli.flags import FINDING_FLAGS, Flag, command
from corolla.cli.progress import show_progress
from corolla.cli.settings import Settings
from corolla.telemetry import configure_logging

__all__ = ["MODEL_FLAGS", "SECTIONS", "chat"]

SECTIONS = ("chat", "client", "swarm", "hub")
"""The settings of everything that asks a model."""

MODEL_FLAGS = (
    Flag("chat.model", "MODEL"),
    *FINDING_FLAGS,
    Flag("chat.max_new_tokens"),
    Flag("chat.temperature"),
    Flag("chat.top_p"),
    Flag("chat.top_k"),
    Flag("chat.seed"),
    Flag("chat.greedy"),
    Flag("client.codec"),
    Flag("client.precision"),
    Flag("client.adapter"),
    Flag("client.allow_peers", "--allow-peer"),
    Flag("client.avoid_peers", "--avoid-peer"),
    Flag("client.trusted_peers", "--trusted-peer"),
    Flag("client.trust"),
    Flag("chat.threads"),
    Flag("output.log_level"),
    Flag("output.quiet"),
)
"""The flags of everything that asks a model."""


@command(sections=SECTIONS, flags=(*MODEL_FLAGS, Flag("chat.system")))
def chat(settings: Settings) -> None:
    """Chat with a model that a swarm serves.

    At a terminal, Ctrl-C ends an answer and Ctrl-D the chat, Alt-Enter begins a new line, arrows find earlier
    questions, and /help lists orders: /retry, /rewind, /save, /load, /chain and more. Without a terminal, standard
    input is the one question.

    Examples:

    corolla chat --peer tls://192.0.2.7:31330

    echo "Why is the sky blue?" | corolla chat --invite invite.txt --quiet
    """
    from corolla.cli.conversation import Conversation
    from corolla.cli.talk import has_terminal, read_question, show_answer, talk

    config = settings.get(OutputConfig)
    question = None if has_terminal() else read_question()
    # What a server's death did to an answer stands below it; a warning would break into the answer.
    configure_logging("error" if question is None and config.log_level == "warning" else config.log_level)
    output = Output(config)
    peers = find_peers(settings, output)
    with show_progress(output) as report:
        conversation = Conversation(settings, report, peers)
    with conversation:
        if question is None:
            anyio.run(talk, conversation, output)
        else:
            show_answer(conversation, question, output)
