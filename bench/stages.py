"""Generation while stages lose what they hold: the failure table of arXiv 2312.08361 (table 1), for one machine.

SmolLM2-135M in float32 on four servers of one process, over TLS on loopback. At each step each stage forgets its
keys and values with some probability, as a server that dies and is back at once; it is given a replay. What the same
failures cost without replay follows from measured times: to restart from the first token, the number of steps until
``n`` succeed in a row, ``((1 - q)^-n - 1) / q`` for a chance of ``q`` that a step fails; without a cache, the time of
all prompts from 1 to ``n`` tokens.

    python -m bench.stages 1024
"""

# N packed tokens, D model width

import random
import statistics
import sys
import time
from typing import NamedTuple

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
CHANCES = (1e-3, 1e-2)
POINTS = 4


class Run(NamedTuple):
    """A generation: steps a second, and how often a stage failed."""

    steps_per_s: float
    failures: int
    last_ND: torch.Tensor


def main() -> None:
    """Measure, print a table and write a report for each length."""
    torch.set_num_threads(2)
    engine = EngineConfig(threads=2, kv_bytes=256 << 20)
    with ThreadedSwarm(MODEL, SPANS, engine=engine) as stages, Swarm([stages.address]) as swarm:
        generate(stages, swarm, 32, 0.0)
        for tokens in [int(word) for word in sys.argv[1:] if word.isdecimal()] or LENGTHS:
            title = f"{MODEL}, 4 stages on one machine, 2 threads a server, {tokens} tokens"
            write_report(f"stages{tokens}", compare(stages, swarm, tokens), title)


def compare(stages: ThreadedSwarm, swarm: Swarm, tokens: int) -> list[Row]:
    """Measure what failures cost over so many tokens."""
    uncached = 1 / statistics.mean(prompt_s(swarm, tokens * (2 * point + 1) // (2 * POINTS)) for point in range(POINTS))
    whole = generate(stages, swarm, tokens, 0.0)
    rows = [
        Row("undisturbed", whole.steps_per_s, "steps/s"),
        Row("without a cache", uncached, "steps/s", "undisturbed", uncached / whole.steps_per_s),
    ]
    for chance in CHANCES:
        fails = 1 - (1 - chance) ** len(SPANS)
        restarted = tokens * fails / ((1 - fails) ** -tokens - 1)
        name = f"{chance:g} a stage and step"
        rows.append(Row(f"{name}, restarted", restarted * whole.steps_per_s, "steps/s", "undisturbed", restarted))
        run = generate(stages, swarm, tokens, chance)
        error = float((run.last_ND - whole.last_ND).abs().max() / whole.last_ND.abs().max())
        if error > 1e-2:
            raise RuntimeError(f"after {run.failures} failures the output differs by {error:.1e}")
        name = f"{name}, replayed after {run.failures} failures"
        rows.append(Row(name, run.steps_per_s, "steps/s", "undisturbed", run.steps_per_s / whole.steps_per_s))
    return rows


def generate(stages: ThreadedSwarm, swarm: Swarm, tokens: int, chance: float) -> Run:
    """Decode so many tokens while stages fail."""
    rng = random.Random(tokens)
    session, failures = open_session(swarm, tokens), 0
    hidden_ND = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(0))
    last_ND = hidden_ND[:1]
    began_s = time.perf_counter()
    for position in range(tokens):
        for stage in stages.servers:
            if rng.random() < chance:
                stage.forget()
                failures += 1
        step = StepTokens(hidden_ND[position : position + 1], (position,), (1,))
        last_ND = swarm.call(session.step, step).hidden_ND
    elapsed_s = time.perf_counter() - began_s
    swarm.call(session.close)
    return Run(tokens / elapsed_s, failures, last_ND)


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
