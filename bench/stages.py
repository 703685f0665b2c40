"""Generation while stages lose what they hold: the failure table of arXiv 2312.08361 (table 1), for one machine.

SmolLM2-135M in float32 on four servers of one process, over TLS on loopback. At each step each stage forgets its
keys and values with some probability, as a server that dies and is back at once; it is given a replay. What the same
failures cost without replay follows from measured times: to restart from the first token, the number of steps until
``n`` succeed in a row, ``((1 - q)^-n - 1) / q`` for a chance of ``q`` that a step fails; without a cache, the time of
all prompts from 1 to ``n`` tokens.
"""

# N packed tokens, D model width

import random
import statistics
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
CHANCES = (0.0, 1e-3, 1e-2)
POINTS = 4


class Run(NamedTuple):
    """A generation: steps a second, and how often a stage failed."""

    steps_per_s: float
    failures: int
    last_ND: torch.Tensor


def main() -> None:
    """Measure, print the table, write the report."""
    torch.set_num_threads(2)
    engine = EngineConfig(threads=2, kv_bytes=256 << 20)
    rows: list[Row] = []
    with ThreadedSwarm(MODEL, SPANS, engine=engine) as stages, Swarm([stages.address]) as swarm:
        generate(stages, swarm, 32, 0.0)
        for tokens in LENGTHS:
            base = f"{tokens} tokens, undisturbed"
            runs = {chance: generate(stages, swarm, tokens, chance) for chance in CHANCES}
            whole = runs[0.0]
            rows.append(Row(base, whole.steps_per_s, "steps/s"))
            uncached = 1 / statistics.mean(
                prompt_s(swarm, tokens * (2 * point + 1) // (2 * POINTS)) for point in range(POINTS)
            )
            for chance, run in runs.items():
                error = (run.last_ND - whole.last_ND).abs().max() / whole.last_ND.abs().max()
                if error > 1e-2:
                    raise RuntimeError(f"after {run.failures} failures the output differs by {error:.1e}")
                fails = 1 - (1 - chance) ** len(SPANS)
                steps = ((1 - fails) ** -tokens - 1) / fails if fails else tokens
                name = f"{tokens} tokens, {chance:g} a stage and step"
                ours = f"{name}, replayed after {run.failures} failures"
                restarted = whole.steps_per_s * tokens / steps
                rows += [
                    Row(ours, run.steps_per_s, "steps/s", base, run.steps_per_s / whole.steps_per_s),
                    Row(f"{name}, restarted", restarted, "steps/s", base, restarted / whole.steps_per_s),
                    Row(f"{name}, without a cache", uncached, "steps/s", base, uncached / whole.steps_per_s),
                ]
    write_report("stages", rows, f"{MODEL}, 4 stages on one machine, 2 threads a server")


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
