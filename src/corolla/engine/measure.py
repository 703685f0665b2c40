"""What a span costs on this machine: bytes of free memory, bytes a token of KV, and tokens a second."""

import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import psutil
import torch

from corolla.blocks import BlockSpan, KVShape, PackedRow
from corolla.cache import PAGE_TOKENS, RowKV
from corolla.terms import Speed

if TYPE_CHECKING:
    from corolla.engine.engine import Engine

__all__ = ["ObservedSpeed", "PageCost", "free_bytes", "measure_speed", "page_cost"]

_PROMPT_TOKENS = 128
_DECODE_STEPS = 50
_DECODE_S = 0.5
_DECODE_WEIGHT, _PREFILL_WEIGHT = 0.02, 0.1
"""Of a new observation in the average; there are far more tokens than prompts."""
_LEAST_PROMPT_TOKENS = 32


class ObservedSpeed:
    """How fast a span is: as measured at the start, corrected by every step of a real session since.

    Args:
        blocks: How many blocks the span has.
    """

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        self._decode_s: float | None = None
        self._prefill_s: float | None = None

    @property
    def speed(self) -> Speed | None:
        """The present figure; ``None`` before :meth:`assume`."""
        if not self._decode_s or not self._prefill_s:
            return None
        return Speed(decode_tokens_per_s=1 / self._decode_s, prefill_tokens_per_s=1 / self._prefill_s)

    def assume(self, speed: Speed) -> None:
        """Begin with a figure."""
        self._decode_s, self._prefill_s = 1 / speed.decode_tokens_per_s, 1 / speed.prefill_tokens_per_s

    def note(self, blocks: int, counts: tuple[int, ...], compute_s: float) -> None:
        """Correct it by a step.

        Args:
            blocks: How many blocks it ran.
            counts: For each row, how many tokens.
            compute_s: How long that took.
        """
        if len(counts) != 1 or self._decode_s is None or self._prefill_s is None:
            return
        token_s = compute_s / max(counts) * self._blocks / blocks
        if counts == (1,):
            self._decode_s += _DECODE_WEIGHT * (token_s - self._decode_s)
        elif counts[0] >= _LEAST_PROMPT_TOKENS:
            self._prefill_s += _PREFILL_WEIGHT * (token_s - self._prefill_s)


def free_bytes(device: torch.device) -> int:
    """Ask how much memory is free where the blocks are."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


class PageCost(NamedTuple):
    """What a token of KV is on this machine.

    Args:
        token_bytes: Bytes in all blocks of a span, and of what comes out of the last, where rows keep that.
        shapes: What each block stores of a token; empty where rows cannot be read.
        dtype: Their number format.
        windows: How many tokens each block sees that does not see all of a row.
        output_bytes: Bytes of what comes out of the last block, where rows keep that.
    """

    token_bytes: float
    shapes: Mapping[int, KVShape]
    dtype: torch.dtype
    windows: Mapping[int, int] = MappingProxyType({})
    output_bytes: int = 0

    def token_bytes_of(self, blocks: int, measured: int) -> float:
        """Say what a token takes in so many blocks, if this is what it takes in ``measured`` like them."""
        return (self.token_bytes - self.output_bytes) * blocks / measured + self.output_bytes


@torch.inference_mode()
def page_cost(span: BlockSpan) -> PageCost:
    """Find out, by storing a page, what a token of KV takes."""
    shapes = span.kv_shapes
    hidden_ND = torch.zeros(PAGE_TOKENS, span.hidden_size, dtype=span.dtype, device=span.device)
    if not span.is_packable:
        cache = span.new_cache()
        span.forward(hidden_ND[None], cache=cache)
        return PageCost(cache.size_bytes / PAGE_TOKENS, {}, span.dtype)
    row = RowKV()
    span.forward_packed(hidden_ND, [PackedRow(0, PAGE_TOKENS, row)])
    row.commit(PAGE_TOKENS)
    dtypes = {tensor.dtype for block in row.blocks for tensor in row.read(block, 0, 1)}
    is_plain = len(row.blocks) == len(shapes) == len(span.span) and len(dtypes) == 1
    output_bytes = span.hidden_size * span.dtype.itemsize if span.is_chunkable else 0
    token_bytes = row.nbytes / PAGE_TOKENS + output_bytes
    dtype = next(iter(dtypes), span.dtype)
    return PageCost(token_bytes, shapes if is_plain else {}, dtype, span.windows, output_bytes)


async def measure_speed(engine: "Engine") -> Speed:
    """Time a session of the engine's own: one prompt of 128 tokens, then single tokens for half a second.

    Returns:
        Tokens a second through the whole span, for a single session, scheduling included.
    """
    room_tokens = min(engine.context_tokens, engine.load.free_tokens)
    prompt_tokens = max(1, min(_PROMPT_TOKENS, room_tokens - _DECODE_STEPS))
    steps = min(_DECODE_STEPS, room_tokens - prompt_tokens)
    span = engine.span
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(prompt_tokens, span.hidden_size, generator=generator).to(span.device, span.dtype)
    session = engine.open_session(span.span, 1, prompt_tokens + steps)
    try:
        started_at_s = time.perf_counter()
        await engine.step(session, hidden_ND[:1], starts=(0,), counts=(1,))  # the first tick sets things up
        first_s = time.perf_counter() - started_at_s
        rest = prompt_tokens - 1
        started_at_s = time.perf_counter()
        if rest:
            await engine.step(session, hidden_ND[1:], starts=(1,), counts=(rest,))
        prefill_s = time.perf_counter() - started_at_s
        started_at_s, done = time.perf_counter(), 0
        while done < steps and time.perf_counter() - started_at_s < _DECODE_S:
            await engine.step(session, hidden_ND[:1], starts=(prompt_tokens + done,), counts=(1,))
            done += 1
        decode_s = time.perf_counter() - started_at_s
    finally:
        engine.close_session(session)
    # Where there is room for one token alone, its time has to do for both.
    return Speed(
        decode_tokens_per_s=done / decode_s if done else 1 / first_s,
        prefill_tokens_per_s=rest / prefill_s if rest else 1 / first_s,
    )
