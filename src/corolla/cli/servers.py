"""The servers of a model as a table and a bar. Knows no swarm and no network."""

from collections.abc import Mapping, Sequence

import msgspec
from rich.table import Column, Table
from rich.text import Text

from corolla.cli.console import Output, without_controls
from corolla.terms import Announcement, PeerId

__all__ = ["count_servers", "server_as_data", "show_servers"]

_MARKS = " ▁▂▃▄▅▆▇█"  # how many servers have a block: none, one, ... eight or more
_NAMES = 16
_WIDTH = 64


def count_servers(servers: Sequence[Announcement], blocks: int) -> list[int]:
    """Count, for each block of a model, the servers that have it and are online.

    Args:
        servers: Those of the model.
        blocks: How many blocks it has.
    """
    return [sum(block in server.span for server in servers if server.state == "online") for block in range(blocks)]


def server_as_data(server: Announcement, rtts_s: Mapping[PeerId, float]) -> dict[str, object]:
    """Give what a server announces, for programs; without its proof of membership, which is of no use to them.

    Args:
        server: Which.
        rtts_s: How long the way there and back takes; who is missing here did not answer.
    """
    data: dict[str, object] = msgspec.structs.asdict(server)
    del data["membership"]
    return {**data, "rtt_s": rtts_s.get(server.peer)}


def show_servers(servers: Sequence[Announcement], blocks: int, output: Output, rtts_s: Mapping[PeerId, float]) -> None:
    """Show who serves which blocks of a model, and below, how many servers each block has.

    Args:
        servers: Those of the model.
        blocks: How many blocks it has.
        output: Where to.
        rtts_s: How long the way there and back takes; who is missing here did not answer.
    """
    table = Table(
        Column("peer", min_width=8),
        "name", "blocks", "state", "precision", "tokens/s", "free", "open", "version", "ms",
        box=None, header_style="bold",
    )  # fmt: skip
    for server in sorted(servers, key=lambda one: (one.span, one.peer)):
        speed = f"{server.speed.decode_tokens_per_s:.0f}" if server.speed else ""
        cells = [server.name[:_NAMES], str(server.span), server.state, server.precision, speed]
        cells += [str(server.free_tokens), str(server.sessions), server.version[:_NAMES]]
        cells.append(f"{rtts_s[server.peer] * 1000:.1f}" if server.peer in rtts_s else "no answer")
        table.add_row(server.peer[:8], *(Text(without_controls(cell)) for cell in cells))
    output.result("")
    output.result(table if servers else "no server of this swarm has this model")
    counts = count_servers(servers, blocks)
    missing = sum(count == 0 for count in counts)
    summary = f"{missing} of {blocks} blocks have no server" if missing else f"every block has {min(counts)} or more"
    output.result(f"\n|{_bar(counts)}| {summary}")


def _bar(counts: Sequence[int]) -> str:
    """Draw the counts; in models of very many blocks, a mark stands for the least of several."""
    step = -(-len(counts) // _WIDTH)
    least = [min(counts[start : start + step]) for start in range(0, len(counts), step)]
    return "".join(_MARKS[min(count, len(_MARKS) - 1)] for count in least)
