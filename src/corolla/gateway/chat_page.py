"""The chat page: files as they lie beside this module, written by hand and served as they are."""

import hashlib
from importlib import resources

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

__all__ = ["add_page"]

_KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def add_page(app: FastAPI) -> None:
    """Serve the chat page at ``/``.

    Args:
        app: The gateway's web application.
    """
    folder = resources.files("corolla.gateway") / "page"
    files = {one.name: one.read_bytes() for one in folder.iterdir() if one.name.rpartition(".")[2] in _KINDS}
    tags = {name: f'"{hashlib.sha256(content).hexdigest()[:16]}"' for name, content in files.items()}

    def serve(request: Request, name: str) -> Response:
        if name not in files:
            raise HTTPException(404, "there is no such file")
        headers = _HEADERS | {"ETag": tags[name]}
        if request.headers.get("if-none-match") == tags[name]:
            return Response(status_code=304, headers=headers)
        return Response(files[name], media_type=_KINDS[name.rpartition(".")[2]], headers=headers)

    @app.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        return serve(request, "index.html")

    @app.get("/page/{name}", include_in_schema=False)
    async def file(name: str, request: Request) -> Response:
        return serve(request, name)
