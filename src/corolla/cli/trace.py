"""``corolla trace``: a text, continued, and what happened on the way: each step by hop, and each decision."""

from typing import TYPE_CHECKING

from rich.table import Table

from corolla.cli.chat import MODEL_FLAGS, SECTIONS
from corolla.cli.config import ChatConfig, OutputConfig
from corolla.cli.console import Output, without_controls
from corolla.cli.finding import find_peers
from corolla.cli.flags import Flag, command
from corolla.cli.progress import show_progress
from corolla.cli.settings import Settings
from corolla.telemetry import configure_logging

if TYPE_CHECKING:
    from corolla.client import TraceEntry

__all__ = ["trace"]

_PROMPT = "The quick brown fox"


@command(sections=SECTIONS, flags=(*MODEL_FLAGS, Flag("chat.prompt"), Flag("output.json")))
def trace(settings: Settings) -> None:
    """Continue a text with a model of a swarm, and show where the time of each step went and what was decided.

    For each step, when it ended, how many tokens it had and how long it took; then for each hop the milliseconds of
    waiting, computing, and travelling. Decisions stand between the steps: which servers were chosen and why, who failed
    and is avoided for how long, what was replayed, resumed or handed over. The text itself is not shown.

    Examples:

    corolla trace --peer tls://192.0.2.7:31330 --prompt "Once upon a time"

    corolla trace --max-new-tokens 8 --json
    """
    from corolla.cli.conversation import Conversation

    config = settings.get(OutputConfig)
    configure_logging(config.log_level)
    output = Output(config)
    peers = find_peers(settings, output)
    with show_progress(output) as report:
        conversation = Conversation(settings, report, peers)
    with conversation:
        conversation.complete(settings.get(ChatConfig).prompt or _PROMPT, lambda piece: None)
        entries = conversation.trace.entries
    if output.is_json:
        for entry in entries:
            output.json(_described(entry))
        return
    table = Table("at, s", "what", "tokens", "ms", "hops: ms waiting + computing + travelling", box=None)
    for entry in entries:
        table.add_row(*_row(entry))
    output.result(table)


def _row(entry: "TraceEntry") -> tuple[str, ...]:
    at = f"{entry.at_s:.3f}"
    if not entry.hops:
        said = " ".join(f"{name}={without_controls(str(value))}" for name, value in entry.fields.items())
        return at, entry.what, "", "", said
    hops = "  ".join(
        f"{one.hop.peer[:8]} {one.queue_s * 1e3:.1f} + {one.compute_s * 1e3:.1f} + {one.network_s * 1e3:.1f}"
        for one in entry.hops
    )
    elapsed_s = entry.fields["elapsed_s"]
    return at, "step", str(entry.fields["tokens"]), f"{float(str(elapsed_s)) * 1e3:.1f}", hops


def _described(entry: "TraceEntry") -> dict[str, object]:
    hops = [
        {
            "peer": one.hop.peer,
            "span": one.hop.span,
            "queue_s": one.queue_s,
            "compute_s": one.compute_s,
            "network_s": one.network_s,
        }
        for one in entry.hops
    ]
    return {"at_s": entry.at_s, "what": entry.what, **entry.fields, **({"hops": hops} if hops else {})}
