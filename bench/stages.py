"""Generation while stages lose what they hold: the failure table of arXiv 2312.08361 (table 1), for one machine.

SmolLM2-135M in float32 on four servers of one process, over TLS on loopback. A stage forgets its keys and values, as a
server does that dies and is back at once, and is given a replay. At the mean context of a generation of ``n`` tokens,
``n / 2``, the median step and the median pause of a failure are measured, each stage failing in turn between steps.
What a chance of failing a stage and step costs follows: replayed, a step takes ``step + stages * chance * pause``;
restarted from the first token, it takes ``((1 - q)^-n - 1) / q`` steps until ``n`` succeed in a row, where ``q`` is the
chance that any stage fails in a step; without a cache, each step is a prompt of the mean context.
"""

# N packed tokens, D model width

import statistics
import time

import torch

from bench.report import Row, write_report
from corolla.client import Session, StepTokens, Swarm, Target
from corolla.engine import EngineConfig
from corolla.hub import HubConfig, open_repository
from corolla.terms import Span
from corolla.testing import ThreadedSwarm

__all__ = ["main"]

MODEL = "smollm2"
SPANS = ("0:8", "8:15", "15:23", "23:30")
WIDTH = 576
LENGTHS = (128, 1024)
CHANCES = (1e-4, 1e-3, 1e-2)
ROUNDS = 3
STEPS = 12


def main() -> None:
    """Measure, print the table, write the report."""
    torch.set_num_threads(2)
    engine = EngineConfig(threads=2, kv_bytes=256 << 20)
    rows: list[Row] = []
    with ThreadedSwarm(MODEL, SPANS, engine=engine) as stages, Swarm([stages.address]) as swarm:
        for tokens in LENGTHS:
            rows += compare(stages, swarm, tokens)
    write_report("stages", rows, f"{MODEL}, 4 stages on one machine, 2 threads a server")


def compare(stages: ThreadedSwarm, swarm: Swarm, tokens: int) -> list[Row]:
    """Measure what failures cost a generation of so many tokens."""
    step_s, pause_s = steps_and_pauses(stages, swarm, tokens // 2)
    uncached_s = prompt_s(swarm, tokens // 2)
    base = f"{tokens} tokens, undisturbed"
    rows = [
        Row(base, 1 / step_s, "steps/s"),
        Row(f"{tokens} tokens, pause of a failure", pause_s, "s"),
        Row(f"{tokens} tokens, without a cache", 1 / uncached_s, "steps/s", base, step_s / uncached_s),
    ]
    for chance in CHANCES:
        fails = 1 - (1 - chance) ** len(SPANS)
        restarted = tokens * fails / ((1 - fails) ** -tokens - 1)
        replayed = step_s / (step_s + len(SPANS) * chance * pause_s)
        name = f"{tokens} tokens, {chance:g} a stage and step"
        rows += [
            Row(f"{name}, restarted", restarted / step_s, "steps/s", base, restarted),
            Row(f"{name}, replayed", replayed / step_s, "steps/s", base, replayed),
        ]
    return rows


def steps_and_pauses(stages: ThreadedSwarm, swarm: Swarm, context: int) -> tuple[float, float]:
    """Time steps, and what a step takes longer in which a stage has failed; medians."""
    session = open_session(swarm, context + len(SPANS) * ROUNDS * (STEPS + 1) + 1)
    generator = torch.Generator().manual_seed(0)
    position = context
    usual_s: list[float] = []
    failed_s: list[float] = []
    swarm.call(session.step, StepTokens(torch.randn(context, WIDTH, generator=generator), (0,), (context,)))
    for stage in [*stages.servers] * ROUNDS:
        for number in range(STEPS + 1):
            if number == STEPS:
                stage.forget()
            began_s = time.perf_counter()
            swarm.call(session.step, StepTokens(torch.randn(1, WIDTH, generator=generator), (position,), (1,)))
            (failed_s if number == STEPS else usual_s).append(time.perf_counter() - began_s)
            position += 1
    replays = len(session.replays)
    swarm.call(session.close)
    if replays != len(failed_s):
        raise RuntimeError(f"{len(failed_s)} replays were due, not {replays}")
    step_s = statistics.median(usual_s)
    return step_s, statistics.median(failed_s) - step_s


def prompt_s(swarm: Swarm, tokens: int) -> float:
    """Time a prompt."""
    session = open_session(swarm, tokens)
    hidden_ND = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(1))
    began_s = time.perf_counter()
    swarm.call(session.step, StepTokens(hidden_ND, (0,), (tokens,)))
    elapsed_s = time.perf_counter() - began_s
    swarm.call(session.close)
    return elapsed_s


def open_session(swarm: Swarm, tokens: int) -> Session:
    """Open a session on the four stages."""
    model = open_repository(MODEL, config=HubConfig()).model_id
    session = Session(swarm.core, Target(model, Span(0, 30), "half"), rows=1, max_tokens=tokens)
    swarm.call(session.open)
    return session


if __name__ == "__main__":
    main()
