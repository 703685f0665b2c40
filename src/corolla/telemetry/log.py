"""Events: one line each, a message and fields, through the standard library's logging.

Owns the two ways to write a line, for people and as JSON. A program calls :func:`configure_logging` once; a library
user who does not keeps whatever logging they have set up, since nothing happens here at import.
"""

import json as json_format
import logging
from datetime import UTC, datetime
from typing import Literal

__all__ = ["LevelName", "configure_logging", "event", "logger"]

LevelName = Literal["debug", "info", "warning", "error"]

_ROOT = "corolla"


def logger(name: str) -> logging.Logger:
    """Give the logger of a module.

    Args:
        name: The module's ``__name__``.
    """
    return logging.getLogger(name)


def event(
    log: logging.Logger,
    message: str,
    /,
    *,
    level: int = logging.INFO,
    error: BaseException | None = None,
    **fields: object,
) -> None:
    """Log one event.

    Fields are written by ``str`` and only if the level is on, so passing an object costs nothing. Texts that a
    peer sent may be passed as fields: whatever could break a line or a terminal is escaped.

    Args:
        log: The logger of the module that tells.
        message: What happened: a constant, so that equal events can be counted. What varies belongs in ``fields``.
        level: A level of :mod:`logging`.
        error: The error to write with its traceback.
        **fields: What it happened to, and the numbers, with their units in the names.
    """
    if log.isEnabledFor(level):
        log.log(level, "%s", message, exc_info=error, extra={"corolla_fields": fields}, stacklevel=2)


def configure_logging(level: LevelName = "info", *, json: bool = False) -> None:
    """Write Corolla's events to standard error; called again, it replaces what it set up before.

    Args:
        level: The lowest level to write.
        json: Whether to write one JSON object a line, for programs, instead of text for people.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonFormatter() if json else _TextFormatter())
    root = logging.getLogger(_ROOT)
    root.handlers = [handler]
    root.propagate = False
    root.setLevel(level.upper())


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        name = record.name.removeprefix(f"{_ROOT}.")
        words = [_written_at(record).strftime("%H:%M:%S"), record.levelname.lower(), f"{name}:", record.getMessage()]
        words += [f"{key}={_quote(str(value))}" for key, value in _fields(record).items()]
        line = " ".join(words)
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        content: dict[str, object] = {
            "time": _written_at(record).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "fields": _fields(record),
        }
        if record.exc_info:
            content["traceback"] = self.formatException(record.exc_info)
        return json_format.dumps(content, default=str)


def _written_at(record: logging.LogRecord) -> datetime:
    return datetime.fromtimestamp(record.created, UTC)


def _fields(record: logging.LogRecord) -> dict[str, object]:
    fields: dict[str, object] = getattr(record, "corolla_fields", {})
    return fields


def _quote(text: str) -> str:
    plain = text.isprintable() and text and not any(mark in text for mark in ' "=\\')
    return text if plain else json_format.dumps(text, ensure_ascii=not text.isprintable())
