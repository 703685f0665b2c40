"""How a tick is computed: the only place where the engine touches a model. Runs on the compute thread."""

# B batch, T tokens, D model width, N packed tokens

import torch

from corolla.blocks import BlockSpan, PackedRow
from corolla.cache import RowKV
from corolla.engine.scheduler import ForwardTick, StepTick
from corolla.engine.work import FamilyRow, RowSlice, StepWork

__all__ = ["run_forward", "run_steps"]


@torch.inference_mode()
def run_steps(span: BlockSpan, tick: StepTick) -> None:
    """Compute a tick of session tokens and put what comes out where it belongs."""
    for work, _ in tick.parts:
        if work.done_tokens == 0:
            _begin(work)
    if isinstance(tick.parts[0][0].session.rows[0], RowKV):
        _run_packed(span, tick)
    else:
        for work, slices in tick.parts:
            for part in slices:
                _run_row(span, work, part)
    for work, slices in tick.parts:
        work.done_tokens += sum(part.tokens for part in slices)


def run_forward(span: BlockSpan, tick: ForwardTick) -> None:
    """Compute some rows of a batch, forward or, if it carries gradients, backward."""
    work, rows = tick
    if work.grads_BTD is None:
        with torch.inference_mode():
            outputs = _forward(span, tick, work.hidden_BTD[rows])
    else:
        hidden_BTD = work.hidden_BTD[rows].requires_grad_()
        with torch.enable_grad():
            results = _forward(span, tick, hidden_BTD)
            outputs = torch.autograd.grad(results, (hidden_BTD,), tuple(grad_BTD[rows] for grad_BTD in work.grads_BTD))
    for whole_BTD, part_BTD in zip(work.outputs, outputs, strict=True):
        whole_BTD[rows] = part_BTD
    work.done_rows = rows.stop


def _begin(work: StepWork) -> None:
    """Reorder and rewind, once the step is sure to be computed."""
    if work.order is not None:
        work.session.reorder(work.order)
    for row, start in zip(work.session.rows, work.starts, strict=True):
        if start != row.length:
            row.commit(start)


def _run_packed(span: BlockSpan, tick: StepTick) -> None:
    packed = [(work, part, work.session.rows[part.row]) for work, slices in tick.parts for part in slices]
    pieces = [work.hidden_ND[part.offset : part.offset + part.tokens] for work, part, _ in packed]
    hidden_ND = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    first = tick.parts[0][0]
    output_ND, taps = span.forward_packed(
        hidden_ND,
        [PackedRow(part.start, part.tokens, row) for _, part, row in packed if isinstance(row, RowKV)],
        blocks=first.blocks,
        taps=frozenset(first.taps),
    )
    results = (output_ND, *(taps[block] for block in first.taps))
    offset = 0
    for work, part, row in packed:
        for whole_ND, result_ND in zip(work.outputs, results, strict=True):
            whole_ND[part.offset : part.offset + part.tokens] = result_ND[offset : offset + part.tokens]
        row.commit(part.start + part.tokens)
        offset += part.tokens


def _run_row(span: BlockSpan, work: StepWork, part: RowSlice) -> None:
    row = work.session.rows[part.row]
    assert isinstance(row, FamilyRow)
    here = slice(part.offset, part.offset + part.tokens)
    output_BTD, taps = span.forward(
        work.hidden_ND[here][None],
        position_ids_BT=torch.arange(part.start, part.start + part.tokens, device=span.device)[None],
        cache=row.cache,
        blocks=work.blocks,
        taps=frozenset(work.taps),
    )
    for whole_ND, result_BTD in zip(work.outputs, (output_BTD, *(taps[block] for block in work.taps)), strict=True):
        whole_ND[here] = result_BTD[0]
    row.commit(part.start + part.tokens)


def _forward(span: BlockSpan, tick: ForwardTick, hidden_BTD: torch.Tensor) -> tuple[torch.Tensor, ...]:
    work, rows = tick
    output_BTD, taps = span.forward(
        hidden_BTD,
        attention_mask_BT=None if work.attention_mask_BT is None else work.attention_mask_BT[rows],
        position_ids_BT=None if work.position_ids_BT is None else work.position_ids_BT[rows],
        blocks=work.blocks,
        taps=frozenset(work.taps),
    )
    return output_BTD, *(taps[block] for block in work.taps)
