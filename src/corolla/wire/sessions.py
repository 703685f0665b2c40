"""What is said in a session: by its client, its servers, and one server to the next; ``wire/states.py`` says when."""

from typing import Annotated

import msgspec
from msgspec import Meta

from corolla.terms import Address, Span
from corolla.wire.adapters import BlockHashes
from corolla.wire.limits import MAX_ROWS, MAX_STEP_TOKENS, MAX_TENSORS
from corolla.wire.parts import (
    Blocks,
    CheckedModelId,
    CheckedPeerId,
    CodecName,
    Count,
    Counts,
    Load,
    Rows,
    Seconds,
    TensorMeta,
    Timing,
    Token,
    TraceContext,
)
from corolla.wire.root import Message

__all__ = [
    "CloseSession",
    "Closed",
    "Done",
    "Expect",
    "Feed",
    "OpenSession",
    "Output",
    "Redirect",
    "Redirected",
    "Resume",
    "SessionOpened",
    "Step",
    "Successor",
]


class Successor(msgspec.Struct, frozen=True, array_like=True):
    """Where a hop sends what it has computed.

    Args:
        peer: The next hop.
        addresses: Where to dial it, cheapest first; none to send by way of the client.
        token: What lets it into the session there; only the client and the two hops know it.
        is_new: Whether it holds nothing yet, so that a replay must go on to it.
    """

    peer: CheckedPeerId
    addresses: Annotated[tuple[Annotated[Address, Meta(max_length=256)], ...], Meta(max_length=16)]
    token: Token
    is_new: bool


class OpenSession(Message, frozen=True, tag=True):
    """Asks a server for room to generate on; answered by :class:`SessionOpened`.

    Args:
        model: The weights that the client means.
        span: The blocks to run, within the server's span.
        rows: How many sequences the session holds.
        max_tokens: How many tokens one row is expected to reach; admission counts on it, growth beyond it is best
            effort.
        codec: How outputs should be encoded.
        token: What whoever feeds the session must know, besides the client; ``None`` if nobody may.
        successor: Where outputs go; ``None`` to the client.
        key: Lets the client come back to the session when its stream breaks; ``None`` if it never will.
        adapters: What is added to each block.
        trace: Where a server that records traces adds its part; one that does not looks past it.
    """

    model: CheckedModelId
    span: Span
    rows: Annotated[int, Meta(gt=0, le=MAX_ROWS)]
    max_tokens: Annotated[int, Meta(gt=0, le=MAX_STEP_TOKENS)]
    codec: CodecName
    token: Token | None = None
    successor: Successor | None = None
    key: Token | None = None
    adapters: BlockHashes = ()
    trace: TraceContext | None = None


class SessionOpened(Message, frozen=True, tag=True):
    """The session's lease has begun, or goes on.

    Args:
        lease_s: The session ends if nothing is heard of it for this long, in seconds.
        taken: The last step that was taken.
    """

    lease_s: Seconds
    taken: Count = 0


class Resume(Message, frozen=True, tag=True):
    """Goes on with a session whose stream broke, on this one; answered by :class:`SessionOpened`.

    Then come the answers that the client may have missed.

    Args:
        key: Which session: that of its :class:`OpenSession`, whose sender alone may resume it.
        done: The last step that the client has an answer of.
    """

    key: Token
    done: Count


class Step(Message, frozen=True, tag=True):
    """Runs new tokens through the session's blocks; answered to the client by :class:`Output` or :class:`Done`.

    It comes from the client to the first hop, and from each hop to its successor. A hop that cannot reach its
    successor sends the successor's step to the client, who passes it on as it is.

    The payload is one tensor ``[N, D]``: the new tokens of all rows, row after row, without padding.

    Args:
        starts: For each row, how many tokens it keeps; fewer than it has rewinds it.
        counts: For each row, how many new tokens follow; they add up to N.
        hidden: The payload's tensor.
        order: For each row, the row whose stored tokens it continues; ``None`` leaves the rows as they are. Beam search
            reorders with it. Applied before ``starts``.
        taps: Absolute indices of blocks whose outputs are wanted as well.
        number: Counts the steps of a session from 1; a hop drops a step that it has taken already. 0 in a replay:
            keys and values are all that is wanted of it.
        settled: The last step whose output the client has, so that nobody will ask for it again.
    """

    starts: Counts
    counts: Counts
    hidden: TensorMeta
    order: Rows | None = None
    taps: Blocks = ()
    number: Count = 0
    settled: Count = 0


class Output(Message, frozen=True, tag=True):
    """What blocks made of the tokens of a :class:`Step` or a :class:`Forward`.

    Args:
        tensors: The last block's output, unless it went to a successor; then one for each tap, in the order asked for.
            Each is shaped like the input.
        timing: Where the time went.
        number: Which step of the session.
        load: How busy the server is, if it says so.
    """

    tensors: Annotated[tuple[TensorMeta, ...], Meta(min_length=1, max_length=MAX_TENSORS)]
    timing: Timing
    number: Count = 0
    load: Load | None = None


class Done(Message, frozen=True, tag=True):
    """A hop has taken a :class:`Step`, and its output went to its successor or, in a replay, to nobody.

    Args:
        timing: Where the time went.
        number: Which step of the session.
        load: How busy the server is, if it says so.
    """

    timing: Timing
    number: Count = 0
    load: Load | None = None


class Expect(Message, frozen=True, tag=True):
    """From now on whoever knows another token feeds the session, and nobody else; answered by :class:`Ack`.

    Args:
        token: The token.
    """

    token: Token


class Redirect(Message, frozen=True, tag=True):
    """From now on outputs go to another successor; answered by :class:`Redirected`.

    Args:
        successor: Where they go. If it is new, after a replay of those before; else after those that the client may
            lack.
    """

    successor: Successor


class Redirected(Message, frozen=True, tag=True):
    """Answers :class:`Redirect`: what the client is to pass on is from now on for the new successor."""


class Feed(Message, frozen=True, tag=True):
    """Asks to feed a session with steps on this stream; answered by :class:`Ack`. The steps are answered to the client.

    Args:
        token: Which session, and that one may.
    """

    token: Token


class CloseSession(Message, frozen=True, tag=True):
    """Ends the session and frees its pages; answered by :class:`Closed`."""


class Closed(Message, frozen=True, tag=True):
    """The session is over and the stream is free for another."""
