"""How evenly 32 sessions of one server get their tokens, by themselves and while another client sends long prompts.

Ten blocks of SmolLM2-135M-Instruct in this process, one thread, float32. Each session asks for its next token as soon
as it has the last; what is measured is the time between two tokens, over all sessions. Beside them a client of its own
then sends one prompt of 2,048 tokens after the other, in pieces of 512 as clients do.
"""

# N packed tokens, D model width

import statistics
import time

import anyio
import torch

from bench.report import Row, write_report
from corolla.engine import Engine, EngineConfig, SessionRows
from corolla.hub import HubConfig, stay_silent
from corolla.server import ServerConfig
from corolla.server.loading import load_blocks, open_model
from corolla.terms import Span

__all__ = ["main"]

MODEL = "smollm2"
BLOCKS = Span(0, 10)
SESSIONS = 32
PROMPT_TOKENS, PIECE_TOKENS = 2048, 512
FIRST_TOKENS, SESSION_TOKENS = 64, 1536
WARM_UP_S, MEASURED_S = 4.0, 20.0
CONFIG = EngineConfig(threads=1, kv_bytes=1 << 30)


def main() -> None:
    """Measure, print the table, write the report."""
    torch.set_num_threads(1)
    model = open_model(ServerConfig(model=MODEL, precision="float32"), HubConfig(), stay_silent)
    blocks = load_blocks(model, BLOCKS, CONFIG, stay_silent)
    rows: list[Row] = []
    for name, sessions, has_prompts in [
        ("one session", 1, False),
        (f"{SESSIONS} sessions", SESSIONS, False),
        (f"{SESSIONS} sessions beside prompts", SESSIONS, True),
    ]:
        waits_s = anyio.run(_measure, Engine(blocks, CONFIG, context_tokens=8192), sessions, has_prompts)
        median_s, p99_s, longest_s = statistics.median(waits_s), statistics.quantiles(waits_s, n=100)[98], max(waits_s)
        rows.append(Row(f"{name}: median between tokens", median_s, "s"))
        rows.append(Row(f"{name}: p99 between tokens", p99_s, "s", rows[-1].metric, p99_s / median_s))
        rows.append(Row(f"{name}: longest between tokens", longest_s, "s"))
        rows.append(Row(f"{name}: tokens", len(waits_s) / MEASURED_S, "tokens/s"))
    write_report("fairness", rows, f"{MODEL}, blocks {BLOCKS}, 1 thread, float32; tick_ms {CONFIG.tick_ms}")


async def _measure(engine: Engine, sessions: int, has_prompts: bool) -> list[float]:
    waits_s: list[float] = []
    async with engine:
        await engine.measure()
        async with anyio.create_task_group() as tasks:
            for number in range(sessions):
                session = engine.open_session(BLOCKS, 1, SESSION_TOKENS, client=f"client {number}")
                tasks.start_soon(_chat, engine, session, waits_s)
            if has_prompts:
                tasks.start_soon(_send_prompts, engine)
            await anyio.sleep(WARM_UP_S)
            waits_s.clear()
            await anyio.sleep(MEASURED_S)
            found = [*waits_s]
            tasks.cancel_scope.cancel()
    return found


async def _chat(engine: Engine, session: SessionRows, waits_s: list[float]) -> None:
    hidden_ND = torch.randn(FIRST_TOKENS, engine.span.hidden_size)
    await engine.step(session, hidden_ND, starts=(0,), counts=(FIRST_TOKENS,))
    stored, last_s = FIRST_TOKENS, time.perf_counter()
    while True:
        await engine.step(session, hidden_ND[:1], starts=(stored,), counts=(1,))
        now_s = time.perf_counter()
        waits_s.append(now_s - last_s)
        stored, last_s = stored + 1, now_s


async def _send_prompts(engine: Engine) -> None:
    hidden_ND = torch.randn(PIECE_TOKENS, engine.span.hidden_size)
    while True:
        session = engine.open_session(BLOCKS, 1, PROMPT_TOKENS, client="prompts")
        for start in range(0, PROMPT_TOKENS, PIECE_TOKENS):
            await engine.step(session, hidden_ND, starts=(start,), counts=(PIECE_TOKENS,))
        engine.close_session(session)
