"""What a hop holds, told by the tokens that it was sent: enough to give another hop the same.

A row is a trail: its last piece of tokens, which knows the piece before it. So a step appends to a row, a rewind takes
pieces off it, and a reordering copies one pointer a row, however long the rows are; beams that part share their past;
and a row that nobody continues is forgotten with its bytes.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import NamedTuple

from corolla.codec import Encoded, splice
from corolla.replay.store import Sent
from corolla.wire import Buffer, Step
from corolla.wire.limits import MAX_PAYLOAD_BYTES

__all__ = ["Log", "Trail", "replay_tokens"]

_REPLAY_TOKENS = 1024
"""Tokens in one step of a replay: few enough to begin soon, enough to be computed as fast as a prompt."""


class Trail(NamedTuple):
    """The end of a row.

    Args:
        before: What comes before; ``None`` at the row's beginning.
        sent: The tensor that the piece is in.
        first: Its first token there.
        tokens: How many it has.
        length: How many tokens the row has up to the piece's end.
    """

    before: "Trail | None"
    sent: Sent
    first: int
    tokens: int
    length: int


class _Recent(NamedTuple):
    """A step that may be asked for again, and what it keeps of the rows before it."""

    step: Step
    sent: Sent
    before: tuple[Trail | None, ...]


class Log:
    """The tokens that a hop was sent, row by row, and the steps that may have to be sent to another again.

    Args:
        rows: How many rows the session has.

    Attributes:
        rows: For each row its end, ``None`` if it is empty. Never changed, but replaced: who keeps it can come back.
    """

    def __init__(self, rows: int) -> None:
        self.rows: tuple[Trail | None, ...] = (None,) * rows
        self._recent: deque[_Recent] = deque()

    @property
    def settled_rows(self) -> tuple[Trail | None, ...]:
        """What the steps that may be asked for again keep of the rows; all if there are none."""
        return self._recent[0].before if self._recent else self.rows

    @property
    def tokens(self) -> int:
        """How many tokens a replay sends, before the steps that may be asked for again."""
        return sum(row.length for row in self.settled_rows if row is not None)

    @property
    def longest(self) -> int:
        """How many tokens the longest row has."""
        return max(row.length if row is not None else 0 for row in self.rows)

    def note(self, step: Step, sent: Sent) -> None:
        """Write down a step that the hop is sent.

        Args:
            step: The step; what it says is settled will not be asked for again, nor will a step of a replay.
            sent: Its tensor.
        """
        self.settle(step.settled)
        if step.number:
            self._recent.append(_Recent(step, sent, _kept(self.rows, step)))
        rows = self.rows if step.order is None else [self.rows[row] for row in step.order]
        noted: list[Trail | None] = []
        first = 0
        for row, start, count in zip(rows, step.starts, step.counts, strict=True):
            before = _cut(row, start)
            noted.append(Trail(before, sent, first, count, start + count) if count else before)
            first += count
        self.rows = tuple(noted)

    def take(self, row: int, start: int, sent: Sent) -> None:
        """Write down some tokens of one row that another server has sent; what the row had from there on is forgotten.

        Args:
            row: Which row.
            start: How many tokens come before them.
            sent: Their tensor.
        """
        count = sent.meta.shape[0]
        trail = Trail(_cut(self.rows[row], start), sent, 0, count, start + count)
        self.rows = (*self.rows[:row], trail, *self.rows[row + 1 :])

    def shorten(self, lengths: Sequence[int]) -> None:
        """Forget what rows have beyond these lengths."""
        self.rows = tuple(_cut(row, length) for row, length in zip(self.rows, lengths, strict=True))

    def part(self, row: int, start: int, stop: int) -> Encoded:
        """Give some tokens of a row, the very bytes: from ``start`` on, at most to ``stop``, as far as one tensor can.

        Args:
            row: Which row.
            start: The first token, which the row has.
            stop: One past the last token that is wanted.
        """
        pieces: list[Trail] = []
        trail = _cut(self.rows[row], stop)
        while trail is not None and trail.length > start:
            pieces.append(trail)
            trail = trail.before
        pieces.reverse()
        alike = [*takewhile(lambda piece: _kind(piece) == _kind(pieces[0]), pieces)]
        parts = []
        for piece in alike:
            skipped = max(0, start - (piece.length - piece.tokens))
            parts.append((piece.sent.meta, piece.sent.payload, piece.first + skipped, piece.first + piece.tokens))
        return splice(parts)

    def settle(self, number: int) -> None:
        """Note that no step up to this one will be asked for again."""
        while self._recent and self._recent[0].step.number <= number:
            self._recent.popleft()

    def restore(self, rows: tuple[Trail | None, ...]) -> None:
        """Come back to rows as they were, with no step to be asked for again."""
        self.rows = rows
        self._recent.clear()

    def recent(self) -> Iterator[tuple[Step, Buffer]]:
        """Give the steps that may be asked for again, as they were sent."""
        for recent in self._recent:
            yield recent.step, recent.sent.payload

    def replay(self, limit_tokens: int) -> Iterator[tuple[Step, Buffer]]:
        """Give the steps that bring an empty session to where the log is, with the very bytes that were sent.

        First come the settled tokens, in steps of a replay, then the steps that may be asked for again, as they were.

        Args:
            limit_tokens: The most tokens of one step of a replay.
        """
        starts = [0] * len(self.rows)
        for pieces in _chunks(self.settled_rows, limit_tokens):
            counts = [0] * len(self.rows)
            for row, piece in pieces:
                counts[row] += piece.tokens
            encoded = splice(
                [(piece.sent.meta, piece.sent.payload, piece.first, piece.first + piece.tokens) for _, piece in pieces]
            )
            yield Step(starts=tuple(starts), counts=tuple(counts), hidden=encoded.meta), b"".join(encoded.buffers)
            starts = [start + count for start, count in zip(starts, counts, strict=True)]
        yield from self.recent()


def replay_tokens(log: Log) -> int:
    """Say how many tokens one step of a replay should have, so that it and its output fit a frame in any codec."""
    widths = [row.sent.meta.shape[1] for row in log.rows if row is not None]
    return max(1, min(_REPLAY_TOKENS, MAX_PAYLOAD_BYTES // (4 * max(widths, default=1))))


def _cut(row: Trail | None, length: int) -> Trail | None:
    """Shorten a row."""
    while row is not None and row.length > length:
        count = row.tokens - (row.length - length)
        row = row._replace(tokens=count, length=length) if count > 0 else row.before
    return row


def _kept(rows: Sequence[Trail | None], step: Step) -> tuple[Trail | None, ...]:
    """Shorten rows to what a step keeps of them; with more, a row with windows could not be taken back to it."""
    lengths = [0] * len(rows)
    for source, start in zip(step.order or range(len(rows)), step.starts, strict=True):
        lengths[source] = max(lengths[source], start)
    return tuple(_cut(row, length) for row, length in zip(rows, lengths, strict=True))


def _pieces(row: Trail | None) -> list[Trail]:
    """List a row's pieces from its beginning."""
    pieces = []
    while row is not None:
        pieces.append(row)
        row = row.before
    return pieces[::-1]


def _chunks(rows: Sequence[Trail | None], limit_tokens: int) -> Iterator[list[tuple[int, Trail]]]:
    """Cut all rows, one after another, into runs of pieces that can be sent as one tensor."""
    chunk: list[tuple[int, Trail]] = []
    room = limit_tokens
    for number, row in enumerate(rows):
        for piece in _pieces(row):
            if chunk and _kind(chunk[-1][1]) != _kind(piece):
                yield chunk
                chunk, room = [], limit_tokens
            first, stop = piece.first, piece.first + piece.tokens
            while first < stop:
                count = min(room, stop - first)
                chunk.append((number, piece._replace(first=first, tokens=count)))
                first, room = first + count, room - count
                if not room:
                    yield chunk
                    chunk, room = [], limit_tokens
    if chunk:
        yield chunk


def _kind(piece: Trail) -> tuple[str, str]:
    """Say how a piece is encoded: only what is encoded alike can travel as one tensor."""
    return piece.sent.meta.codec, piece.sent.meta.dtype
