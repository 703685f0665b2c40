"""How much of a request is read: so many bytes, within so much time."""

from typing import TYPE_CHECKING

import anyio
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from corolla.errors import RequestTooLarge
from corolla.gateway.failures import answer_error, answer_http

if TYPE_CHECKING:
    from starlette.responses import JSONResponse

__all__ = ["BodyLimit"]

_READ_S = 30.0


class BodyLimit:
    """Reads the body of each request before the application sees it, and refuses one that is too long or too slow.

    Args:
        app: The application.
        limit_bytes: The longest body.
    """

    def __init__(self, app: ASGIApp, limit_bytes: int) -> None:
        self._app = app
        self._limit_bytes = limit_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the body, then pass the request on, as ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal: JSONResponse | None = None
        messages: list[Message] = []
        try:
            with anyio.fail_after(_READ_S):
                messages = await self._read(Request(scope), receive)
        except RequestTooLarge as error:
            refusal = await answer_error(Request(scope), error)
        except TimeoutError:
            late = HTTPException(408, f"the body did not come within {_READ_S:.0f} s")
            refusal = await answer_http(Request(scope), late)
        if refusal is not None:
            await refusal(scope, receive, send)
            return

        async def read_again() -> Message:
            return messages.pop(0) if messages else await receive()

        await self._app(scope, read_again, send)

    async def _read(self, request: Request, receive: Receive) -> list[Message]:
        told = request.headers.get("content-length", "0")
        length = int(told) if told.isdecimal() else 0
        messages: list[Message] = []
        while length <= self._limit_bytes:
            message = await receive()
            messages.append(message)
            if message["type"] != "http.request" or not message.get("more_body", False):
                return messages
            length = sum(len(one.get("body", b"")) for one in messages)
        raise RequestTooLarge(f"the body has {length} bytes or more; up to {self._limit_bytes} are read")
