"""How a tick is computed: the only place where the engine touches a model. Runs on the compute thread.

Inputs and outputs lie in the host's memory; they are moved to the device and back here, so that nobody else waits
for it.
"""

# B batch, T tokens, D model width, N packed tokens

from collections.abc import Sequence

import torch

from corolla.blocks import BlockSpan, PackedRow
from corolla.cache import RowKV
from corolla.engine.scheduler import ForwardTick, StepTick
from corolla.engine.work import OUTPUT, FamilyRow, RowSlice, StepWork

__all__ = ["run_forward", "run_steps"]


@torch.inference_mode()
def run_steps(span: BlockSpan, tick: StepTick) -> None:
    """Compute a tick of session tokens and put what comes out where it belongs."""
    if span.is_packable:
        _run_packed(span, tick)
    else:
        for work, slices in tick.parts:
            with span.adapted(work.adapter):
                for part in slices:
                    _run_row(span, work, part)
    for work, slices in tick.parts:
        work.done_tokens += sum(part.tokens for part in slices)


def run_forward(span: BlockSpan, tick: ForwardTick) -> None:
    """Compute some rows of a batch, forward or, if it carries gradients, backward."""
    work, rows = tick
    hidden_BTD = work.hidden_BTD[rows].to(span.device)
    if work.grads_BTD is None:
        with torch.inference_mode(), span.adapted(work.adapter):
            outputs = _forward(span, tick, hidden_BTD)
    else:
        outputs, adapter_grads = _backward(span, tick, hidden_BTD, work.grads_BTD)
        for sum_, grad in zip(work.adapter_grads, adapter_grads, strict=True):
            sum_ += grad
    work.put(rows, outputs)
    work.done_rows = rows.stop


def _backward(
    span: BlockSpan, tick: ForwardTick, hidden_BTD: torch.Tensor, grads_BTD: Sequence[torch.Tensor]
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Give the gradient with respect to the input, and those with respect to the adapter, if they are wanted."""
    work, rows = tick
    upstream_BTD = [grad_BTD[rows].to(span.device) for grad_BTD in grads_BTD]
    hidden_BTD = hidden_BTD.detach().requires_grad_()
    adapter, leaves = work.adapter, tuple[torch.Tensor, ...]()
    if adapter is not None and work.adapter_grads:
        leaves = tuple(tensor.detach().requires_grad_() for tensor in adapter.tensors)
        adapter = adapter.with_tensors(leaves)
    with torch.enable_grad(), span.adapted(adapter):
        outputs = _forward(span, tick, hidden_BTD)
        input_grad_BTD, *adapter_grads = torch.autograd.grad(
            outputs, (hidden_BTD, *leaves), upstream_BTD, allow_unused=True, materialize_grads=True
        )
    return (input_grad_BTD,), tuple(adapter_grads)


def _run_packed(span: BlockSpan, tick: StepTick) -> None:
    """Compute all parts at once. No row is longer before all blocks have run."""
    packed = [(work, part, work.rows[part.row]) for work, slices in tick.parts for part in slices]
    pieces = [work.hidden_ND[part.where] for work, part, _ in packed]
    hidden_ND = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    first = tick.parts[0][0]
    output_ND, taps = span.forward_packed(
        hidden_ND.to(span.device),
        [PackedRow(part.start, part.tokens, row, work.adapter) for work, part, row in packed if isinstance(row, RowKV)],
        blocks=first.blocks,
        taps=frozenset(first.taps),
    )
    results = [output_ND, *(taps[block] for block in first.taps)]
    offset = 0
    for work, part, row in packed:
        mine = slice(offset, offset + part.tokens)
        work.put(part.where, [result_ND[mine] for result_ND in results])
        if isinstance(row, RowKV) and row.content is not None:
            row.append(OUTPUT, output_ND[mine][None], output_ND[mine][None, :, :0])
        row.commit(part.start + part.tokens)
        work.note(part)
        offset += part.tokens


def _run_row(span: BlockSpan, work: StepWork, part: RowSlice) -> None:
    row = work.rows[part.row]
    assert isinstance(row, FamilyRow)
    hidden_ND = work.hidden_ND[part.where].to(span.device)
    output_BTD, taps = span.forward(
        hidden_ND[None],
        position_ids_BT=torch.arange(part.start, part.start + part.tokens, device=span.device)[None],
        cache=row.cache,
        blocks=work.blocks,
        taps=frozenset(work.taps),
    )
    work.put(part.where, [output_BTD[0], *(taps[block][0] for block in work.taps)])


def _forward(span: BlockSpan, tick: ForwardTick, hidden_BTD: torch.Tensor) -> tuple[torch.Tensor, ...]:
    work, rows = tick
    mask_BT, positions_BT = work.attention_mask_BT, work.position_ids_BT
    output_BTD, taps = span.forward(
        hidden_BTD,
        attention_mask_BT=None if mask_BT is None else mask_BT[rows].to(span.device),
        position_ids_BT=None if positions_BT is None else positions_BT[rows].to(span.device),
        blocks=work.blocks,
        taps=frozenset(work.taps),
    )
    return output_BTD, *(taps[block] for block in work.taps)
