"""Errors as OpenAI's API has them: what every way to fail looks like over HTTP."""

import logging
import math
import re
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from corolla.errors import Error, InternalError, InvalidRequest
from corolla.telemetry import event, logger

__all__ = ["ErrorBody", "ErrorDetail", "answer_bug", "answer_error", "answer_http", "answer_invalid", "describe"]

_LOG = logger(__name__)
_SHOWN_LETTERS = 1000
_LATER_S = 5.0
"""When to come back if nothing else is known."""
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_FIELD = re.compile(r"(?!(str|int|float|bool|list|dict)$)[a-z_]+")
"""What stands in the place of a mistake: fields; and the kinds that a union has, which mean nothing to a client."""
_CODES = {"context_too_long": "context_length_exceeded"}  # where OpenAI's clients look at another word


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """An answer that is an error."""

    error: ErrorDetail


def describe(error: Error) -> dict[str, Any]:
    """Write an error as OpenAI's API has it."""
    param = error.field if isinstance(error, InvalidRequest) else None
    return _body(error.http_status, error.message, error.code, param)


async def answer_error(request: Request, error: Exception) -> JSONResponse:
    """Answer with one of our errors."""
    if not isinstance(error, Error):
        return await answer_bug(request, error)
    if isinstance(error, InternalError):
        event(_LOG, "a request has found a bug", level=logging.ERROR, error=error)
    after_s = error.retry_after_s
    if after_s is None and error.http_status == 503:
        after_s = _LATER_S
    headers = {} if after_s is None else {"Retry-After": str(max(1, math.ceil(after_s)))}
    if error.http_status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(describe(error), error.http_status, headers)


async def answer_invalid(request: Request, error: Exception) -> JSONResponse:
    """Answer a request whose body is not what it should be."""
    if not isinstance(error, RequestValidationError):
        return await answer_bug(request, error)
    found = error.errors()
    first = next((one for one in found if not one["type"].endswith("_type")), found[0])  # of a union, what came closest
    place = [part for part in first["loc"][1:] if isinstance(part, int) or _FIELD.fullmatch(part)]
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
    reason = "is not known here" if first["type"] == "extra_forbidden" else f"is wrong: {first['msg']}"
    message = f"the body is no JSON: {first['msg']}" if first["type"] == "json_invalid" else f"{field or 'it'} {reason}"
    return JSONResponse(_body(400, message, "invalid_request", field or None), 400)


async def answer_http(request: Request, error: Exception) -> JSONResponse:
    """Answer a request of a page or a method that is not there."""
    if not isinstance(error, HTTPException):
        return await answer_bug(request, error)
    return JSONResponse(_body(error.status_code, str(error.detail), None, None), error.status_code, error.headers)


async def answer_bug(request: Request, error: Exception) -> JSONResponse:
    """Answer when this program is wrong; what exactly is for its log only."""
    event(_LOG, "a request has found a bug", level=logging.ERROR, error=error)
    return JSONResponse(describe(InternalError("a bug in the gateway; its log says more")), 500)


def _body(status: int, message: str, code: str | None, param: str | None) -> dict[str, Any]:
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    shown = {"message": message[:_SHOWN_LETTERS], "type": kind, "param": param, "code": _CODES.get(code or "", code)}
    return {"error": shown}
