"""The edge of the program: every way to fail becomes one clear line and an exit code.

0 is success, 1 a failure, 2 a mistake of the caller, which trying again does not mend, 130 an interruption, as shells
have it.
"""

import os
import sys
import traceback
from collections.abc import Iterator

from rich.console import Console

from corolla.cli.console import without_controls
from corolla.errors import Error, InternalError, LocalProtocolError, ModelNotFound, UnsupportedModel, UsageError

__all__ = ["INTERRUPTED", "MISUSED", "report_failure"]

INTERRUPTED = 130
"""The exit code of a program that was ended by Ctrl-C: 128 and the number of SIGINT."""

MISUSED = 2
"""The exit code for what was asked in vain and always will be."""

_FAILED = 1
_EXTRAS = {
    **dict.fromkeys(("fastapi", "prometheus_client", "uvicorn"), "monitor"),
    **dict.fromkeys(("llguidance", "sqlalchemy"), "gateway"),
    "psycopg": "postgresql",
    "peft": "tuning",
    "opentelemetry": "otlp",
}
"""Where packages belong; others come with torch."""


def report_failure(error: BaseException, *, debug: bool) -> int:
    """Say on standard error what went wrong.

    Args:
        error: What a command raised.
        debug: Whether to say where in the code, too.

    Returns:
        The exit code.
    """
    console = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
    causes = list(_causes(error))
    if any(isinstance(cause, KeyboardInterrupt) for cause in causes):
        console.print("interrupted", style="yellow")
        return INTERRUPTED
    if any(isinstance(cause, BrokenPipeError) for cause in causes):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered has nowhere to go
        console.print("error: whoever read the output has closed it", style="red")
        return _FAILED
    own = next((cause for cause in causes if isinstance(cause, Error)), None)
    missing = next((cause for cause in causes if isinstance(cause, ModuleNotFoundError)), None)
    is_bug = own is None or isinstance(own, InternalError | LocalProtocolError)
    if missing is not None and not (missing.name or "").startswith("corolla"):
        extra = _EXTRAS.get((missing.name or "").partition(".")[0], "torch")
        message = f"error: this needs the package {missing.name}; install it with: pip install 'corolla[{extra}]'"
    elif own is not None and not is_bug:
        message = f"error: {without_controls(own.message)}"
    else:
        shown = own or causes[0]
        message = (
            f"bug: {type(shown).__name__}: {without_controls(str(shown))}\n"
            "Please report it with all of the above and what corolla version --json says."
        )
    if debug or message.startswith("bug"):
        traceback.print_exception(error)
    console.print(message, style="red")
    return MISUSED if isinstance(own, UsageError | ModelNotFound | UnsupportedModel) else _FAILED


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Take groups apart: what several tasks raised."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _causes(inner)
    else:
        yield error
