"""What the compute thread is asked to do: a piece of work knows what is left of it and how to deliver its result."""

# B batch, T tokens, D model width, N packed tokens

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import torch

from corolla.blocks import Adapter, SessionCache
from corolla.cache import Lease, RowKV
from corolla.errors import SessionClosed, UsageError
from corolla.terms import Span

__all__ = [
    "OUTPUT",
    "Deliver",
    "FamilyRow",
    "ForwardWork",
    "Result",
    "Row",
    "RowSlice",
    "Sequences",
    "SessionRows",
    "StepWork",
    "Work",
    "WorkKind",
]


OUTPUT: Final = -1
"""Under this number a row that others may find stores what came out of its last block, as a block stores keys."""


class Result(NamedTuple):
    """What came of a piece of work.

    Args:
        tensors: The last block's output, then the taps'; or the gradient, then the adapter's. They are in the host's
            memory.
        queue_s: How long the work waited before its first tick.
        compute_s: How long its ticks took, shared ticks counted whole.
        found_tokens: How many of its tokens were not computed, as they were here already.
    """

    tensors: tuple[torch.Tensor, ...]
    queue_s: float
    compute_s: float
    found_tokens: int = 0


WorkKind = Literal["decode", "prefill", "forward", "backward"]
"""One new token of each row of a session; more of them; whole sequences; their gradients."""

OnWork = Callable[[WorkKind, int, Result], None]
"""Hears of what kind a piece of work was, how many tokens it had, and what came of it."""

Deliver = Callable[[Result | Exception], None]
"""Called once, on the compute thread, with what came of the work."""


class FamilyRow:
    """A row of a family whose attention cannot use the pool: it keeps the family's own cache."""

    shortest = 0
    content = None

    def __init__(self, cache: SessionCache) -> None:
        self.cache = cache

    @property
    def length(self) -> int:
        """How many tokens every block has stored."""
        return self.cache.seen_tokens

    def commit(self, length: int) -> None:
        """Make the row this long; the blocks themselves have made it longer."""
        self.cache.rewind(length)

    def begin_with(self, blocks: Span, prefixes: Mapping[int, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Store keys and values before the first token."""
        self.cache.begin_with(blocks, prefixes)

    def fork(self) -> "FamilyRow":
        """Copy the row, for a beam that goes on from it."""
        return FamilyRow(self.cache.copy())


Row = RowKV | FamilyRow


@dataclass(slots=True, eq=False)
class SessionRows:
    """A session as the engine sees it.

    Belongs to the event loop, but its rows are lent to the step that is under way, and that belongs to the compute
    thread. A step gives them back when it is complete; one that failed or was given up never does, since they may then
    hold anything, and so ends the session.

    Attributes:
        blocks: The blocks that it runs.
        lease: Its right to pages.
        rows: Its rows; ``None`` while a step has them.
        adapter: What is added to the blocks for it; its prefix stands before every row.
        ended: Why the session cannot go on; empty while it can.
        client: Whose it is: clients share what there is to compute with.
    """

    blocks: Span
    lease: Lease
    rows: tuple[Row, ...] | None
    adapter: Adapter | None = None
    ended: str = ""
    client: str = ""

    @property
    def prefix_tokens(self) -> int:
        """How many tokens stand in every row before the client's own."""
        return 0 if self.adapter is None else self.adapter.prefix_tokens

    def idle_rows(self) -> tuple[Row, ...]:
        """Give the rows, for a new step.

        Raises:
            SessionClosed: If the session has ended.
            UsageError: If a step has them.
        """
        if self.ended:
            raise SessionClosed(f"{self.ended}; open another session")
        if self.rows is None:
            raise UsageError("a step of this session is still under way; wait for its result")
        return self.rows

    def end(self, reason: str) -> None:
        """End the session, unless it has ended before.

        Args:
            reason: What :class:`SessionClosed` will say.
        """
        self.rows = None
        self.ended = self.ended or reason


class RowSlice(NamedTuple):
    """Some new tokens of one row: so many, behind ``start`` stored ones, at ``offset`` in the step's tensor."""

    row: int
    start: int
    tokens: int
    offset: int

    @property
    def where(self) -> slice:
        """Which part of the step's tensor."""
        return slice(self.offset, self.offset + self.tokens)


class Work:
    """What both kinds of work have: somebody who waits, times, and outputs that fill up tick by tick.

    Args:
        like: What the outputs are shaped like.
        outputs: How many there are.
    """

    def __init__(self, like: torch.Tensor, outputs: int) -> None:
        self.deliver: Deliver = _nobody
        self.queued_at_s = 0.0
        self.started_at_s: float | None = None
        self.compute_s = 0.0
        self.is_cancelled = False
        self.client = ""
        self.outputs: tuple[torch.Tensor, ...] = ()
        self._like = like
        self._count = outputs

    @property
    def results(self) -> tuple[torch.Tensor, ...]:
        """What is delivered when it is complete."""
        return self.outputs

    def put(self, where: slice, outputs: Sequence[torch.Tensor]) -> None:
        """Take what came of a part; if that is all there is, nothing is copied."""
        if where.start == 0 and where.stop == len(self._like):
            self.outputs = tuple(output.cpu() for output in outputs)
            return
        if not self.outputs:
            self.outputs = tuple(torch.empty_like(self._like, device="cpu") for _ in range(self._count))
        for whole, output in zip(self.outputs, outputs, strict=True):
            whole[where] = output

    @property
    def is_complete(self) -> bool:
        """Whether all outputs are there."""
        raise NotImplementedError


class StepWork(Work):
    """New tokens of a session's rows.

    Args:
        session: Whose; its rows are lent to this work.
        hidden_ND: The tokens, row after row.
        starts: For each row, how many stored tokens it keeps, besides the session's prefix.
        counts: For each row, how many of the new tokens are its own.
        order: For each row, the row it continues; ``None`` if all go on as they are.
        taps: Blocks whose outputs are wanted as well.

    Attributes:
        rows: The rows, from the first tick on in their new order.
        starts: How many stored tokens each row keeps, the prefix included.
        found: For each row, how many of the new tokens were here already.
        digests: Of each token's hidden state; ``None`` if nobody is to know them.
    """

    def __init__(
        self,
        session: SessionRows,
        hidden_ND: torch.Tensor,
        starts: tuple[int, ...],
        counts: tuple[int, ...],
        order: tuple[int, ...] | None = None,
        taps: tuple[int, ...] = (),
    ) -> None:
        super().__init__(hidden_ND, 1 + len(taps))
        self.session = session
        self.client = session.client
        self.blocks = session.blocks
        self.rows = session.idle_rows()
        self.adapter = session.adapter
        self.prefix_tokens = session.prefix_tokens
        self.hidden_ND = hidden_ND
        self.starts = tuple(self.prefix_tokens + start for start in starts)
        self.counts = counts
        self.order = order
        self.taps = taps
        self.done_tokens = 0
        self.found = [0] * len(counts)
        self.digests: list[bytes] | None = None

    @property
    def found_tokens(self) -> int:
        """How many tokens need not be computed."""
        return sum(self.found)

    @property
    def left_tokens(self) -> int:
        """How many tokens are still to be computed."""
        return len(self.hidden_ND) - self.found_tokens - self.done_tokens

    @property
    def is_complete(self) -> bool:
        """Whether all outputs are there."""
        return self.left_tokens == 0

    def begin(self) -> None:
        """Reorder and rewind the rows. The first to continue a row gets it, the others get copies."""
        if self.adapter is not None and self.prefix_tokens:
            prefixes = self.adapter.prefixes(self.hidden_ND.dtype)
            for row in self.rows:
                if row.length == 0:
                    row.begin_with(self.blocks, prefixes)
        if self.order is not None:
            taken: set[int] = set()
            rows: list[Row] = []
            for source in self.order:
                rows.append(self.rows[source].fork() if source in taken else self.rows[source])
                taken.add(source)
            self.rows = tuple(rows)
        for row, start in zip(self.rows, self.starts, strict=True):
            if row.length != start:
                row.commit(start)

    def take(self, index: int, first: int, row: RowKV) -> None:
        """Let a row go on from another that holds some of its new tokens, and their outputs.

        Args:
            index: Which row.
            first: Where its new tokens are in the step's tensor.
            row: What takes its place.
        """
        start = self.starts[index]
        output_1TD, _ = row.read(OUTPUT, start, row.length)
        self.rows = (*self.rows[:index], row, *self.rows[index + 1 :])
        self.found[index] = row.length - start
        self.put(slice(first, first + self.found[index]), [output_1TD[0]])

    def note(self, part: "RowSlice") -> None:
        """Note what computed tokens were computed from; their row has them by now."""
        content = self.rows[part.row].content
        if content is not None and self.digests is not None:
            content.add(self.digests[part.where])

    def slices(self, budget_tokens: int) -> Iterator[RowSlice]:
        """Yield the next tokens to compute, row by row, at most ``budget_tokens`` of them."""
        left, offset, passed = min(budget_tokens, self.left_tokens), 0, 0
        for row, (start, count, found) in enumerate(zip(self.starts, self.counts, self.found, strict=True)):
            due = count - found
            done = min(max(self.done_tokens - passed, 0), due)
            now = min(due - done, left)
            if now:
                yield RowSlice(row, start + found + done, now, offset + found + done)
            left -= now
            passed += due
            offset += count


class Sequences(NamedTuple):
    """Whole sequences, and where their tokens stand.

    Args:
        hidden_BTD: What enters the first block.
        attention_mask_BT: 0 for padding; ``None`` if there is none.
        position_ids_BT: ``None`` for 0, 1, 2, ...
        client: Whose they are; batches of clients take turns.
    """

    hidden_BTD: torch.Tensor
    attention_mask_BT: torch.Tensor | None = None
    position_ids_BT: torch.Tensor | None = None
    client: str = ""


class ForwardWork(Work):
    """Whole sequences through blocks, with nothing kept; with ``grads_BTD``, the way back instead.

    Args:
        blocks: Which blocks.
        sequences: What goes through them.
        taps: Blocks whose outputs are wanted, or have gradients, as well.
        grads_BTD: The gradients with respect to the output and the taps; ``None`` on the way forward.
        adapter: What is added to the blocks; ``None`` for nothing.
        trains: Whether its gradient is wanted as well.
    """

    def __init__(
        self,
        blocks: Span,
        sequences: Sequences,
        taps: tuple[int, ...] = (),
        grads_BTD: tuple[torch.Tensor, ...] | None = None,
        adapter: Adapter | None = None,
        trains: bool = False,
    ) -> None:
        hidden_BTD, attention_mask_BT, position_ids_BT, client = sequences
        super().__init__(hidden_BTD, 1 if grads_BTD is not None else 1 + len(taps))
        self.client = client
        self.adapter = adapter
        self.adapter_grads = [torch.zeros_like(one) for one in adapter.tensors] if adapter and trains else []
        self.blocks = blocks
        self.hidden_BTD = hidden_BTD
        self.attention_mask_BT = attention_mask_BT
        self.position_ids_BT = position_ids_BT
        self.taps = taps
        self.grads_BTD = grads_BTD
        self.done_rows = 0

    @property
    def is_complete(self) -> bool:
        """Whether all outputs are there."""
        return self.done_rows == len(self.hidden_BTD)

    @property
    def results(self) -> tuple[torch.Tensor, ...]:
        """What is delivered when it is complete."""
        return (*self.outputs, *(grad.cpu() for grad in self.adapter_grads))

    def next_rows(self, budget_tokens: int) -> slice:
        """Say which rows of the batch to compute next: at least one, at most ``budget_tokens`` tokens."""
        rows = max(1, budget_tokens // self.hidden_BTD.shape[1])
        return slice(self.done_rows, min(self.done_rows + rows, len(self.hidden_BTD)))


def _nobody(_: Result | Exception) -> None:
    """Stand for whoever waits, until the engine says who that is."""
