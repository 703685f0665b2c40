"""How a command serves a web application: it listens, says where, and ends when it is told to.

Owns the socket and the server of HTTP; what is answered is the application's.
"""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from corolla.errors import ConfigError

__all__ = ["WebServer", "listen"]

_BACKLOG = 512


@contextmanager
def listen(host: str, port: int) -> Iterator[tuple[socket.socket, str]]:
    """Have a socket that listens, for the length of a ``with``.

    Args:
        host: On which network interface.
        port: On which port; 0 for any that is free.

    Yields:
        It, and the URL that leads to it, without a slash at its end.

    Raises:
        ConfigError: If it cannot be had.
    """
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        ear = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"{host} cannot be listened on: {error.strerror or error}") from error
    with ear:
        ear.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            ear.bind(where)
            ear.listen(_BACKLOG)
        except OSError as error:
            raise ConfigError(
                f"{host}:{port} cannot be listened on: {error.strerror or error}; choose another with --port"
            ) from error
        own = ear.getsockname()
        shown = f"[{own[0]}]" if family == socket.AF_INET6 else own[0]
        yield ear, f"http://{shown}:{own[1]}"


class WebServer:
    """Serves an application on a socket until it is told to stop.

    Args:
        app: What answers.
        leave_s: How long answers may go on when it ends.
        idle_s: How long a connection that asks nothing stays open.
    """

    def __init__(self, app: Callable[..., Any], *, leave_s: int = 2, idle_s: int = 5) -> None:
        import uvicorn

        class Server(uvicorn.Server):
            """Leaves signals to the command."""

            @contextmanager
            def capture_signals(self) -> Iterator[None]:
                yield

        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_keep_alive=idle_s,
            timeout_graceful_shutdown=leave_s,
        )
        self._server = Server(config)

    def stop(self) -> None:
        """End it, from any thread or signal; doing so twice does no harm."""
        self._server.should_exit = True

    async def run(self, ear: socket.socket) -> None:
        """Serve until it is told to stop."""
        await self._server.serve([ear])
