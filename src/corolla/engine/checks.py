"""What the engine refuses before anything is computed, so that one client's mistake cannot fail a tick of others.

Pure: looks at requests and lengths only.
"""

# B batch, T tokens, D model width, N packed tokens

from collections.abc import Sequence

import torch

from corolla.blocks import Adapter
from corolla.engine.work import ForwardWork, StepWork
from corolla.errors import ContextTooLong, SessionExpired, UsageError
from corolla.terms import Span

__all__ = ["check_blocks", "check_context", "check_forward", "check_prefix", "check_step", "check_taps"]


def check_prefix(adapter: Adapter | None, blocks: Span) -> None:
    """Check that all blocks that are run have a prefix, or none of them.

    Raises:
        UsageError: If only some have.
    """
    if adapter is None or not adapter.prefix_tokens:
        return
    if bare := [block for block in blocks.indices if block not in adapter.blocks]:
        raise UsageError(f"blocks {bare} have no prefix, but others of {blocks} do; give all of them one, or none")


def check_blocks(blocks: Span, served: Span) -> None:
    """Check that blocks are here.

    Raises:
        UsageError: If they are not.
    """
    if not served.covers(blocks):
        raise UsageError(f"blocks {blocks} were asked of a server that has {served}; look at the swarm again")


def check_taps(taps: Sequence[int], blocks: Span) -> None:
    """Check that taps are among the blocks that are run.

    Raises:
        UsageError: If they are not.
    """
    if outside := [block for block in taps if block not in blocks]:
        raise UsageError(f"the outputs of blocks {outside} were asked for, but only {blocks} are run here")


def check_context(tokens: int, context_tokens: int) -> None:
    """Check that the model was made for so many tokens in a row.

    Raises:
        ContextTooLong: If it was not.
    """
    if tokens > context_tokens:
        raise ContextTooLong(
            f"{tokens} tokens are more than the {context_tokens} that this model was made for; "
            "shorten the prompt or ask for fewer new tokens"
        )


def check_step(work: StepWork, *, can_rewind: bool) -> None:
    """Check that a step fits its session: its rows, and what they have stored.

    Args:
        work: The step.
        can_rewind: Whether the family's rows can be taken back.

    Raises:
        UsageError: If it does not.
        SessionExpired: If a row would be taken back to where windows have let go of tokens.
    """
    rows, order = len(work.rows), work.order
    if not rows == len(work.starts) == len(work.counts):
        raise UsageError(f"{len(work.starts)} starts and {len(work.counts)} counts came for a session of {rows} rows")
    if order is not None and (len(order) != rows or not all(0 <= source < rows for source in order)):
        raise UsageError(f"the order {list(order)} does not name a row for each of the session's {rows}")
    if min(work.counts) < 0 or sum(work.counts) != len(work.hidden_ND) or not sum(work.counts):
        raise UsageError(f"the rows get {list(work.counts)} tokens, but {len(work.hidden_ND)} hidden states came")
    # A row that is still empty will have the prefix before anything else.
    stored = [max(work.rows[source].length, work.prefix_tokens) for source in order or range(rows)]
    if not all(work.prefix_tokens <= start <= length for start, length in zip(work.starts, stored, strict=True)):
        raise UsageError(
            f"the rows should keep {list(work.starts)} tokens, but have stored {stored}; send the missing ones again"
        )
    if not can_rewind and list(work.starts) != stored:
        raise UsageError(
            f"this family keeps a running state that cannot be rewound from {stored} to {list(work.starts)} tokens; "
            "open a new session and send the tokens again"
        )
    shortest = [work.rows[source].shortest for source in order or range(rows)]
    if any(0 < start < least for start, least in zip(work.starts, shortest, strict=True)):
        raise SessionExpired(
            f"the rows should keep {list(work.starts)} tokens, but what blocks see in their windows is kept from "
            f"{shortest} on; open a new session and send the tokens again"
        )


def check_forward(work: ForwardWork, context_tokens: int) -> None:
    """Check that a batch is one that the blocks can run.

    Args:
        work: The batch.
        context_tokens: The longest row that the model was made for.

    Raises:
        ContextTooLong: If its rows, or their positions, are beyond that.
        UsageError: If it is empty, or its tensors do not fit each other.
    """
    shape_BTD, shape_BT = work.hidden_BTD.shape, work.hidden_BTD.shape[:2]
    if len(shape_BTD) != 3 or work.hidden_BTD.numel() == 0:
        raise UsageError(f"a batch has rows of tokens of hidden states, [B, T, D]; it came as {list(shape_BTD)}")
    prefix_tokens = 0 if work.adapter is None else work.adapter.prefix_tokens
    check_context(prefix_tokens + shape_BT[1], context_tokens)
    for name, tensor_BT in (("attention mask", work.attention_mask_BT), ("position ids", work.position_ids_BT)):
        if tensor_BT is not None and tensor_BT.shape != shape_BT:
            raise UsageError(f"the {name} have shape {list(tensor_BT.shape)}; the batch has {list(shape_BT)}")
    if work.position_ids_BT is not None:
        _check_positions(work.position_ids_BT, context_tokens)
    if work.grads_BTD is not None:
        if len(work.grads_BTD) != 1 + len(work.taps):
            raise UsageError(f"{len(work.grads_BTD)} gradients came for an output and {len(work.taps)} taps")
        if any(grad_BTD.shape != shape_BTD for grad_BTD in work.grads_BTD):
            raise UsageError(f"a gradient's shape differs from that of the input, {list(shape_BTD)}")


def _check_positions(position_ids_BT: torch.Tensor, context_tokens: int) -> None:
    # Families that look positions up in a table would read beyond it.
    first, last = int(position_ids_BT.min()), int(position_ids_BT.max())
    if first < 0:
        raise UsageError(f"position {first} is before the first token; positions count from 0")
    check_context(last + 1, context_tokens)
