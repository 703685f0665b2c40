"""How long a session pauses when a server of its chain is killed, and what pushing brings to a prompt.

SmolLM2-135M-Instruct in float32 over three servers, processes of one thread each on this machine. A fourth has all
blocks and takes the place of each of them when it is killed with SIGKILL between two tokens, one after another in the
same session; then they are started again for the next round. The pause is what the next token takes beyond the median
of the tokens before.
"""

# N packed tokens, D model width

import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from bench.report import Row, write_report
from corolla.client import ClientConfig, Session, StepTokens, Swarm, Target
from corolla.hub import HubConfig, open_repository
from corolla.terms import Span
from corolla.testing import ServerProcess

__all__ = ["main"]

MODEL = "smollm2"
SPANS = ("0:10", "10:20", "20:30")
WHOLE = Span(0, 30)
WIDTH = 576
CONTEXT = 1000
PROMPT = 2048
ROUNDS = 3
DECODED = 8
SERVER = ("--threads", "1", "--kv-bytes", str(1 << 30), "--precision", "float32")


class Stage:
    """Three servers of a chain and one that has all of their blocks."""

    def __init__(self, stack: ExitStack, logs: Path) -> None:
        self._stack = stack
        self._logs = logs
        self.spare = self._start("0:30", ())
        self.spare.wait_for("online")
        self.chain: list[ServerProcess] = []
        self.restart()

    def restart(self) -> None:
        """Start servers in the place of the killed ones."""
        self.chain = [self._start(span, (self.spare.address,)) for span in SPANS]
        for server in self.chain:
            server.wait_for("online")

    def swarm(self, **options: bool | int) -> Swarm:
        """Enter the swarm as a client that does not know the spare one."""
        config = ClientConfig(avoid_peers=(self.spare.peer_id,), **options)  # type: ignore[arg-type]
        return Swarm([self.spare.address], config=config)

    def _start(self, span: str, peers: tuple[str, ...]) -> ServerProcess:
        log = self._logs / f"{span.replace(':', '-')}.{time.monotonic_ns()}.log"
        return self._stack.enter_context(ServerProcess(MODEL, "--blocks", span, *SERVER, peers=peers, log=log))


def main() -> None:
    """Measure, print the table, write the report."""
    torch.set_num_threads(1)
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stage = Stage(stack, logs)
        rows = prompts(stage)
        rounds = []
        for number in range(ROUNDS):
            if number:
                stage.restart()
            rounds.append(pauses(stage))
        for position, (span, found) in enumerate(zip(SPANS, zip(*rounds, strict=True), strict=True), start=1):
            name = f"pause when hop {position} of {len(SPANS)} (blocks {span}) is killed"
            rows.append(Row(f"{name}, p50", statistics.median(found), f"s per {CONTEXT} tokens"))
            rows.append(Row(f"{name}, longest", max(found), f"s per {CONTEXT} tokens"))
    write_report("failures", rows, f"{MODEL}, 3 servers on one machine, 1 thread a process, {ROUNDS} kills of each")


def prompts(stage: Stage) -> list[Row]:
    """Measure a prompt in pieces and in one, and pushed or by way of the client."""
    ways = {
        "pushed in pieces of 512": {},
        "pushed in one": {"piece_tokens": PROMPT},
        "by the client in one": {"push": False, "piece_tokens": PROMPT},
    }
    elapsed_s = {name: statistics.median(prompt(stage, options) for _ in range(2)) for name, options in ways.items()}
    base = "by the client in one"
    return [
        Row(f"prompt of {PROMPT} tokens, {name}", PROMPT / value, "tokens/s", base, elapsed_s[base] / value)
        for name, value in elapsed_s.items()
    ]


def prompt(stage: Stage, options: dict[str, bool | int]) -> float:
    """Time one prompt through three servers, on streams that are warm."""
    with stage.swarm(**options) as swarm:
        session = open_session(swarm)
        swarm.call(session.step, step(8, 0))
        began_s = time.perf_counter()
        swarm.call(session.step, step(PROMPT, 0))
        elapsed_s = time.perf_counter() - began_s
        swarm.call(session.close)
    return elapsed_s


def pauses(stage: Stage) -> list[float]:
    """Kill one hop after another between two tokens, and say by how much the second came later."""
    found = []
    with stage.swarm() as swarm:
        session = open_session(swarm)
        swarm.call(session.step, step(CONTEXT, 0))
        swarm.core.config = replace(swarm.config, avoid_peers=())
        position = CONTEXT
        for server in stage.chain:
            usual_s = [timed(swarm, session, position + token) for token in range(DECODED)]
            server.kill()
            found.append(timed(swarm, session, position + DECODED) - statistics.median(usual_s))
            position += DECODED + 1
        if len(session.replays) != len(SPANS):
            raise RuntimeError(f"{len(SPANS)} replays were due, not {session.replays}")
        swarm.call(session.close)
    return found


def timed(swarm: Swarm, session: Session, position: int) -> float:
    """Time one token."""
    began_s = time.perf_counter()
    swarm.call(session.step, step(1, position))
    return time.perf_counter() - began_s


def open_session(swarm: Swarm) -> Session:
    """Open a session on the three servers of the chain."""
    model = open_repository(MODEL, config=HubConfig()).model_id
    session = Session(swarm.core, Target(model, WHOLE, "half"), rows=1, max_tokens=PROMPT + 16)
    swarm.call(session.open)
    return session


def step(tokens: int, start: int) -> StepTokens:
    """Make some tokens' hidden states."""
    return StepTokens(torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(start)), (start,), (tokens,))


if __name__ == "__main__":
    main()
