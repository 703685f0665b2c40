"""Generation while stages fail: the failure table of arXiv 2312.08361 (table 1), for one machine.

SmolLM2-135M in float32 on four servers of one process, over TLS on loopback. Before each step, each stage fails with
some chance: all streams of the client's session there are closed without a word, and the keys and values it held there
are gone, as when a server crashes and is back at once. The same steps are taken by a client to whom nothing happens, in
turn with those that failures happen to, and every output is compared with its own. What is left of the speed is the
time of all steps without failures by that with them, where a step in which nothing has failed counts as the median of
all clients' steps at contexts alike, so that what else the machine does is not taken for failures; the plain quotient
of the two clients' times is given as well.

Three ways to go on: *replayed*, which is ours; *restarted* from the first token; and *without a cache*, where each step
is a prompt of all tokens so far, which is timed at ``PROMPTS`` contexts, evenly spread. Of the latter, a failure takes
no more than the step that it happens in. Where all seeds together are due less than one failure, or a restarted
generation would take over ``PATIENCE`` times as long, the row says that it is computed: with the mean pause that was
measured, or as ``((1 - q)^-n - 1) / q`` steps until ``n`` succeed in a row, where ``q`` is the chance that any stage
fails in a step.

    python -m bench.stages --tokens 1024 --seeds 3
"""

# N packed tokens, D model width

import argparse
import itertools
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch

from bench.report import Row, write_report
from corolla.client import Session, StepTokens, Swarm, Target
from corolla.engine import EngineConfig
from corolla.hub import HubConfig, open_repository
from corolla.terms import PeerId, Span
from corolla.testing import ThreadedSwarm

__all__ = ["main"]

MODEL = "smollm2"
SPANS = ("0:8", "8:15", "15:23", "23:30")
WIDTH = 576
CHANCES = (1e-4, 1e-3, 1e-2)
PATIENCE = 1
PROMPTS = 12
AROUND = 16
ALIKE = 0.02
"""How far, by its length, an output may be from the undisturbed one: two bytes a number travel."""


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table, write the report."""
    parser = argparse.ArgumentParser(prog="python -m bench.stages", description="Generation while stages fail.")
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--seeds", type=int, default=3)
    chosen = parser.parse_args([] if arguments is None else arguments)
    torch.set_num_threads(2)
    engine = EngineConfig(threads=2, kv_bytes=512 << 20)
    rows: list[Row] = []
    with ThreadedSwarm(MODEL, SPANS, engine=engine) as stages:
        for tokens in chosen.tokens:
            rows += compare(stages, tokens, chosen.seeds)
    name = "stages" if arguments is None else f"stages-{'-'.join(map(str, chosen.tokens))}"
    write_report(name, rows, f"{MODEL}, 4 stages on one machine, 2 threads a server, {chosen.seeds} seeds")


@dataclass
class Speaker:
    """A client that takes one step after another.

    Args:
        stages: The servers.
        swarm: How it reaches them.
        inputs_ND: The hidden states of all steps.
        chance: That a stage fails before a step.
        dice: For that.
        restarts: Whether it begins anew after a failure.
    """

    stages: ThreadedSwarm
    swarm: Swarm
    inputs_ND: torch.Tensor
    chance: float = 0.0
    dice: random.Random = field(default_factory=random.Random)
    restarts: bool = False

    def __post_init__(self) -> None:
        self.elapsed_s: list[float] = []
        self.failed_at: list[int] = []
        self.outputs: list[torch.Tensor] = []
        self.session = open_session(self.swarm, len(self.inputs_ND))
        self.swarm.call(self.session.step, StepTokens(self.inputs_ND[:1], (0,), (1,)))  # so that all streams are warm
        self.peer: PeerId = self.swarm.core.peer_id

    @property
    def is_done(self) -> bool:
        """Whether it has taken all steps."""
        return len(self.outputs) == len(self.inputs_ND)

    def step(self) -> None:
        """Take a step, perhaps after a failure."""
        failed = [stage for stage in self.stages.servers if self.dice.random() < self.chance]
        for stage in failed:
            stage.forget(self.peer)
        began_s = time.perf_counter()
        if failed and self.restarts:
            self.swarm.call(self.session.close)
            self.session = open_session(self.swarm, len(self.inputs_ND))
            self.outputs.clear()
        position = len(self.outputs)
        one = StepTokens(self.inputs_ND[position : position + 1], (position,), (1,))
        self.outputs.append(self.swarm.call(self.session.step, one).hidden_ND)
        if failed:
            self.failed_at.append(len(self.elapsed_s))
        self.elapsed_s.append(time.perf_counter() - began_s)


def compare(stages: ThreadedSwarm, tokens: int, seeds: int) -> list[Row]:
    """Measure what failures cost a generation of so many tokens."""
    chances = [chance for chance in CHANCES if chance * len(SPANS) * tokens * seeds >= 1]
    found = [replayed(stages, tokens, chances, seed) for seed in range(seeds)]
    usual_s = statistics.mean(sum(usual_steps_s([calm, *struck])) for calm, struck in found)
    paused = [(chance, *pauses) for calm, struck in found for chance, *pauses in pauses_s(chances, calm, struck)]
    failures = sum(count for _, count, _, _ in paused)
    pause_s = sum(lost_s for _, _, lost_s, _ in paused) / failures
    base = f"{tokens} tokens, undisturbed"
    rows = [
        Row(base, tokens / usual_s, "steps/s"),
        Row(f"{tokens} tokens, steps in which stages failed", failures, ""),
        Row(f"{tokens} tokens, mean pause of a failure", pause_s, "s", "a step", pause_s / (usual_s / tokens)),
    ]

    def add(name: str, share: float) -> None:
        rows.append(Row(f"{tokens} tokens, {name}", share * tokens / usual_s, "steps/s", base, share))

    for chance in CHANCES:
        name = f"{chance:g} a stage and step"
        if chance in chances:
            lost_s = [lost for one, _, lost, _ in paused if one == chance]
            add(f"{name}, replayed", usual_s / (usual_s + statistics.mean(lost_s)))
            add(f"{name}, replayed, the worst of {seeds} seeds", usual_s / (usual_s + max(lost_s)))
            plain = statistics.mean(share for one, _, _, share in paused if one == chance)
            add(f"{name}, replayed, plain quotient", plain)
        else:
            add(f"{name}, replayed (computed)", 1 / (1 + len(SPANS) * chance * pause_s / (usual_s / tokens)))
        fails = 1 - (1 - chance) ** len(SPANS)
        expected = tokens * fails / ((1 - fails) ** -tokens - 1)
        if expected * PATIENCE > 1:
            add(f"{name}, restarted", usual_s / statistics.mean(restarted(stages, tokens, chance, seeds)))
        else:
            add(f"{name}, restarted (computed)", expected)
    add("without a cache", usual_s / tokens / without_cache_s(stages, tokens))
    return rows


def replayed(stages: ThreadedSwarm, tokens: int, chances: Sequence[float], seed: int) -> tuple[Speaker, list[Speaker]]:
    """Let several clients take the same steps in turn, one of them undisturbed."""
    inputs_ND = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(seed))
    with ExitStack() as stack:
        swarms = [stack.enter_context(Swarm([stages.address])) for _ in range(1 + len(chances))]
        calm = Speaker(stages, swarms[0], inputs_ND)
        struck = [
            Speaker(stages, swarm, inputs_ND, chance, random.Random(f"{seed} {chance}"))
            for swarm, chance in zip(swarms[1:], chances, strict=True)
        ]
        for position in range(tokens):
            for one in [calm, *struck]:
                one.step()
            for one in struck:
                check_alike(one.outputs[position], calm.outputs[position])
        for one in [calm, *struck]:
            one.swarm.call(one.session.close)
    return calm, struck


def usual_steps_s(speakers: Sequence[Speaker]) -> list[float]:
    """Say for each step how long it takes in which nothing fails: the median of those around it, of all clients."""
    tokens = len(speakers[0].elapsed_s)
    calm = [
        [one.elapsed_s[position] for one in speakers if position not in one.failed_at] for position in range(tokens)
    ]
    return [
        statistics.median(itertools.chain(*calm[max(0, position - AROUND) : position + AROUND + 1]))
        for position in range(tokens)
    ]


def pauses_s(
    chances: Sequence[float], calm: Speaker, struck: Sequence[Speaker]
) -> Iterator[tuple[float, int, float, float]]:
    """Say for each chance in how many steps stages failed, what they took beyond the usual, and the plain quotient."""
    usual_s = usual_steps_s([calm, *struck])
    for chance, one in zip(chances, struck, strict=True):
        lost_s = sum(one.elapsed_s[position] - usual_s[position] for position in one.failed_at)
        yield chance, len(one.failed_at), lost_s, sum(calm.elapsed_s) / sum(one.elapsed_s)


def check_alike(output_ND: torch.Tensor, expected_ND: torch.Tensor) -> None:
    """Fail if an output is not the undisturbed one."""
    distance = float((output_ND - expected_ND).norm() / expected_ND.norm())
    if not distance < ALIKE:
        raise RuntimeError(f"an output after a failure is off by {distance:.3f} of its length")


def restarted(stages: ThreadedSwarm, tokens: int, chance: float, seeds: int) -> list[float]:
    """Time generations that begin anew after each failure."""
    elapsed_s = []
    with Swarm([stages.address]) as swarm:
        for seed in range(seeds):
            speaker = Speaker(
                stages, swarm, torch.randn(tokens, WIDTH), chance, random.Random(f"{seed} {chance}"), True
            )
            while not speaker.is_done:
                speaker.step()
            swarm.call(speaker.session.close)
            elapsed_s.append(sum(speaker.elapsed_s))
    return elapsed_s


def without_cache_s(stages: ThreadedSwarm, tokens: int) -> float:
    """Time a step that computes all tokens so far, on average over a generation."""
    elapsed_s = []
    with Swarm([stages.address]) as swarm:
        for number in range(PROMPTS):
            context = round((number + 0.5) / PROMPTS * tokens)
            began_s = time.perf_counter()
            session = open_session(swarm, tokens)
            swarm.call(session.step, StepTokens(torch.randn(context, WIDTH), (0,), (context,)))
            swarm.call(session.close)
            elapsed_s.append(time.perf_counter() - began_s)
    return statistics.mean(elapsed_s)


def open_session(swarm: Swarm, tokens: int) -> Session:
    """Open a session on the four stages."""
    model = open_repository(MODEL, config=HubConfig()).model_id
    session = Session(swarm.core, Target(model, Span(0, 30), "half"), rows=1, max_tokens=tokens)
    swarm.call(session.open)
    return session


if __name__ == "__main__":
    main(sys.argv[1:])
