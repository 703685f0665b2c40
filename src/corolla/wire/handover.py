"""What is said when a server leaves a session to another: what it holds travels, so that nothing is computed again."""

from typing import Annotated

from msgspec import Meta

from corolla.wire.limits import MAX_ROWS, MAX_TENSORS
from corolla.wire.parts import Count, Counts, Seconds, TensorMeta, Tokens
from corolla.wire.root import Message
from corolla.wire.sessions import Successor

__all__ = ["HandOver", "HandedOver", "Leaving", "Restore", "Restored"]


class Leaving(Message, frozen=True, tag=True):
    """The server leaves; until then the client may have the session handed over to another.

    Args:
        left_s: How long it still serves the session, in seconds.
    """

    left_s: Seconds


class HandOver(Message, frozen=True, tag=True):
    """Asks a server to give another what it holds of the session; answered by :class:`HandedOver`.

    Steps go on meanwhile. Asked again, it gives what has changed since.

    Args:
        heir: Who gets it; its token lets this server feed the session there.
    """

    heir: Successor


class HandedOver(Message, frozen=True, tag=True):
    """Answers :class:`HandOver`: all was sent.

    Args:
        problem: Why it was not; empty if it was.
    """

    problem: Annotated[str, Meta(max_length=512)] = ""


class Restore(Message, frozen=True, tag=True):
    """Tokens of one row as a leaving server holds them; what the row had from there on is forgotten.

    The payload is all of its tensors. Goes to the heir, on the stream that feeds it, and is not answered.

    Args:
        row: Which row.
        start: How many tokens come before them.
        tensors: For each block in turn the keys and the values, ``[H, T, D]`` each, as they lie in memory.
        logged: What the successor was sent of these tokens, ``[T, D]``; ``None`` if the client was sent it.
    """

    row: Annotated[int, Meta(ge=0, lt=MAX_ROWS)]
    start: Tokens
    tensors: Annotated[tuple[TensorMeta, ...], Meta(min_length=2, max_length=2 * MAX_TENSORS)]
    logged: TensorMeta | None = None


class Restored(Message, frozen=True, tag=True):
    """All that the leaving server holds was sent; the heir says :class:`Done` to the client.

    Args:
        lengths: How many tokens each row has.
        number: The last step that these come from.
    """

    lengths: Counts
    number: Count
