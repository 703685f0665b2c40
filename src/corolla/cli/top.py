"""``corolla top``: a swarm in the terminal, live. It needs no torch, and shows what the monitor's page does."""

import sys
from collections.abc import Sequence
from datetime import datetime

import anyio
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from corolla.cli.config import OutputConfig
from corolla.cli.console import Output
from corolla.cli.finding import find_peers
from corolla.cli.flags import FINDING_FLAGS, Flag, command
from corolla.cli.keys import pressed_keys, unbuffered
from corolla.cli.settings import Settings
from corolla.cli.state import with_state
from corolla.monitor import Change, ModelView, MonitorConfig, Observer, Picture, ServerView, observing
from corolla.swarm import SwarmConfig

__all__ = ["show_picture", "top"]

_STRIP = 48
_SPAN = 14
_WIDE = 110
_SHADES = ("#ddd6fb", "#b9a9f5", "#9880ee", "#7a5af0", "#6a48e0")
_EVENTS = 6
_OLD_S = 10.0


@command(
    sections=("chat", "swarm"),
    flags=(
        *FINDING_FLAGS,
        Flag("output.json"),
        Flag("output.quiet"),
    ),
)
def top(settings: Settings) -> None:
    """Watch a swarm in the terminal.

    It shows the models, which blocks have servers and how fast, the servers, and what happens; q or Ctrl-C ends it. If
    the output is no terminal, it is shown once; with --json, as the monitor's API gives it.

    Examples:

    corolla top --peer tls://192.0.2.7:31330

    corolla top --json | jq '.models[].tokens_per_s'
    """
    output = Output(settings.get(OutputConfig))
    peers = find_peers(settings, output)
    is_live = sys.stdin.isatty() and output.results.is_terminal and not output.is_json

    async def show() -> None:
        config = MonitorConfig(measure_s=5.0)
        async with observing(with_state(settings.get(SwarmConfig)), peers, config) as observer:
            if is_live:
                await _follow(observer, output)
            else:
                await observer.measured()
                _show_once(observer, output)

    anyio.run(show)


def _show_once(observer: Observer, output: Output) -> None:
    if output.is_json:
        output.results.file.write(observer.encoded.decode() + "\n")
    else:
        output.result(show_picture(observer.picture, observer.changes, width=output.results.width))


async def _follow(observer: Observer, output: Output) -> None:
    async def end_on_q() -> None:
        async for key in pressed_keys():
            if key in {"q", "Q"}:
                tasks.cancel_scope.cancel()

    with unbuffered(), Live(console=output.results, screen=True, auto_refresh=False) as live:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(end_on_q)
            while True:
                changed = observer.changed
                width, rows = output.results.size
                live.update(show_picture(observer.picture, observer.changes, width=width, rows=rows), refresh=True)
                await changed.wait()


def show_picture(picture: Picture, changes: Sequence[Change], *, width: int, rows: int | None = None) -> RenderableType:
    """Draw a swarm for a terminal.

    Args:
        picture: The swarm.
        changes: What happened, the newest first.
        width: How wide the terminal is.
        rows: How high the terminal is; ``None`` for as high as is needed.
    """
    if not picture.models:
        return Text("the swarm has no server")
    room = None if rows is None else max(3, (rows - 3 - _EVENTS) // len(picture.models) - 7)
    parts: list[RenderableType] = []
    for model in picture.models:
        parts += [*_show_model(model, room, is_wide=width >= _WIDE), Text("")]
    for change in changes[:_EVENTS]:
        when = datetime.fromtimestamp(change.at_s).strftime("%H:%M:%S")
        who = change.name or change.peer[:8]
        style = "red" if change.what in {"died", "blind"} else "dim"
        parts.append(Text(f"{when}  {change.what:<8} {who} {change.span or ''}", style))
    if rows is not None:
        is_old = picture.age_s is None or picture.age_s > _OLD_S
        age = Text(f"not seen for {picture.age_s or 0:.0f} s  ", "red") if is_old else Text("live  ", "green")
        parts.insert(0, Text.assemble(("corolla top  ", "bold"), age, ("q ends", "dim")))
    return Group(*parts)


def _show_model(model: ModelView, room: int | None, *, is_wide: bool) -> list[RenderableType]:
    gap = f"{model.missing} of {model.blocks} blocks have no server" if model.missing else "every block has a server"
    one, next_server = model.session_tokens_per_s, model.next_server
    speed = f"one session {one:.1f} tokens/s, all {model.tokens_per_s:.1f}" if one else "nobody can use it now"
    gain = next_server.after - next_server.before
    bring = f"fill {next_server.fills} blocks" if next_server.fills else f"add {gain:.1f} tokens/s"
    return [
        Text.assemble((f"{model.name}  ", "bold"), (model.model[:12], "dim")),
        Text.assemble((gap, "red" if model.missing else "green"), f"; {speed}; {model.sessions} sessions"),
        Text.assemble("|", _strip(model), f"| the weakest are {model.bottleneck}"),
        Text(f"one more server would take {next_server.span} and {bring}", "dim"),
        _servers(model, room, is_wide=is_wide),
    ]


def _strip(model: ModelView) -> Text:
    """Draw the blocks by their throughput; in models of very many, a mark stands for the weakest of several."""
    step = -(-model.blocks // _STRIP)
    rates = [min(model.rates[start : start + step]) for start in range(0, model.blocks, step)]
    most = max(rates) or 1.0
    strip = Text()
    for rate in rates:
        shade = _SHADES[min(len(_SHADES) - 1, int(rate / most * len(_SHADES)))]
        strip.append("█" if rate else "x", shade if rate else "bold red")
    return strip


def _servers(model: ModelView, room: int | None, *, is_wide: bool) -> Table:
    names = ["server", "name", "blocks", "", "state", "tok/s", "open", "free", "ms"]
    table = Table(*(Column(name, no_wrap=True) for name in names), box=None, header_style="dim", padding=(0, 1, 0, 0))
    if is_wide:
        table.add_column("precision")
        table.add_column("version")
    shown = model.servers if room is None else model.servers[:room]
    for server in shown:
        speed = f"{server.decode_tokens_per_s:.1f}" if server.decode_tokens_per_s else ""
        cells = [server.name[:12], str(server.span), _bar(server, model.blocks), _state(server), speed]
        cells += [str(server.sessions), _short(server.free_tokens), _latency(server)]
        cells += [server.precision, server.version[:12]] if is_wide else []
        style = "red" if server.answers is False else "" if server.state == "online" else "yellow"
        table.add_row(server.peer[:8], *map(Text, cells), style=style)
    if len(shown) < model.servers_total:
        table.add_row("...", Text(f"{model.servers_total - len(shown)} more", "dim"))
    return table


def _short(number: int) -> str:
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return str(number)


def _bar(server: ServerView, blocks: int) -> str:
    start = server.span.start * _SPAN // blocks
    stop = max(start + 1, -(-server.span.stop * _SPAN // blocks))
    return " " * start + "━" * (stop - start) + " " * (_SPAN - stop)


def _state(server: ServerView) -> str:
    if server.next_span is not None:
        return f"to {server.next_span}"
    return f"loading {server.progress:.0%}" if server.state == "joining" else server.state


def _latency(server: ServerView) -> str:
    if server.answers is False:
        return "no answer"
    return "" if server.rtt_s is None else f"{server.rtt_s * 1000:.1f}"
