"""The HTTP face: which address does what, who may, and how failures look."""

from functools import partial
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException
from starlette.responses import Response

from corolla import __version__
from corolla.errors import Error
from corolla.gateway.accounts import Account
from corolla.gateway.catalog import Offer
from corolla.gateway.chat_page import add_page
from corolla.gateway.chats import chat, stream_chat
from corolla.gateway.completions import complete, stream_completion
from corolla.gateway.embeddings import embed
from corolla.gateway.failures import ErrorBody, answer_bug, answer_error, answer_http, answer_invalid
from corolla.gateway.gateway import Gateway
from corolla.gateway.limits import BodyLimit
from corolla.gateway.reports import server_timing
from corolla.gateway.requests import ChatRequest, CompletionRequest, EmbeddingRequest
from corolla.gateway.streams import EventStream, unless_gone
from corolla.telemetry import event, logger

__all__ = ["make_app"]

_LOG = logger(__name__)
_GONE = Response(status_code=499)  # nobody reads it
_FAILURES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": why}
    for status, why in {
        400: "a field is wrong or cannot be honoured",
        401: "the API key is missing, unknown or revoked",
        404: "the model is not offered here",
        408: "the body did not come in time",
        413: "the body is too long",
        429: "the API key has had its requests of this minute or its tokens of this day; see Retry-After",
        502: "servers of the swarm failed",
        503: "no servers, or too many answers under way; see Retry-After",
        504: "servers of the swarm did not answer in time",
    }.items()
}
_STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {}, "text/event-stream": {}}, "description": "the answer, or its pieces"}
}


def make_app(gateway: Gateway) -> FastAPI:
    """Make the web application of a gateway.

    Args:
        gateway: Who answers; it has been entered.
    """
    app = FastAPI(title="Corolla gateway", version=__version__, docs_url=None, redoc_url=None)
    for kind, answer in (
        (Error, answer_error),
        (RequestValidationError, answer_invalid),
        (HTTPException, answer_http),
        (Exception, answer_bug),
    ):
        app.add_exception_handler(kind, answer)
    app.add_middleware(BodyLimit, limit_bytes=gateway.config.max_body_bytes)
    if gateway.config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=gateway.config.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    _add_answers(app, gateway)
    _add_models(app, gateway)
    add_page(app)
    return app


def _add_answers(app: FastAPI, gateway: Gateway) -> None:
    admitted = _admission(gateway)
    timed = gateway.metrics.timed

    @app.post("/v1/chat/completions", responses=_FAILURES | _STREAMED, operation_id="chat")
    async def chats(body: ChatRequest, request: Request, account: admitted) -> Response:  # type: ignore[valid-type]
        """Go on with a chat."""
        offer = _begin(gateway, account, body)
        if body.stream:
            return EventStream(timed("chat", partial(stream_chat, gateway, account, body, offer), offer))
        return await _at_once(request, timed("chat", partial(chat, gateway, account, body, offer), offer))

    @app.post("/v1/completions", responses=_FAILURES | _STREAMED, operation_id="complete")
    async def completions(body: CompletionRequest, request: Request, account: admitted) -> Response:  # type: ignore[valid-type]
        """Continue texts."""
        offer = _begin(gateway, account, body)
        if body.stream:
            streamed = partial(stream_completion, gateway, account, body, offer)
            return EventStream(timed("text_completion", streamed, offer))
        whole = partial(complete, gateway, account, body, offer)
        return await _at_once(request, timed("text_completion", whole, offer))

    @app.post("/v1/embeddings", responses=_FAILURES, operation_id="embed")
    async def embeddings(body: EmbeddingRequest, request: Request, account: admitted) -> Response:  # type: ignore[valid-type]
        """Turn texts into vectors."""
        offer = _begin(gateway, account, body)
        whole = partial(embed, gateway, account, body, offer)
        is_there, answer = await unless_gone(request.receive, timed("embeddings", whole, offer))
        return JSONResponse(answer) if is_there else _GONE


def _add_models(app: FastAPI, gateway: Gateway) -> None:
    admitted = _admission(gateway)

    @app.get("/v1/models", responses=_FAILURES, operation_id="list_models")
    async def models(account: admitted) -> dict[str, Any]:  # type: ignore[valid-type]
        """List the models that are offered, adapters among them."""
        return {"object": "list", "data": [_describe(offer) for offer in gateway.catalog.all()]}

    @app.get("/v1/models/{model:path}", responses=_FAILURES, operation_id="get_model")
    async def model(model: str, account: admitted) -> dict[str, Any]:  # type: ignore[valid-type]
        """Describe one model."""
        return _describe(gateway.catalog.find(model))

    @app.get("/health", operation_id="health")
    async def health() -> dict[str, str]:
        """Say that the gateway runs; for load balancers, without a key."""
        return {"status": "ok"}


def _admission(gateway: Gateway) -> Any:  # noqa: ANN401 - an annotation
    """Make the annotation of an argument that only a request with a key has."""
    bearer = HTTPBearer(auto_error=False, description="An API key: corolla gateway keys new makes one.")

    async def admit(given: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> Account:
        return await gateway.admit(None if given is None else given.credentials)

    return Annotated[Account, Depends(admit)]


def _begin(gateway: Gateway, account: Account, body: ChatRequest | CompletionRequest | EmbeddingRequest) -> Offer:
    """Find the model, and write down who asks for what."""
    offer = gateway.catalog.find(body.model)
    event(_LOG, "request", key=account.id, model=body.model, user=body.user or "")
    return offer


async def _at_once(request: Request, make: Any) -> Response:  # noqa: ANN401
    is_there, made = await unless_gone(request.receive, make)
    if not is_there or made is None:
        return _GONE
    body, answers = made
    return JSONResponse(body, headers={"Server-Timing": server_timing(answers)})


def _describe(offer: Offer) -> dict[str, Any]:
    return {
        "id": offer.name,
        "object": "model",
        "created": offer.made_s,
        "owned_by": "swarm",
        "corolla": {
            "context_tokens": offer.context_tokens,
            "adapter": offer.adapter,
            "can_chat": offer.tokenizer.chat_template is not None,
        },
    }
