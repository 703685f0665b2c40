"""``corolla demo``: a private swarm of a few processes on this machine, and a chat through all of them.

Owns the processes: none outlives it, however it ends, because each of them leaves when its standard input ends.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
from rich.live import Live
from rich.table import Table
from rich.text import Text

from corolla.cli.config import DemoConfig, OutputConfig
from corolla.cli.console import Output
from corolla.cli.flags import Flag, command
from corolla.cli.progress import show_progress
from corolla.cli.settings import Given, Settings, load_settings, write_file
from corolla.errors import PeerFailed, PeerTimeout, UsageError
from corolla.hub import HubConfig, Repository, open_repository, stay_silent
from corolla.telemetry import configure_logging

if TYPE_CHECKING:
    from corolla.cli.conversation import Conversation
    from corolla.testing.processes import ServerProcess

__all__ = ["demo", "split"]

_LOOK_EVERY_S = 0.1
_STATES = {
    "listening": "looking for the others",
    "joined": "choosing blocks",
    "claimed": "loading its blocks",
    "loaded": "measuring its speed",
    "online": "online",
    "moving": "moving to other blocks",
}
"""What a server is doing when it has told of a stage."""


@command(
    sections=("demo", "hub"),
    flags=(
        Flag("demo.model"),
        Flag("demo.servers"),
        Flag("demo.question"),
        Flag("demo.keep_logs"),
        Flag("output.quiet"),
    ),
)
def demo(settings: Settings) -> None:
    """Start a private swarm on this machine and chat with it.

    Three server processes share the blocks of a small model, and each answer is computed through all of them. Without a
    terminal it asks one question and ends.

    Examples:

    corolla demo

    corolla demo --servers 2 --question "Who wrote Faust?" < /dev/null
    """
    anyio.run(_run, settings)


async def _run(settings: Settings) -> None:
    config, output = settings.get(DemoConfig), Output(settings.get(OutputConfig))
    with show_progress(output) as report:
        opening = partial(open_repository, config.model, config=settings.get(HubConfig), report=report)
        repository = await anyio.to_thread.run_sync(opening, abandon_on_cancel=True)
    shares = split(_count_blocks(repository), config.servers)
    with _log_directory(config.keep_logs, output) as logs:
        write_file(logs / "settings.toml", settings, ("hub",))
        output.note(f"starting {config.servers} servers of {config.model} on this machine; Ctrl-C ends them", "dim")
        with _start(config.model, shares, logs) as servers:
            entered: list[Conversation] = []

            async def enter() -> None:
                task = partial(_enter, settings, config.model, servers[0].address)
                entered.append(await anyio.to_thread.run_sync(task, abandon_on_cancel=True))

            await _bring_up(servers, output, config.start_s, enter)
            with entered[0] as conversation:
                await _chat(conversation, config.question, output)


async def _chat(conversation: "Conversation", question: str, output: Output) -> None:
    from corolla.cli.talk import ask_interruptibly, has_terminal, show_answer, talk

    output.result(f"> {question}", "bold")
    configure_logging("error")  # what a server's death did to an answer stands below it; a warning would break into it
    if has_terminal():
        await ask_interruptibly(conversation, question, output)
        await talk(conversation, output)
    else:
        await anyio.to_thread.run_sync(show_answer, conversation, question, output, abandon_on_cancel=True)


def _enter(settings: Settings, model: str, address: str) -> "Conversation":
    """Become a client of the swarm; its servers may still be loading."""
    from corolla.cli.chat import SECTIONS
    from corolla.cli.conversation import Conversation

    values = {"chat.model": model, "chat.peers": address, "chat.threads": _threads(settings.get(DemoConfig).servers)}
    given = [Given(key, value, "demo", is_text=True) for key, value in values.items()]
    return Conversation(load_settings(SECTIONS, flags=given, file=settings.file), stay_silent)


@contextmanager
def _start(model: str, shares: Sequence[int], logs: Path) -> Iterator[list["ServerProcess"]]:
    """Start all servers at once; the first hears that it is alone, the others wait to hear of it."""
    from corolla.testing.processes import ServerProcess

    servers: list[ServerProcess] = []
    with ExitStack() as stack:
        for number, share in enumerate(shares, start=1):
            name, threads = f"server{number}", str(_threads(len(shares)))
            arguments = ["--config", str(logs / "settings.toml"), "--num-blocks", str(share), "--name", name]
            arguments += ["--threads", threads, "--log-level", "info"]
            server = ServerProcess(model, *arguments, peers=None, log=logs / f"{name}.log")
            servers.append(stack.enter_context(server))
        servers[0].introduce([])
        try:
            yield servers
        finally:
            for server in servers:  # all hear it before the first is waited for
                server.leave()


async def _bring_up(
    servers: Sequence["ServerProcess"], output: Output, limit_s: float, enter: Callable[[], Coroutine[Any, Any, None]]
) -> None:
    """Introduce the servers to each other, enter their swarm meanwhile, and wait until all are online."""

    async def reach(server: "ServerProcess", stage: str) -> None:
        while stage not in server.stages:
            if server.process.poll() is not None:
                try:
                    server.wait_for(stage, within_s=1.0)
                except PeerFailed as error:
                    raise PeerFailed(f"{server.log.stem} failed: {error.message}") from error
            await anyio.sleep(_LOOK_EVERY_S)

    async with anyio.create_task_group() as showing:
        showing.start_soon(_show_states, servers, output)
        with anyio.move_on_after(limit_s) as limit:
            await reach(servers[0], "listening")
            for server in servers[1:]:
                server.introduce([servers[0].address])
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(enter)
                for server in servers:
                    tasks.start_soon(reach, server, "online")
        if limit.cancelled_caught:
            raise PeerTimeout(f"not all servers were online within {limit_s:.0f} s")
        showing.cancel_scope.cancel()
    output.note(f"{len(servers)} servers are online: {_describe_spans(servers)}", "green")


async def _show_states(servers: Sequence["ServerProcess"], output: Output) -> None:
    """Draw what each server is doing, until cancelled; on anything but a terminal write a line for each change."""
    if output.notes.is_terminal and not output.is_silent:
        with Live(_table(servers), console=output.notes, auto_refresh=False, transient=True) as live:
            while True:
                live.update(_table(servers), refresh=True)
                await anyio.sleep(_LOOK_EVERY_S)
    told: dict[str, str] = {}
    while True:
        for server in servers:
            if told.get(server.log.stem) != (state := _state(server)):
                told[server.log.stem] = state
                output.note(f"{server.log.stem}: {state}")
        await anyio.sleep(_LOOK_EVERY_S)


def _table(servers: Sequence["ServerProcess"]) -> Table:
    table = Table("server", "peer", "blocks", "state", box=None, header_style="dim")
    for server in servers:
        last = _last(server)
        state = Text(_state(server), "green" if last.get("stage") == "online" else "")
        table.add_row(server.log.stem, str(last.get("peer", ""))[:8], _span(last), state)
    return table


def _state(server: "ServerProcess") -> str:
    return _STATES.get(str(_last(server).get("stage")), "starting")


def _last(server: "ServerProcess") -> dict[str, Any]:
    return list(server.stages.values())[-1] if server.stages else {}


def _span(said: dict[str, Any]) -> str:
    return "{}:{}".format(*said["span"]) if said.get("span") else ""


def _describe_spans(servers: Sequence["ServerProcess"]) -> str:
    return ", ".join(f"{server.peer_id[:8]} has blocks {_span(_last(server))}" for server in servers)


def _count_blocks(repository: Repository) -> int:
    """Read how many blocks a model has; without transformers, which takes seconds to load, where its file says it."""
    raw = json.loads((repository.metadata_directory() / "config.json").read_bytes())
    count = raw.get("num_hidden_layers")
    if not isinstance(count, int):
        from corolla.blocks import load_config

        count = load_config(repository.metadata_directory()).get_text_config(decoder=True).num_hidden_layers
    return int(count)


def split(blocks: int, servers: int) -> list[int]:
    """Share a model evenly: how many blocks each server gets.

    Args:
        blocks: How many blocks it has.
        servers: How many servers share it.

    Raises:
        UsageError: If some server would get none.
    """
    if servers > blocks:
        raise UsageError(f"the model has {blocks} blocks, so at most {blocks} servers can share it, not {servers}")
    return [blocks // servers + (number < blocks % servers) for number in range(servers)]


def _threads(processes: int) -> int:
    """Say how many threads each of so many processes may use, so that together they have no more than cores."""
    return max(1, (os.cpu_count() or 1) // processes)


@contextmanager
def _log_directory(keep: Path | None, output: Output) -> Iterator[Path]:
    """Give the servers' logs a directory that is there afterwards only if it was asked for or something failed."""
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
        return
    directory = Path(tempfile.mkdtemp(prefix="corolla-demo-"))
    try:
        yield directory
    except Exception:
        output.notes.print(f"the servers' logs are in {directory}", style="dim")
        raise
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    shutil.rmtree(directory, ignore_errors=True)
