"""``corolla serve --restart``: starts the server again when it crashes, and says why.

Owns the server's process, which leaves when this one ends, however it ends. What kills a process from outside, as the
system does when memory is short, cannot be caught within it.
"""

import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

from corolla.cli.console import Output
from corolla.cli.failures import INTERRUPTED, MISUSED
from corolla.cli.signals import catch_signals
from corolla.telemetry import event, logger

__all__ = ["supervise"]

_LOG = logger(__name__)
_FIRST_WAIT_S = 1.0
_HEALTHY_S = 300.0
"""A server that lived so long has not failed at its start: the next wait is the first again."""


def supervise(arguments: Sequence[str], output: Output, *, longest_wait_s: float) -> int:
    """Run ``corolla`` with some arguments, again and again, until it ends in peace or in a way that cannot heal.

    Ctrl-C and SIGTERM let the server drain; a second one ends it at once.

    Args:
        arguments: What follows ``corolla`` on the command line.
        output: Where to say why the server is started again.
        longest_wait_s: Waits between two starts double up to this.

    Returns:
        The exit code.
    """
    supervisor = _Supervisor([sys.executable, "-m", "corolla", *arguments])
    with catch_signals(supervisor.stop, signal.SIGINT, signal.SIGTERM):
        wait_s = _FIRST_WAIT_S
        while True:
            started_s = time.monotonic()
            status = supervisor.run()
            if supervisor.is_stopping:
                return INTERRUPTED if status else 0
            if status in (0, MISUSED):
                if status:
                    output.note("this will not heal by itself: not started again", "red")
                return status
            if time.monotonic() - started_s > _HEALTHY_S:
                wait_s = _FIRST_WAIT_S
            reason = _describe(status)
            event(_LOG, "the server is started again", level=logging.WARNING, why=reason, after_s=wait_s)
            output.note(f"the server {reason}; starting it again in {wait_s:.0f} s", "yellow")
            if supervisor.wait(wait_s):
                return INTERRUPTED
            wait_s = min(2 * wait_s, longest_wait_s)


class _Supervisor:
    """The server's process, and whether it should end."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = [*command, "--until-eof"]
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()

    @property
    def is_stopping(self) -> bool:
        return self._stopping.is_set()

    def run(self) -> int:
        """Start the server and wait until it has ended."""
        with subprocess.Popen(self._command, stdin=subprocess.PIPE) as process:
            self._process = process
            if self.is_stopping:  # since before there was a process to tell
                self._leave(process)
            return process.wait()

    def wait(self, seconds: float) -> bool:
        """Wait, but not longer than until it should end; say whether it should."""
        return self._stopping.wait(seconds)

    def stop(self) -> None:
        process = self._process
        if process is not None and process.poll() is None:
            if self.is_stopping:
                process.kill()
            else:
                self._leave(process)
        self._stopping.set()

    def _leave(self, process: "subprocess.Popen[bytes]") -> None:
        if process.stdin is not None:
            with suppress(OSError):
                process.stdin.close()


def _describe(status: int) -> str:
    if status < 0:
        with suppress(ValueError):
            name = signal.Signals(-status).name
            return f"was ended by {name}" + (", as the system does when memory is short" if name == "SIGKILL" else "")
    return f"failed with status {status}, see above"
