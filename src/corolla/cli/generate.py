"""``corolla generate``: a text, continued by a model of a swarm."""

import sys

from corolla.cli.answers import describe_cost
from corolla.cli.chat import MODEL_FLAGS, SECTIONS
from corolla.cli.config import ChatConfig, OutputConfig, TracesConfig
from corolla.cli.console import Output
from corolla.cli.finding import find_peers
from corolla.cli.flags import Flag, command
from corolla.cli.progress import show_progress
from corolla.cli.settings import Settings
from corolla.telemetry import configure_logging
from corolla.telemetry.spans import export_spans

__all__ = ["generate"]


@command(
    sections=(*SECTIONS, "traces"), flags=(*MODEL_FLAGS, Flag("chat.prompt"), Flag("traces.otlp"), Flag("output.json"))
)
def generate(settings: Settings) -> None:
    """Continue a text with a model that a swarm serves.

    Without --prompt, standard input is the text. The continuation goes to standard output as it comes, and what it cost
    to standard error.

    Examples:

    corolla generate --peer tls://192.0.2.7:31330 --prompt "Once upon a time"

    corolla generate --greedy --json < text.txt
    """
    from corolla.cli.conversation import Conversation

    config = settings.get(OutputConfig)
    configure_logging(config.log_level)
    output = Output(config)
    prompt = settings.get(ChatConfig).prompt
    if prompt is None:
        prompt = sys.stdin.read()
    peers = find_peers(settings, output)
    with show_progress(output) as report:
        conversation = Conversation(settings, report, peers)
    with export_spans(settings.get(TracesConfig).otlp, "corolla generate"), conversation:
        if not output.is_json:
            answer = conversation.complete(prompt, output.stream)
            output.result("")
            output.note(describe_cost(answer.cost), "dim")
            return
        answer = conversation.complete(prompt, lambda piece: None)
        cost = answer.cost
        hops = cost.chain.hops if cost.chain else ()
        output.json(
            {
                "text": answer.text,
                "tokens": cost.tokens,
                "chain": [{"peer": hop.peer, "span": hop.span} for hop in hops],
                "ttft_s": cost.ttft_s,
                "tokens_per_s": cost.tokens_per_s,
            }
        )
