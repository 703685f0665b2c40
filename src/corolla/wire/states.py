"""The life of a session on one stream: the whole table, and what each side may rely on.

This file knows neither which side it is on nor how messages travel. Both sides keep one :class:`SessionState` and
tell it every message that they send or receive; it says what has happened, or that it may not happen. Everything
that changes a session's state is in this file.

::

    idle ──OpenSession──▶ opening ──SessionOpened──▶ open ──Step──▶ stepping ──Output──▶ open
     ▲                       │                         │                │    or Done
     │                       │ Failure                 │ CloseSession   │ Failure: the step left no trace
     │◀──────────────────────┘                         ▼                ▼
     └──────────────────Closed────────────────────  closing            open
"""

from types import MappingProxyType
from typing import Final, Literal

from corolla.errors import LocalProtocolError, RemoteProtocolError, SessionClosed
from corolla.wire.messages import Closed, CloseSession, Done, Failure, Message, OpenSession, Output, SessionOpened, Step

__all__ = ["TABLE", "SessionState", "State"]

State = Literal["idle", "opening", "open", "stepping", "closing"]

TABLE: Final = MappingProxyType[tuple[State, type[Message]], State](
    {
        ("idle", OpenSession): "opening",
        ("opening", SessionOpened): "open",
        ("opening", Failure): "idle",
        ("open", Step): "stepping",
        ("open", CloseSession): "closing",
        ("stepping", Output): "open",
        ("stepping", Done): "open",
        ("stepping", Failure): "open",
        ("closing", Closed): "idle",
    }
)


class SessionState:
    """What one side of a stream knows of the session on it.

    Attributes:
        state: Where in the table the session is.
        lengths: For each row, how many tokens the server has stored, counting a step only once it was answered.
    """

    def __init__(self) -> None:
        self.state: State = "idle"
        self.lengths: list[int] = []
        self._after_step: list[int] = []

    def sent(self, message: Message) -> None:
        """Note a message of this side.

        Raises:
            LocalProtocolError: If it may not be sent now.
            SessionClosed: If it is a step and there is no session to take it.
        """
        if isinstance(message, Step) and self.state in ("idle", "closing"):
            raise SessionClosed("the session is closed; open another one")
        if problem := self._advance(message):
            raise LocalProtocolError(f"{problem}: a bug in Corolla, please report it")

    def received(self, message: Message) -> None:
        """Note a message of the other side.

        Raises:
            RemoteProtocolError: If it may not come now, or does not fit the session.
        """
        if problem := self._advance(message):
            raise RemoteProtocolError(problem)

    def _advance(self, message: Message) -> str | None:
        following = TABLE.get((self.state, type(message)))
        if following is None:
            return f"{type(message).__name__} does not belong into a session that is {self.state}"
        if isinstance(message, OpenSession):
            self.lengths = [0] * message.rows
        elif isinstance(message, Step):
            if problem := self._misfit(message):
                return problem
            self._after_step = [start + count for start, count in zip(message.starts, message.counts, strict=True)]
        elif isinstance(message, Output | Done):
            self.lengths = self._after_step
        self.state = following
        return None

    def _misfit(self, step: Step) -> str | None:
        """Say why a step does not fit the session's rows, if it does not."""
        rows = len(self.lengths)
        if not len(step.starts) == len(step.counts) == rows:
            return f"a step for {len(step.starts)} rows in a session of {rows}"
        if step.order is not None and (len(step.order) != rows or max(step.order) >= rows):
            return f"an order that does not fit the session's {rows} rows"
        stored = self.lengths if step.order is None else [self.lengths[row] for row in step.order]
        for row, (start, length) in enumerate(zip(step.starts, stored, strict=True)):
            if start > length:
                return f"a step that starts at position {start} of row {row}, which has {length} tokens"
        if sum(step.counts) != step.hidden.shape[0] or len(step.hidden.shape) != 2:
            return f"a step of {sum(step.counts)} tokens with a tensor of shape {list(step.hidden.shape)}"
        return None
