"""The life of a session on one stream: the whole table, and what each side may rely on.

This file knows neither how messages travel nor what they do. Each side of a stream keeps a :class:`SessionState` and
tells it every message that it sends or receives; it says what has happened, or that it may not happen. Everything that
changes a session's state is in this file.

::

    idle ──OpenSession──▶ opening ──SessionOpened──▶ open ──CloseSession──▶ closing ──Closed──▶ idle
      or Resume              │
                             └──Failure──▶ idle

    idle ──Feed──▶ joining ──Ack──▶ feeding: one step after another, or what a leaving server holds
                      │
                      └──Failure──▶ idle

While a session is open, the client sends the steps of its first hop, and news of the hops around; the server answers
every step that it takes or refuses, wherever it came from, also while the client is closing the session.
"""

from types import MappingProxyType
from typing import Final, Literal

from corolla.errors import LocalProtocolError, RemoteProtocolError, SessionClosed
from corolla.wire.messages import (
    Ack,
    Closed,
    CloseSession,
    Done,
    Expect,
    Failure,
    Feed,
    HandedOver,
    HandOver,
    Leaving,
    Message,
    OpenSession,
    Output,
    Redirect,
    Redirected,
    Restore,
    Restored,
    Resume,
    SessionOpened,
    Step,
)

__all__ = ["TABLE", "SessionState", "Side", "State"]

State = Literal["idle", "opening", "open", "closing", "joining", "feeding"]
Side = Literal["client", "server"]
"""The side that opened the stream, be it another server that feeds a session, and the side that answers."""

_ANSWERS: Final = (Output, Done, Failure, Ack, Redirected, Step, Leaving, HandedOver)

TABLE: Final = MappingProxyType[tuple[State, Side, type[Message]], State](
    {
        ("idle", "client", OpenSession): "opening",
        ("idle", "client", Resume): "opening",
        ("opening", "server", SessionOpened): "open",
        ("opening", "server", Failure): "idle",
        **{("open", "client", kind): "open" for kind in (Step, Expect, Redirect, HandOver)},
        **{("open", "server", kind): "open" for kind in _ANSWERS},
        ("open", "client", CloseSession): "closing",
        **{("closing", "server", kind): "closing" for kind in _ANSWERS},
        ("closing", "server", Closed): "idle",
        ("idle", "client", Feed): "joining",
        ("joining", "server", Ack): "feeding",
        ("joining", "server", Failure): "idle",
        **{("feeding", "client", kind): "feeding" for kind in (Step, Restore, Restored)},
    }
)


class SessionState:
    """What one side of a stream knows of the session on it.

    Args:
        side: Which side it is on.

    Attributes:
        state: Where in the table the session is.
        rows: How many rows a step must have.
    """

    def __init__(self, side: Side) -> None:
        self._here: Side = side
        self._there: Side = "server" if side == "client" else "client"
        self.state: State = "idle"
        self.rows = 0

    def sent(self, message: Message) -> None:
        """Note a message of this side.

        Raises:
            LocalProtocolError: If it may not be sent now.
            SessionClosed: If it is a step and there is no session to take it.
        """
        if isinstance(message, Step) and self.state in ("idle", "closing") and self._here == "client":
            raise SessionClosed("the session is closed; open another one")
        if problem := self._advance(self._here, message):
            raise LocalProtocolError(f"{problem}: a bug in Corolla, please report it")

    def received(self, message: Message) -> None:
        """Note a message of the other side.

        Raises:
            RemoteProtocolError: If it may not come now, or does not fit the session.
        """
        if problem := self._advance(self._there, message):
            raise RemoteProtocolError(problem)

    def _advance(self, side: Side, message: Message) -> str | None:
        following = TABLE.get((self.state, side, type(message)))
        if following is None:
            return f"{type(message).__name__} does not belong into a session that is {self.state}"
        if isinstance(message, OpenSession):
            self.rows = message.rows
        elif isinstance(message, Step) and (problem := self._misfit(message)):
            return problem
        elif isinstance(message, Restored) and len(message.lengths) != self.rows:
            return f"the lengths of {len(message.lengths)} rows in a session of {self.rows}"
        self.state = following
        return None

    def _misfit(self, step: Step) -> str | None:
        """Say why a step does not fit the session's rows, if it does not; what they hold is for the engine to judge."""
        if not len(step.starts) == len(step.counts) == self.rows:
            return f"a step for {len(step.starts)} rows in a session of {self.rows}"
        if step.order is not None and (len(step.order) != self.rows or max(step.order) >= self.rows):
            return f"an order that does not fit the session's {self.rows} rows"
        if sum(step.counts) != step.hidden.shape[0] or len(step.hidden.shape) != 2:
            return f"a step of {sum(step.counts)} tokens with a tensor of shape {list(step.hidden.shape)}"
        return None
