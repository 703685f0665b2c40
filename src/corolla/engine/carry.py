"""Keys and values that leave one engine and enter another, bit for bit. Belongs to the event loop: rows are idle."""

# H heads of keys and values, T tokens, D width of a head

from collections.abc import Sequence

import torch

from corolla.cache import RowKV
from corolla.engine.measure import PageCost
from corolla.engine.work import SessionRows
from corolla.errors import UsageError

__all__ = ["read_row", "restore_row", "token_bytes"]


def token_bytes(session: SessionRows, cost: PageCost) -> int:
    """Say how many bytes one token of a session's row takes on its way.

    Args:
        session: Whose.
        cost: What the engine stores.
    """
    shapes = [cost.shapes[block] for block in session.blocks.indices if block in cost.shapes]
    return sum(shape.numbers for shape in shapes) * cost.dtype.itemsize


def read_row(session: SessionRows, row: int, start: int, stop: int) -> list[torch.Tensor]:
    """Copy some tokens of a row: for each block in turn the keys and the values ``[H, T, D]``.

    Args:
        session: Whose; no step of it may be under way.
        row: Which row.
        start: The first token.
        stop: One past the last token.

    Raises:
        SessionClosed: If the session has ended.
        UsageError: If a step has the rows, or the family keeps a cache of its own, or tokens are gone.
    """
    stored = _stored(session, row)
    return [tensor for block in session.blocks.indices for tensor in stored.read(block, start, stop)]


def restore_row(
    session: SessionRows, row: int, start: int, tensors: Sequence[torch.Tensor], cost: PageCost, device: torch.device
) -> None:
    """Make tokens that another engine has computed part of a row; what it had from there on is forgotten.

    Args:
        session: Whose; no step of it may be under way.
        row: Which row.
        start: How many tokens come before them.
        tensors: What :func:`read_row` gave there.
        cost: What this engine stores.
        device: Where.

    Raises:
        SessionClosed: If the session has ended.
        UsageError: If they are not what this engine would have stored, or do not follow what it has.
        CacheFull: If the pool has no room for them.
    """
    stored = _stored(session, row)
    if not cost.shapes:
        raise _own_cache()
    tokens = tensors[0].shape[1] if tensors and tensors[0].dim() == 3 else 0
    shapes = [cost.shapes[block] for block in session.blocks.indices]
    due = [[one.heads, tokens, width] for one in shapes for width in (one.key_width, one.value_width)]
    if not tokens or [list(one.shape) for one in tensors] != due or any(one.dtype != cost.dtype for one in tensors):
        raise UsageError(
            f"{len(tensors)} tensors, the first {list(tensors[0].shape) if tensors else []} of "
            f"{tensors[0].dtype if tensors else None}, are not keys and values of blocks {session.blocks} here: "
            f"{len(due)} of {cost.dtype}; hand over to a server of the same model and precision"
        )
    if start > stored.length:
        raise UsageError(
            f"tokens from {start} on were handed over to a row of {stored.length}; those between are missing"
        )
    lengths = [one.length for one in session.idle_rows()]
    lengths[row] = start + tokens
    session.lease.hold(lengths)
    stored.content = None  # what these tokens were computed from is not known here
    if start < stored.length:
        stored.commit(start)
    pairs = zip(tensors[::2], tensors[1::2], strict=True)
    with torch.inference_mode():
        for block, (key_HTD, value_HTD) in zip(session.blocks.indices, pairs, strict=True):
            stored.append(block, key_HTD.to(device), value_HTD.to(device))
    stored.commit(start + tokens)


def _stored(session: SessionRows, row: int) -> RowKV:
    stored = session.idle_rows()[row]
    if not isinstance(stored, RowKV):
        raise _own_cache()
    if stored.shortest:
        raise UsageError(f"a row's windows have let go of tokens before {stored.shortest}; its tokens are replayed")
    if session.prefix_tokens:
        raise UsageError("a row that begins with an adapter's prefix is not handed over; its tokens are replayed")
    return stored


def _own_cache() -> UsageError:
    return UsageError("this family keeps a cache of its own, which cannot be handed over; its tokens are replayed")
