"""``model.blocks``: any range of the swarm's blocks as a differentiable torch module."""

# B batch, T tokens, D model width

import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Self, TypeVar

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from corolla.client.adapting import read_adapter, with_prefixes
from corolla.client.directory import AsyncSwarm
from corolla.client.gather import gather
from corolla.client.requests import Batch, Grads, Pass, run_backward, run_forward
from corolla.client.sync import Swarm
from corolla.client.target import Target
from corolla.codec import split_numbers, wire_bytes
from corolla.errors import UsageError
from corolla.routing import split
from corolla.terms import Chain, Span
from corolla.wire.limits import MAX_PAYLOAD_BYTES, MAX_STEP_TOKENS

__all__ = ["RemoteBlocks"]

_T = TypeVar("_T")


class RemoteBlocks(nn.Module):
    """A range of blocks that run on servers. It has no parameters; gradients flow through it to its input.

    ``blocks[4:8]`` is a part of it and ``blocks[4]`` a single block; indices count within the range, as in a list.

    Args:
        swarm: Where the servers are.
        target: Which blocks of which weights.
        dtype: The number format that activations are sent and returned in, before the codec.
        stand_ins: What stands in the place of all the model's blocks, where PEFT may have put adapters.
    """

    def __init__(self, swarm: Swarm, target: Target, dtype: torch.dtype, stand_ins: Sequence[nn.Module] = ()) -> None:
        super().__init__()
        self._swarm = swarm
        self._target = target
        self._dtype = dtype
        self._stand_ins = tuple(stand_ins)  # a tuple, so that they are not taken for parts of this module

    @property
    def target(self) -> Target:
        """Which blocks of which weights these are, what is added to them now, and how tensors travel."""
        adapter = read_adapter(self._stand_ins)
        return replace(self._target, adapter=None if adapter is None else adapter.part(self.span))

    def adapt(self, stand_ins: Sequence[nn.Module]) -> None:
        """Look for adapters beside what stands in the place of all the model's blocks, from now on."""
        self._stand_ins = tuple(stand_ins)

    @property
    def span(self) -> Span:
        """Which of the model's blocks these are."""
        return self._target.span

    def __len__(self) -> int:
        return len(self.span)

    def __getitem__(self, index: int | slice) -> Self:
        blocks = self.span.indices[index]
        chosen = range(blocks, blocks + 1) if isinstance(blocks, int) else blocks
        if not chosen or chosen.step != 1:
            raise UsageError(f"blocks[{index}] of {len(self)} blocks is not a range of one or more blocks in order")
        target = self._target.part(Span(chosen.start, chosen.stop))
        return type(self)(self._swarm, target, self._dtype, self._stand_ins)

    def extra_repr(self) -> str:
        """Say which blocks of which model these are."""
        return f"blocks {self.span} of model {self._target.model[:12]}"

    def forward(
        self,
        hidden_BTD: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run sequences through the blocks.

        Args:
            hidden_BTD: The first block's input, any float dtype, on any device.
            attention_mask: ``[B, T]``, 0 for padding; ``None`` if there is none.
            position_ids: ``[B, T]`` or ``[1, T]``; ``None`` for 0, 1, 2, ...

        Returns:
            The last block's output, of the input's dtype and device; differentiable with respect to ``hidden_BTD``.

        Raises:
            UsageError: If a shape does not fit.
            NoChain: If some blocks have no server.
            PeerError: If servers kept failing.
        """
        output_BTD, _ = self.tap(hidden_BTD, (), attention_mask, position_ids)
        return output_BTD

    def tap(
        self,
        hidden_BTD: torch.Tensor,
        taps: tuple[int, ...],
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        prefixes: Sequence[tuple[torch.Tensor, torch.Tensor]] = (),
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Run sequences through the blocks and look at some blocks' outputs on the way.

        Args:
            hidden_BTD: The first block's input.
            taps: Absolute indices of the blocks whose outputs are wanted.
            attention_mask: ``[B, T]``, 0 for padding.
            position_ids: ``[B, T]`` or ``[1, T]``.
            prefixes: For each block, keys and values ``[heads, tokens, width]`` that stand before the first token of
                every sequence; empty for none.

        Returns:
            The last block's output, and the wanted outputs by block; all differentiable, with respect to the input, the
            prefixes, and what PEFT has put beside the blocks' layers.

        Raises:
            UsageError: If a shape does not fit, or a tap is not among the blocks.
            NoChain: If some blocks have no server.
            PeerError: If servers kept failing.
        """
        if hidden_BTD.dim() != 3:
            raise UsageError(f"blocks take [batch, tokens, width], not a tensor of shape {list(hidden_BTD.shape)}")
        if outside := [block for block in taps if block not in self.span]:
            raise UsageError(f"blocks {outside} are not among blocks {self.span}")
        rows, tokens = hidden_BTD.shape[:2]
        if not hidden_BTD.numel():
            raise UsageError(f"blocks were given nothing to run: a tensor of shape {list(hidden_BTD.shape)}")
        for name, extra in (("attention_mask", attention_mask), ("position_ids", position_ids)):
            if extra is not None and tuple(extra.shape) not in {(rows, tokens), (1, tokens)}:
                raise UsageError(f"{name} has shape {list(extra.shape)}; the input has {rows} rows of {tokens} tokens")
        mask_BT = None if attention_mask is None or bool(attention_mask.all()) else attention_mask.expand(rows, tokens)
        positions_BT = None if position_ids is None else position_ids.expand(rows, tokens)
        sent_BTD = hidden_BTD.to("cpu", self._dtype)
        batch = Batch(sent_BTD.detach(), mask_BT, positions_BT, tuple(taps))
        target = self.target
        if prefixes:
            target = replace(target, adapter=with_prefixes(target.adapter, prefixes, self.span))
        trained = () if target.adapter is None else target.adapter.tensors()
        outputs = _RemoteFunction.apply(  # type: ignore[no-untyped-call]
            sent_BTD, self._swarm, target, batch, *trained
        )
        output_BTD, *tapped = (one.to(hidden_BTD.device, hidden_BTD.dtype) for one in outputs)
        return output_BTD, dict(zip(taps, tapped, strict=True))


class _RemoteFunction(torch.autograd.Function):
    """Forward and backward through the swarm, cut by rows into requests that run at once, over several chains."""

    @staticmethod
    def forward(
        context: torch.autograd.function.FunctionCtx,
        hidden_BTD: torch.Tensor,
        swarm: Swarm,
        target: Target,
        batch: Batch,
        *trained: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        shares, passes = swarm.call(_forward_all, swarm.core, target, batch)
        context.remote = (swarm, target, batch, shares, passes)  # type: ignore[attr-defined]
        context.save_for_backward(*trained)
        output_BTD = torch.cat([one.hidden_BTD for one in passes])
        return output_BTD, *(torch.cat([one.taps[block] for one in passes]) for block in batch.taps)

    @staticmethod
    @once_differentiable
    def backward(context: torch.autograd.function.FunctionCtx, *grads_BTD: torch.Tensor) -> tuple[Any, ...]:
        swarm, target, batch, shares, passes = context.remote  # type: ignore[attr-defined]
        trained = context.saved_tensors  # type: ignore[attr-defined]  # torch refuses if they have changed meanwhile
        start, grads = 0, []
        for share in shares:
            stop = start + len(share.part.hidden_BTD)
            output_BTD, *tapped = (grad_BTD[start:stop].contiguous() for grad_BTD in grads_BTD)
            grads.append(Pass(output_BTD, taps=dict(zip(batch.taps, tapped, strict=True))))
            start = stop
        found = swarm.call(_backward_all, swarm.core, target, shares, passes, grads)
        input_grad_BTD = torch.cat([one.hidden_BTD for one in found])
        if not target.trains:
            return input_grad_BTD, None, None, None, *(None for _ in trained)
        sums_F = torch.zeros(target.numbers(target.span))
        for one in found:  # in the order of the rows, so that sums are the same every time
            sums_F += torch.cat([one.adapter[first] for first in sorted(one.adapter)])
        of_trained = zip(split_numbers(sums_F, [one.shape for one in trained]), trained, strict=True)
        return input_grad_BTD, None, None, None, *(grad.to(one.device, one.dtype) for grad, one in of_trained)


def _limit_tokens(batch: Batch, batch_tokens: int) -> int:
    """Say how many tokens fit into one request and its answer, whatever the codec."""
    token_bytes = batch.hidden_BTD[0, 0].nbytes
    return min(batch_tokens, MAX_PAYLOAD_BYTES // (token_bytes * (2 + len(batch.taps))))


def _cut(batch: Batch, limit_tokens: int) -> list[Batch]:
    rows, tokens = batch.hidden_BTD.shape[:2]
    step = max(1, limit_tokens // tokens)
    return [batch.rows(start, min(start + step, rows)) for start in range(0, rows, step)]


def _piece_tokens(target: Target, batch: Batch, chain: Chain, micro_tokens: int) -> int:
    """Say how finely to cut what one chain gets: while one hop computes a piece, the next one computes another.

    The gradient of what trains comes back with each piece. It may be half as many bytes as the activations, which are
    three times on their way from the client to each hop and twice on the way back.
    """
    if len(chain.hops) < 2:
        return MAX_STEP_TOKENS
    if not target.trains:
        return micro_tokens
    token_bytes = 5 * len(chain.hops) * wire_bytes(batch.hidden_BTD[:1, :1], target.codec)
    gradient_bytes = target.numbers(target.span) * torch.float32.itemsize
    return max(micro_tokens, 2 * gradient_bytes // token_bytes)


class _Share(NamedTuple):
    """Some rows of a batch, and which chain should run them as its how-manieth request."""

    part: Batch
    chain: Chain | None
    turn: int


async def _share_out(swarm: AsyncSwarm, target: Target, batch: Batch) -> list[_Share]:
    """Cut a batch into requests, in the order of its rows, over chains that get as many rows as they are fast.

    What is too little to be split goes to the chain that is fastest when its turn comes.
    """
    config = swarm.config
    rows, tokens = batch.hidden_BTD.shape[:2]
    limit_tokens = _limit_tokens(batch, config.batch_tokens)
    limit = min(rows, rows * tokens // config.chain_tokens)
    if limit < 2:
        return [_Share(part, None, turn) for turn, part in enumerate(_cut(batch, limit_tokens))]
    limit = min(limit, config.chains)
    typical = _cut(batch, min(limit_tokens, tokens * math.ceil(rows / limit)))[0]
    lanes = await swarm.find_chains(typical.demand(target), limit)
    shares: list[_Share] = []
    start = 0
    for lane, count in zip(lanes, split(rows, lanes), strict=True):
        piece_tokens = min(limit_tokens, _piece_tokens(target, batch, lane.chain, config.micro_tokens))
        parts = _cut(batch.rows(start, start + count), piece_tokens) if count else []
        shares += [_Share(part, lane.chain, turn) for turn, part in enumerate(parts)]
        start += count
    return shares


async def _forward_all(swarm: AsyncSwarm, target: Target, batch: Batch) -> tuple[list[_Share], list[Pass]]:
    shares = await _share_out(swarm, target, batch)
    calls = [(run_forward, (swarm, target, share.part, share.chain)) for share in shares]
    return shares, await _gather_in_turns(shares, calls)


async def _backward_all(
    swarm: AsyncSwarm, target: Target, shares: list[_Share], passes: list[Pass], grads: list[Pass]
) -> list[Grads]:
    calls = [
        (run_backward, (swarm, target, share.part, done.inputs, grad))
        for share, done, grad in zip(shares, passes, grads, strict=True)
    ]
    return await _gather_in_turns(shares, calls)


async def _gather_in_turns(
    shares: Sequence[_Share], calls: Sequence[tuple[Callable[..., Awaitable[_T]], tuple[Any, ...]]]
) -> list[_T]:
    """Make calls so that every chain has its first request before any has its second."""
    order = sorted(range(len(calls)), key=lambda index: shares[index].turn)
    results = dict(zip(order, await gather([calls[index] for index in order]), strict=True))
    return [results[index] for index in range(len(calls))]
