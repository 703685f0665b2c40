"""``corolla demo``: a private swarm of a few processes on this machine, and a chat through all of them.

Owns the processes: none outlives it, however it ends, because each of them leaves when its standard input ends.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
from rich.live import Live
from rich.table import Table

from corolla.cli.config import DemoConfig, OutputConfig
from corolla.cli.console import Output
from corolla.cli.flags import Flag, command
from corolla.cli.progress import show_progress
from corolla.cli.settings import Given, Settings, load_settings, write_file
from corolla.errors import Error, PeerTimeout, UsageError
from corolla.hub import HubConfig, Repository, load_config, open_repository, stay_silent

if TYPE_CHECKING:
    from corolla.cli.conversation import Conversation
    from corolla.testing.processes import ServerProcess

__all__ = ["demo"]

_LOOK_EVERY_S = 0.1
_STATES = {
    "listening": "looking for the others",
    "joined": "choosing blocks",
    "claimed": "loading its blocks",
    "loaded": "measuring its speed",
    "online": "online",
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
    """
    anyio.run(_run, settings)


async def _run(settings: Settings) -> None:
    config, output = settings.get(DemoConfig), Output(settings.get(OutputConfig))
    with show_progress(output) as report:
        opening = partial(open_repository, config.model, config=settings.get(HubConfig), report=report)
        repository = await anyio.to_thread.run_sync(opening, abandon_on_cancel=True)
    shares = _split(_count_blocks(repository), config.servers)
    with _log_directory(config.keep_logs) as logs:
        write_file(logs / "settings.toml", settings, ("hub",))
        with _start(config.model, shares, logs) as servers:
            watching = _Watch(servers, output)
            conversation = await watching.wait(config.start_s, lambda: _enter(settings, config.model, servers[0]))
            with conversation:
                await _chat(conversation, config.question, output)


async def _chat(conversation: "Conversation", question: str, output: Output) -> None:
    from corolla.cli.talk import ask_interruptibly, has_terminal, show_answer, talk

    output.result(f"> {question}", "bold")
    if has_terminal():
        await ask_interruptibly(conversation, question, output)
        await talk(conversation, output)
    else:
        show_answer(conversation, question, output)


def _enter(settings: Settings, model: str, server: "ServerProcess") -> "Conversation":
    """Become a client of the swarm; its servers may still be loading."""
    from corolla.cli.chat import SECTIONS
    from corolla.cli.conversation import Conversation

    given = [
        Given("chat.model", model, "demo", is_text=True),
        Given("chat.peers", (server.address,), "demo", is_text=True),
        Given("chat.threads", _threads(1), "demo", is_text=True),
    ]
    return Conversation(load_settings(SECTIONS, flags=given, file=settings.file), stay_silent)


class _Watch:
    """Waits for servers and shows how far each of them is."""

    def __init__(self, servers: Sequence["ServerProcess"], output: Output) -> None:
        self._servers = servers
        self._output = output
        self._told: dict[int, str] = {}

    async def wait(self, limit_s: float, enter: Callable[[], "Conversation"]) -> "Conversation":
        """Introduce the servers to the first of them, enter the swarm, and wait until all are online."""
        entered: list[Conversation] = []

        async def run_enter() -> None:
            entered.append(await anyio.to_thread.run_sync(enter, abandon_on_cancel=True))

        deadline_s = time.monotonic() + limit_s
        is_live = self._output.notes.is_terminal and not self._output.is_silent
        with ExitStack() as stack:
            live = Live(console=self._output.notes, auto_refresh=False, transient=True)
            if is_live:
                stack.enter_context(live)
            async with anyio.create_task_group() as tasks:
                is_introduced = False
                while not (self._are_all_online() and entered):
                    self._check(deadline_s)
                    if not is_introduced and "listening" in self._servers[0].stages:
                        is_introduced = True
                        for server in self._servers:
                            _introduce(server, "" if server is self._servers[0] else self._servers[0].address)
                        tasks.start_soon(run_enter)
                    if is_live:
                        live.update(self._table(), refresh=True)
                    else:
                        self._tell()
                    await anyio.sleep(_LOOK_EVERY_S)
        self._told.clear()
        return entered[0]
