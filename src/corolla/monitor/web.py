"""The monitor over HTTP: a page, a JSON API, live news by server-sent events, and Prometheus metrics.

Owns what is answered to whom. Everything is read-only, and bounded however many ask.
"""

from collections.abc import AsyncIterator
from importlib import resources
from typing import Annotated, Final

import anyio
import msgspec
from fastapi import FastAPI, Path, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CollectorRegistry
from starlette.middleware.gzip import GZipMiddleware

from corolla import __version__
from corolla.monitor.changes import Change
from corolla.monitor.metrics import observe_swarm
from corolla.monitor.observer import Observer
from corolla.telemetry.metrics import CONTENT_TYPE, render
from corolla.terms import MODEL_ID_PATTERN, ModelId

__all__ = ["make_app"]

_HEARTBEAT_S: Final = 15.0
_MAX_HOURS: Final = 24 * 90
_FILES: Final = {"monitor.css": "text/css", "monitor.js": "text/javascript", "icon.svg": "image/svg+xml"}
_HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class _Viewers:
    """How many pages are being kept up to date."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.count = 0


def make_app(observer: Observer) -> FastAPI:
    """Make the web application of a monitor.

    Args:
        observer: What it shows; it must be running.
    """
    app = FastAPI(title="Corolla monitor", version=__version__, docs_url=None, redoc_url=None)
    app.add_middleware(GZipMiddleware, minimum_size=1024)
    _add_page(app, observer)
    _add_api(app, observer)
    return app


def _add_page(app: FastAPI, observer: Observer) -> None:
    folder = resources.files("corolla.monitor") / "page"
    files = {name: (folder / name).read_bytes() for name in ("index.html", *_FILES)}

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response(files["index.html"], media_type="text/html", headers=_HEADERS)

    @app.get("/page/{name}", include_in_schema=False)
    async def file(name: str) -> Response:
        if name not in _FILES:
            return JSONResponse({"error": "there is no such file"}, 404)
        return Response(files[name], media_type=_FILES[name], headers=_HEADERS)

    @app.get("/healthz", summary="Whether the monitor sees the swarm")
    async def health() -> Response:
        age_s = observer.picture.age_s
        is_well = age_s is not None and age_s < 60
        return JSONResponse({"sees_swarm": is_well, "age_s": age_s}, 200 if is_well else 503)


def _add_api(app: FastAPI, observer: Observer) -> None:
    registry = CollectorRegistry()
    observe_swarm(observer, registry)
    viewers = _Viewers(observer.config.max_viewers)

    @app.get("/api/swarm", summary="The swarm as it is: models, blocks, servers, links")
    async def swarm(request: Request) -> Response:
        tag = f'"{observer.number}"'
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers={"ETag": tag})
        return _json(observer.encoded, {"ETag": tag})

    @app.get("/api/events", summary="What happened, the newest first")
    async def events(limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> Response:
        return _json(msgspec.json.encode(await observer.history.changes(limit)))

    @app.get("/api/history/{model}", summary="How a model was")
    async def history(
        model: Annotated[str, Path(pattern=MODEL_ID_PATTERN)],
        hours: Annotated[float, Query(gt=0, le=_MAX_HOURS)] = 24,
    ) -> Response:
        until_s = observer.picture.at_s
        samples = await observer.history.samples(ModelId(model), until_s - hours * 3600, until_s)
        return _json(msgspec.json.encode(samples))

    @app.get("/api/about", summary="What this monitor is")
    async def about() -> Response:
        return JSONResponse({"title": observer.config.title, "version": __version__})

    @app.get("/api/live", summary="The swarm and what happens, as server-sent events: swarm, change")
    async def live() -> Response:
        if viewers.count >= viewers.limit:
            message = f"{viewers.count} pages are being kept up to date, which is the limit; try again later"
            return JSONResponse({"error": message}, 503, {"Retry-After": "10"})
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(_tell(observer, viewers), media_type="text/event-stream", headers=headers)

    @app.get("/metrics", summary="Prometheus metrics of the swarm")
    async def metrics() -> Response:
        return Response(await anyio.to_thread.run_sync(render, registry), media_type=CONTENT_TYPE)


def _json(data: bytes, headers: dict[str, str] | None = None) -> Response:
    return Response(data, media_type="application/json", headers={"Cache-Control": "no-cache", **(headers or {})})


async def _tell(observer: Observer, viewers: _Viewers) -> AsyncIterator[bytes]:
    """Send each new picture, and each change since the one before; a line that says nothing if there is none."""
    viewers.count += 1
    try:
        told: Change | None = observer.changes[0] if observer.changes else None
        number = -1
        while True:
            changed = observer.changed
            if observer.number != number:
                number = observer.number
                yield _event("swarm", observer.encoded)
                news = _since(observer.changes, told)
                told = news[0] if news else told
                for change in reversed(news):
                    yield _event("change", msgspec.json.encode(change))
            with anyio.move_on_after(_HEARTBEAT_S) as waiting:
                await changed.wait()
            if waiting.cancelled_caught:
                yield b": still here\n\n"
    finally:
        viewers.count -= 1


def _event(kind: str, data: bytes) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), data)


def _since(changes: list[Change], told: Change | None) -> list[Change]:
    """Give the changes that are newer than one; JSON has no line breaks, so each fits on a line."""
    for place, change in enumerate(changes):
        if change is told:
            return changes[:place]
    return changes
