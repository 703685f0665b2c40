"""The blocking face of the client: one event loop on a thread of its own, for callers who have none.

Everything asynchronous runs there; nothing here decides anything.
"""

import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import CancelledError
from dataclasses import replace
from types import TracebackType
from typing import Self, TypeVar

import anyio
from anyio.from_thread import BlockingPortal

from corolla.client.config import ClientConfig
from corolla.client.directory import AsyncSwarm
from corolla.errors import SessionClosed, ungrouped
from corolla.swarm import Identity, SwarmConfig
from corolla.swarm.transports.transport import Transport
from corolla.terms import Snapshot

__all__ = ["Swarm"]

_T = TypeVar("_T")


class Swarm:
    """A client's place in a swarm. Use it as a context manager, or close it yourself; models share it.

    Any number of threads may use it at once.

    Args:
        peers: An address of a peer of the swarm, or several: ``tls://host:port``, with or without ``/<peer id>``.
        invite: An invite to a private swarm, or the path of a file with one; the addresses in it are peers as well.
        config: How to talk to servers.
        swarm_config: How to talk to the swarm.
        transport: Makes this peer's way of sending bytes; ``None`` for TLS over TCP.

    Raises:
        ConfigError: If an address cannot be read.
        UsageError: If the invite is none, or has expired.
        BootstrapFailed: If none of the peers answers.
        NotAMember: If the swarm turns this peer away.
    """

    def __init__(
        self,
        peers: str | Sequence[str] = (),
        *,
        invite: str | None = None,
        config: ClientConfig | None = None,
        swarm_config: SwarmConfig | None = None,
        transport: Callable[[Identity], Transport] | None = None,
    ) -> None:
        if invite is not None:
            swarm_config = replace(swarm_config or SwarmConfig(), invite=invite)
        self.core = AsyncSwarm(
            [peers] if isinstance(peers, str) else list(peers),
            config=config,
            swarm_config=swarm_config,
            transport=transport,
        )
        self._portal: BlockingPortal | None = None
        self._reason = "it was closed"
        failures: list[BaseException] = []
        started = threading.Event()
        # A daemon, so that a script which forgets to close its swarm can still end.
        self._thread = threading.Thread(target=self._run, args=(started, failures), name="corolla-client", daemon=True)
        self._thread.start()
        started.wait()
        if failures:
            self._thread.join()
            raise failures[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def config(self) -> ClientConfig:
        """How this client talks to servers."""
        return self.core.config

    def snapshot(self) -> Snapshot:
        """Give the present view of the swarm.

        Raises:
            SessionClosed: If the swarm was closed.
        """

        async def take() -> Snapshot:
            return self.core.snapshot()

        return self.call(take)

    def call(self, function: Callable[..., Awaitable[_T]], *args: object) -> _T:
        """Run an async function on the client's event loop and wait for its result.

        Whoever is interrupted while waiting, by Ctrl-C say, cancels the function.

        Args:
            function: What to run.
            *args: Its arguments.

        Raises:
            SessionClosed: If the swarm was closed, before or meanwhile.
        """
        portal = self._portal
        if portal is None:
            raise self._closed()
        try:
            future = portal.start_task_soon(function, *args)
        except RuntimeError as error:
            if self._portal is None:
                raise self._closed() from error
            raise
        try:
            return future.result()
        except CancelledError as error:
            raise self._closed() from error
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Leave the swarm; calls that are under way in other threads are cancelled. Doing it twice does no harm."""
        portal, self._portal = self._portal, None
        if portal is not None:
            portal.call(portal.stop, True)
        self._thread.join()

    def _closed(self) -> SessionClosed:
        return SessionClosed(f"the swarm cannot be used any more: {self._reason}; make another Swarm")

    def _run(self, started: threading.Event, failures: list[BaseException]) -> None:
        async def serve() -> None:
            async with BlockingPortal() as portal, self.core:
                self._portal = portal
                started.set()
                await portal.sleep_until_stopped()

        try:
            with ungrouped():
                anyio.run(serve)
        except BaseException as error:  # noqa: BLE001 - it is raised in the thread that waits for the start, or told later
            self._reason = f"it failed: {error!r}"
            failures.append(error)
        finally:
            self._portal = None
            started.set()
