"""Servers as processes of their own, on this machine: for tests, benchmarks and the demo.

Owns the processes: none outlives the object that started it, nor the program that did.
"""

import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from corolla.errors import PeerFailed, PeerTimeout

__all__ = ["LocalSwarm", "ServerProcess"]

_LAST_LINES = 20


class ServerProcess:
    """``corolla serve`` on loopback, in a process of its own. Use it as a context manager.

    Args:
        model: What to serve.
        arguments: More arguments of ``corolla serve``.
        peers: Addresses of the swarm to join; none starts a swarm; ``None`` if :meth:`introduce` will say.
        log: A file for what it logs.

    Attributes:
        stages: What it has said so far: for each stage of its life, its name and particulars.
    """

    def __init__(self, model: str, *arguments: str, peers: Sequence[str] | None = (), log: Path) -> None:
        self.stages: dict[str, dict[str, Any]] = {}
        self.log = log
        self._changed = threading.Condition()
        join = ["--peers-from-stdin"] if peers is None else [word for peer in peers for word in ("--peer", peer)]
        command = [sys.executable, "-m", "corolla", "serve", model, "--host", "127.0.0.1", "--port", "0", *join]
        with log.open("wb") as sink:
            self.process = subprocess.Popen(
                [*command, "--json", "--until-eof", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=sink,
            )
        self._reader = threading.Thread(target=self._read, name="corolla-server-process", daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def address(self) -> str:
        """Where it listens, with its id; known from the stage ``listening`` on."""
        return f"{self.stages['listening']['addresses'][0]}/{self.stages['listening']['peer']}"

    @property
    def peer_id(self) -> str:
        """Who it is; known from the stage ``listening`` on."""
        return str(self.stages["listening"]["peer"])

    def wait_for(self, stage: str, *, span: str | None = None, within_s: float = 120.0) -> dict[str, Any]:
        """Wait until it has reached a stage of its life.

        Args:
            stage: As in :data:`corolla.server.Stage`.
            span: With which blocks, ``start:stop``; ``None`` for any.
            within_s: For how long.

        Returns:
            The particulars.

        Raises:
            PeerFailed: If it ended before; the message has its last words.
            PeerTimeout: If it did not get there in time.
        """

        def has_come() -> bool:
            said = self.stages.get(stage)
            return said is not None and span in (None, "{}:{}".format(*(said["span"] or ("", ""))))

        with self._changed:
            reached = self._changed.wait_for(lambda: has_come() or not self._reader.is_alive(), timeout=within_s)
        if has_come():
            return self.stages[stage]
        if reached:
            words = "\n".join(self.log.read_text(errors="replace").splitlines()[-_LAST_LINES:])
            raise PeerFailed(
                f"the server ended with status {self.process.wait()} before it was {stage}; it said:\n{words}"
            )
        raise PeerTimeout(f"the server was not {stage} within {within_s:.0f} s; see {self.log}")

    def introduce(self, peers: Sequence[str]) -> None:
        """Say which swarm to join, to a server that was started with ``peers=None`` and waits for it.

        Args:
            peers: Addresses; none starts a swarm.
        """
        if self.process.stdin is not None:
            with suppress(BrokenPipeError):  # if it has ended, :meth:`wait_for` says why
                self.process.stdin.write(f"{' '.join(peers)}\n".encode())
                self.process.stdin.flush()

    def leave(self) -> None:
        """Ask it to drain and leave; returns at once."""
        if self.process.stdin is not None:
            with suppress(BrokenPipeError):
                self.process.stdin.close()

    def stop(self, *, within_s: float = 10.0) -> int:
        """Ask it to leave, and kill it if it does not.

        Args:
            within_s: For how long it may take.

        Returns:
            Its exit status.
        """
        self.leave()
        try:
            self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
        return self._reap()

    def kill(self) -> None:
        """End it at once, as a crash would."""
        self.process.kill()
        self._reap()

    def _reap(self) -> int:
        status = self.process.wait()
        self._reader.join()
        self.leave()
        if self.process.stdout is not None:
            self.process.stdout.close()
        return status

    def _read(self) -> None:
        if self.process.stdout is None:
            return
        for line in self.process.stdout:
            if line.startswith(b"{"):
                said = json.loads(line)
                with self._changed:
                    self.stages.pop(said["stage"], None)  # so that what it said last is the last
                    self.stages[said["stage"]] = said
                    self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()


class LocalSwarm:
    """Some servers that together hold a model, all started at once. Use it as a context manager.

    Args:
        model: What they serve.
        spans: Which blocks each of them serves, ``start:stop``; ``None`` leaves the choice to it.
        arguments: More arguments of ``corolla serve``, for all.
        logs: A directory for their logs.

    Raises:
        PeerFailed: If the first server has ended before it listened.
        PeerTimeout: If it does not listen in time.
    """

    def __init__(self, model: str, spans: Sequence[str | None], *arguments: str, logs: Path) -> None:
        self.servers: list[ServerProcess] = []
        with ExitStack() as stack:
            for index, span in enumerate(spans):
                more = [] if span is None else ["--blocks", span]
                log = logs / f"server{index + 1}.log"
                server = ServerProcess(model, *more, *arguments, peers=None if index else (), log=log)
                self.servers.append(stack.enter_context(server))
            self.servers[0].wait_for("listening")
            for server in self.servers[1:]:
                server.introduce([self.address])
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for server in self.servers:  # all hear it before the first is waited for
            server.leave()
        self._stack.close()

    @property
    def address(self) -> str:
        """Where to enter the swarm."""
        return self.servers[0].address

    def wait_until_online(self, *, within_s: float = 120.0) -> Self:
        """Wait until all of them serve.

        Raises:
            PeerFailed: If one has ended.
            PeerTimeout: If one is not there in time.
        """
        for server in self.servers:
            server.wait_for("online", within_s=within_s)
        return self
