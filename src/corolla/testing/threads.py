"""Servers in a thread of this process: as real as others but for the process, and ready in a second instead of four.

Owns the thread and all that the servers hold. For tests of what models say; what a crash does, only processes show.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self

import anyio
from anyio.abc import TaskStatus
from anyio.from_thread import BlockingPortal, start_blocking_portal

from corolla.engine import EngineConfig
from corolla.server import Server, ServerConfig, Stage
from corolla.swarm import SwarmConfig
from corolla.terms import PeerId, Span

if TYPE_CHECKING:
    from concurrent.futures import Future

    from corolla.hub import HubConfig

__all__ = ["ServerThread", "ThreadedSwarm"]

_KV_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class ServerThread:
    """A server that runs on the event loop of another thread.

    Args:
        server: The server; its methods belong to that thread.
        portal: The way to that thread.
        life: Done when the server has left.
    """

    server: Server
    portal: BlockingPortal
    life: "Future[None]"

    @property
    def peer_id(self) -> PeerId:
        """Who it is."""
        return self.server.peer_id

    @property
    def address(self) -> str:
        """Where it listens, with its id."""
        return f"{self.server.addresses[0]}/{self.peer_id}"

    def forget(self, client: PeerId | None = None) -> None:
        """Let it lose a client's sessions, or all, without a word, as a server does that dies and is back at once."""
        self.portal.call(self.server.drop_sessions, client)

    def stop(self) -> None:
        """Ask it to drain and leave, and wait until it has.

        Raises:
            Error: What has gone wrong with it.
        """
        self.portal.call(self.server.stop)
        self.life.result()


class ThreadedSwarm:
    """Some servers that hold a model between them, on loopback. Use it as a context manager; all are online then.

    Args:
        model: What they serve.
        spans: Which blocks each of them serves, ``start:stop``.
        peers: Addresses of a swarm to join; none starts a swarm.
        engine: How they compute; by default on one thread each, with 32 MB for sessions.
        swarm: How they talk to each other.
        drain_s: How long sessions may go on when a server leaves.

    Attributes:
        servers: The servers, in the order of their spans.
        hubs: Where each of them keeps models and adapters, if set before the context is entered; else the usual place.

    Raises:
        Error: What kept a server from getting online; when the context is entered.
    """

    def __init__(
        self,
        model: str,
        spans: Sequence[str],
        *,
        peers: Sequence[str] = (),
        engine: EngineConfig | None = None,
        swarm: SwarmConfig | None = None,
        drain_s: float = 1.0,
    ) -> None:
        self.servers: list[ServerThread] = []
        self.hubs: Sequence[HubConfig] = ()
        self._model = model
        self._spans = [Span.parse(span) for span in spans]
        self._peers = tuple(peers)
        self._engine = engine or EngineConfig(threads=1, kv_bytes=_KV_BYTES)
        self._swarm = swarm
        self._drain_s = drain_s
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            portal = stack.enter_context(start_blocking_portal())
            stack.callback(self._stop_all)
            for span in self._spans:
                life, server = portal.start_task(self._serve, span)
                self.servers.append(ServerThread(server, portal, life))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def address(self) -> str:
        """Where to enter the swarm."""
        return self.servers[0].address

    def _stop_all(self) -> None:
        for thread in self.servers:
            thread.portal.call(thread.server.stop)
        for thread in self.servers:
            thread.life.result()

    async def _serve(self, span: Span, *, task_status: TaskStatus[Server] = anyio.TASK_STATUS_IGNORED) -> None:
        config = ServerConfig(
            model=self._model,
            blocks=span,
            host="127.0.0.1",
            port=0,
            peers=self._peers or tuple(thread.address for thread in self.servers[:1]),
            drain_s=self._drain_s,
        )
        hub = self.hubs[len(self.servers)] if self.hubs else None
        server = Server(config, engine=self._engine, swarm=self._swarm, hub=hub)

        async def watch(stage: Stage) -> None:
            if stage == "online":
                task_status.started(server)

        await server.run(watch)
