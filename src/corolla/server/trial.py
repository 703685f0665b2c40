"""What this machine would give to a swarm: some blocks of a model are loaded, timed and let go of, in each precision.

Everything but the timing of a few blocks is arithmetic: all blocks of a model cost the same to within a little.
"""

from dataclasses import dataclass
from functools import partial

import anyio
import torch

from corolla.blocks import context_tokens
from corolla.cache import PAGE_TOKENS
from corolla.engine import Engine, EngineConfig, computing_threads, free_bytes
from corolla.engine.measure import page_cost
from corolla.errors import SpanTooLarge
from corolla.hub import HubConfig, Progress
from corolla.server.config import ServerConfig
from corolla.server.loading import Model, load_blocks, open_model
from corolla.server.speeds import scaled
from corolla.terms import Precision, Snapshot, Span, Speed
from corolla.wire.limits import MAX_STEP_TOKENS

__all__ = ["Trial", "try_precision"]

_SAMPLE_BLOCKS = 4
"""Enough that what a step costs besides blocks weighs little."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What a server would give in one precision.

    Args:
        precision: What its weights would be held in.
        num_blocks: How many blocks the model has.
        fitting_blocks: How many of them fit into memory, beside keys and values.
        fitting_bytes: How much memory these take.
        sample_blocks: How many were timed.
        speed: Of all that fit, for one session; ``None`` if none does.
        sessions_tokens: How many tokens all its sessions could hold together.
    """

    precision: Precision
    num_blocks: int
    fitting_blocks: int
    fitting_bytes: int
    sample_blocks: int
    speed: Speed | None
    sessions_tokens: int


async def try_precision(
    config: ServerConfig, precision: Precision, *, engine: EngineConfig, hub: HubConfig, report: Progress
) -> Trial:
    """Load some blocks in a precision and time them.

    Args:
        config: Which model, on which device, and how many blocks to time.
        precision: What to hold their weights in.
        engine: How to compute.
        hub: Where models are kept.
        report: Hears of downloads and loading.

    Raises:
        ModelError: If the model cannot be served.
        CapacityError: If there is no disk for its files.
        UsageError: If it has fewer blocks than are to be timed.
    """

    def opened(blocks: int) -> Model:
        wanted = ServerConfig(model=config.model, precision=precision, device=config.device, num_blocks=blocks)
        with computing_threads(engine):
            return open_model(wanted, hub, report)

    try:
        model = await anyio.to_thread.run_sync(opened, 1)
    except SpanTooLarge:
        return Trial(precision, 0, 0, 0, 0, None, 0)
    fitting = model.choose_span(Snapshot(announcements=()))
    count = min(config.num_blocks or _SAMPLE_BLOCKS, len(fitting))
    sample = Span(fitting.start, fitting.start + count)
    free = free_bytes(torch.device(model.device))
    blocks = await anyio.to_thread.run_sync(partial(load_blocks, model, sample, engine, report))
    context = context_tokens(model.config) or MAX_STEP_TOKENS
    token_bytes = (await anyio.to_thread.run_sync(page_cost, blocks)).token_bytes_of(len(fitting), count)
    async with Engine(blocks, engine, context_tokens=context) as running:
        speed = await running.measure()
    needed = model.needed_bytes(fitting)
    kv_bytes = engine.kv_bytes or max(0, free - needed) // 2
    pages = int(kv_bytes // (token_bytes * PAGE_TOKENS))
    whole = scaled(speed, model.needed_bytes(sample) / needed)
    return Trial(precision, model.num_blocks, len(fitting), needed, count, whole, pages * PAGE_TOKENS)
