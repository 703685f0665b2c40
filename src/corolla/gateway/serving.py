"""Listening for requests until it is time to leave."""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import anyio
import uvicorn

from corolla.errors import UsageError
from corolla.gateway.app import make_app
from corolla.gateway.gateway import Gateway

__all__ = ["serve"]

_BACKLOG = 512
_LEAVE_S = 5
"""How long answers may go on when the gateway leaves."""
_IDLE_S = 15


class _Server(uvicorn.Server):
    """A server whose signals are its owner's."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(gateway: Gateway, told: Callable[[str], None], leaving: anyio.Event) -> None:
    """Serve HTTP.

    Args:
        gateway: Who answers.
        told: Is given the address, as ``http://127.0.0.1:8000``, once requests are taken.
        leaving: When to leave; answers under way have a few seconds.

    Raises:
        UsageError: If the address cannot be listened on.
    """
    listener = _listen(gateway.config.host, gateway.config.port)
    async with gateway:
        config = uvicorn.Config(
            make_app(gateway),
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_keep_alive=_IDLE_S,
            timeout_graceful_shutdown=_LEAVE_S,
        )
        server = _Server(config)

        async def leave() -> None:
            await leaving.wait()
            server.should_exit = True

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(leave)
            host, port = listener.getsockname()[:2]
            told(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
            await server.serve(sockets=[listener])
            tasks.cancel_scope.cancel()


def _listen(host: str, port: int) -> socket.socket:
    """Listen; who connects before the server runs waits.

    Raises:
        UsageError: If that cannot be.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        raise UsageError(f"cannot listen on {host} port {port}: {error.strerror or error}; give another") from error
    listener.setblocking(False)
    return listener
