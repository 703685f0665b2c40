"""Whole sequences through the blocks of a swarm and back: requests that leave nothing behind on the servers."""

# B batch, T tokens, D model width

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from msgspec import structs

from corolla.client.directory import AsyncSwarm, ModelRouter
from corolla.client.hop import read_tensors
from corolla.client.retry import try_chains
from corolla.client.target import Target
from corolla.codec import all_finite, encode, wire_bytes
from corolla.errors import Error
from corolla.routing import Demand, Work
from corolla.terms import Chain, Hop
from corolla.wire import Backward, Forward, Gradients, Output, TensorMeta

__all__ = ["Batch", "Grads", "Pass", "run_backward", "run_forward"]


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences, and what every block needs to know of them.

    Args:
        hidden_BTD: The first block's input.
        attention_mask_BT: 0 for padding; ``None`` if there is none.
        position_ids_BT: ``None`` for 0, 1, 2, ...
        taps: Absolute indices of blocks whose outputs are wanted as well.
    """

    hidden_BTD: torch.Tensor
    attention_mask_BT: torch.Tensor | None = None
    position_ids_BT: torch.Tensor | None = None
    taps: tuple[int, ...] = ()

    @property
    def mask(self) -> bytes | None:
        """The mask as it travels."""
        return None if self.attention_mask_BT is None else _bytes(self.attention_mask_BT.to(torch.uint8))

    @property
    def positions(self) -> bytes | None:
        """The positions as they travel."""
        return None if self.position_ids_BT is None else _bytes(self.position_ids_BT.to(torch.int32))

    def rows(self, start: int, stop: int) -> "Batch":
        """Take some of the sequences."""
        return Batch(
            self.hidden_BTD[start:stop],
            None if self.attention_mask_BT is None else self.attention_mask_BT[start:stop],
            None if self.position_ids_BT is None else self.position_ids_BT[start:stop],
            self.taps,
        )

    def demand(self, target: Target) -> Demand:
        """Say what running these sequences once asks of a chain."""
        rows, tokens = self.hidden_BTD.shape[:2]
        return Demand(
            model=target.model,
            span=target.span,
            prompt_tokens=rows * tokens,
            decode_steps=0,
            token_bytes=wire_bytes(self.hidden_BTD, target.codec) / (rows * tokens),
        )


class Grads(NamedTuple):
    """What has come of a backward pass.

    Args:
        hidden_BTD: The gradient with respect to the first block's input.
        adapter: Those with respect to what is added to blocks, all numbers of a run of blocks in a row, by its first.
    """

    hidden_BTD: torch.Tensor
    adapter: dict[int, torch.Tensor]


@dataclass(slots=True)
class Pass:
    """What a forward pass has brought so far, and what a backward pass will need.

    Attributes:
        hidden_BTD: The output of the last block that was run.
        inputs: For each run of blocks at one server, that hop and its input, in order.
        taps: The outputs of the blocks that were asked for.
    """

    hidden_BTD: torch.Tensor
    inputs: list[tuple[Hop, torch.Tensor]] = field(default_factory=list)
    taps: dict[int, torch.Tensor] = field(default_factory=dict)


async def run_forward(swarm: AsyncSwarm, target: Target, batch: Batch, first: Chain | None = None) -> Pass:
    """Run sequences through blocks. When a server fails, another one goes on from its input.

    Args:
        swarm: Where to find servers.
        target: Which blocks.
        batch: The sequences.
        first: The chain to begin with; ``None`` for the fastest.

    Raises:
        NoChain: If some blocks have no server.
        Error: What the last server said, after ``config.attempts`` failures.
    """
    done = Pass(batch.hidden_BTD)
    router = ModelRouter(swarm, batch.demand(target), first=first)

    async def attempt(chain: Chain) -> None:
        for hop in chain.hops:
            taps = tuple(block for block in batch.taps if block in hop.span)
            message = Forward(
                model=target.model,
                span=hop.span,
                hidden=_UNSENT,
                codec=target.codec,
                attention_mask=batch.mask,
                position_ids=batch.positions,
                taps=taps,
                adapters=target.hashes(hop.span),
            )
            output_BTD, *tapped = await _ask(swarm, hop, target, message, (done.hidden_BTD,))
            done.inputs.append((hop, done.hidden_BTD))
            done.taps.update(zip(taps, tapped, strict=True))
            done.hidden_BTD = output_BTD
            if hop.span.stop < target.span.stop:
                router.advance(hop.span.stop)

    await try_chains(router, attempt, attempts=swarm.config.attempts)
    return done


async def run_backward(
    swarm: AsyncSwarm, target: Target, batch: Batch, inputs: Sequence[tuple[Hop, torch.Tensor]], grads: Pass
) -> Grads:
    """Bring gradients back through blocks that a forward pass went through.

    Args:
        swarm: Where to find servers.
        target: Which blocks.
        batch: The sequences, as they went in.
        inputs: What the forward pass kept in :attr:`Pass.inputs`.
        grads: The gradients of the loss with respect to the output, and to the taps.

    Returns:
        The gradients with respect to the first block's input, and to the target's adapter.

    Raises:
        NoChain: If some blocks have no server.
        Error: What the last server said, after ``config.attempts`` failures.
    """
    grad_BTD, of_adapter = grads.hidden_BTD, dict[int, torch.Tensor]()
    left = list(inputs)
    while left:
        hop, input_BTD = left.pop()
        here = Batch(input_BTD, batch.attention_mask_BT, batch.position_ids_BT, batch.taps)
        found = await _back_through(swarm, target, hop, here, Pass(grad_BTD, taps=grads.taps))
        if isinstance(found, Pass):  # its blocks are at several servers by now
            left += found.inputs
        else:
            grad_BTD = found.hidden_BTD
            of_adapter |= found.adapter
    return Grads(grad_BTD, of_adapter)


async def _back_through(swarm: AsyncSwarm, target: Target, first: Hop, batch: Batch, grads: Pass) -> Grads | Pass:
    """Go back through blocks that one server had, there if it can be.

    If no server has all of them any more, run them again on those that do.
    """
    target = target.part(first.span)

    async def attempt(chain: Chain) -> Grads | None:
        if len(chain.hops) > 1:
            return None
        (hop,) = chain.hops
        taps = tuple(block for block in batch.taps if block in hop.span)
        message = Backward(
            model=target.model,
            span=hop.span,
            tensors=(_UNSENT, _UNSENT),
            codec=target.codec,
            attention_mask=batch.mask,
            position_ids=batch.positions,
            taps=taps,
            adapters=target.hashes(hop.span),
            trains=target.part(hop.span).trains,
        )
        tensors = (batch.hidden_BTD, grads.hidden_BTD, *(grads.taps[block] for block in taps))
        grad_BTD, *of_adapter = await _ask(swarm, hop, target, message, tensors)
        return Grads(grad_BTD, dict.fromkeys((hop.span.start,), of_adapter[0]) if of_adapter else {})

    router = ModelRouter(swarm, batch.demand(target), first=Chain((first,)))
    found = await try_chains(router, attempt, attempts=swarm.config.attempts)
    if found is not None:
        return found
    return await run_forward(swarm, target, Batch(batch.hidden_BTD, batch.attention_mask_BT, batch.position_ids_BT))


_UNSENT = TensorMeta("raw", "float32", (1,), 0)  # stands where the encoded tensors' descriptions go


async def _ask(
    swarm: AsyncSwarm, hop: Hop, target: Target, message: Forward | Backward, tensors: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Send one request with its tensors to a hop and read the tensors of its answer."""
    encoded = [encode(tensor, message.codec) for tensor in tensors]
    metas = tuple(one.meta for one in encoded)
    described = {"hidden": metas[0]} if isinstance(message, Forward) else {"tensors": metas}
    message = structs.replace(message, **described)
    buffers = [buffer for one in encoded for buffer in one.buffers]
    answer: type[Output] | type[Gradients] = Output if isinstance(message, Forward) else Gradients
    shapes: list[tuple[int, ...]] = [tensors[0].shape]
    if isinstance(message, Forward):
        shapes *= 1 + len(message.taps)
    elif message.trains:
        shapes.append((target.numbers(hop.span),))
    try:
        await swarm.equip(hop, target)
        began_s = time.perf_counter()
        async with swarm.dial(hop) as channel:
            received = await channel.request(message, buffers, expected=answer, deadline_s=swarm.config.request_s)
        is_finite = isinstance(message, Forward) and all_finite(tensors)  # gradients may overflow
        results = read_tensors(received, shapes=shapes, peer=hop.peer, is_finite=is_finite)
    except Error as error:
        error.peer = error.peer or hop.peer
        raise
    _learn(swarm, hop, message, received.message, time.perf_counter() - began_s)
    return results


def _learn(
    swarm: AsyncSwarm, hop: Hop, message: Forward | Backward, answer: Output | Gradients, total_s: float
) -> None:
    """Note how long a request took; going back takes a server longer than going forward, which is what is compared."""
    if isinstance(message, Backward):
        swarm.praise(hop.peer)
        return
    rows, tokens = message.hidden.shape[:2]
    work = Work(
        blocks=len(hop.span),
        tokens=rows * tokens,
        is_decode=False,
        nbytes=message.hidden.nbytes + sum(meta.nbytes for meta in answer.tensors),
        total_s=total_s,
        queue_s=answer.timing.queue_s,
        compute_s=answer.timing.compute_s,
    )
    swarm.learn(hop.peer, work)


def _bytes(integers: torch.Tensor) -> bytes:
    return integers.contiguous().cpu().numpy().tobytes()
