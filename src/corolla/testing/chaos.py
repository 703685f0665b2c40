"""A swarm in which servers die, freeze and leave while clients speak: what they say is compared, word by word.

Owns the servers, which are processes, and the clients, which are threads of this one.
"""

# B batch, T tokens

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

from corolla.client import AsyncSwarm, AutoModelForCausalLM, ClientConfig, Swarm
from corolla.errors import Error, PeerTimeout, SessionClosed
from corolla.terms import Announcement
from corolla.testing.models import save_tiny_model
from corolla.testing.processes import ServerProcess
from corolla.testing.sizes import Growth, Size, Sizes

__all__ = ["Chaos", "ChaosPlan", "ChaosReport"]

_KINDS = ("kill", "leave", "freeze")
_PATIENT = ClientConfig(codec="raw", attempts=12, chain_s=60.0)
_PROMPTS = 8
_NEW_TOKENS = 24
_TURNS = 3
_START_S = 600.0
"""How long a server may take to start, on a machine that others keep busy."""
_FREED_S = 60.0
"""How long servers may take to say that no session is left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChaosPlan:
    """What is to happen.

    Args:
        spans: The blocks of a chain's servers.
        replicas: How many servers have each.
        spared: To how many of these nothing happens, so that it can be seen whether they grow.
        clients: How many clients speak at the same time.
        run_s: For how long; at least until each disaster was once.
        every_s: How long after one disaster begins the next, on average; one takes place at a time.
        frozen_s: For how long a server is frozen.
        rest_s: How long a client says nothing after a text, on average.
        seed: Of the dice.
    """

    spans: Sequence[str] = ("0:2", "2:4")
    replicas: int = 2
    spared: int = 0
    clients: int = 2
    run_s: float = 20.0
    every_s: float = 2.0
    frozen_s: float = 3.0
    rest_s: float = 0.0
    seed: int = 0


@dataclass(slots=True)
class ChaosReport:
    """What has happened.

    Attributes:
        disasters: How often each kind.
        generations: Texts that clients were given.
        replays: How often a server was given what another had held.
        wrong: Texts that were not those of the undisturbed model.
        failures: How clients failed.
        lost_tokens: KV tokens that servers do not have back when all clients have gone.
        grown: By how much processes have grown: this one, with all clients, and the servers that were spared.
    """

    disasters: Counter[str] = field(default_factory=Counter)
    generations: int = 0
    replays: int = 0
    wrong: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    lost_tokens: int = 0
    grown: dict[str, Growth] = field(default_factory=dict)


class Chaos:
    """A swarm of a tiny model, and what befalls it. Use it as a context manager.

    Args:
        plan: What is to happen.
        folder: For the model and the servers' logs.
    """

    def __init__(self, plan: ChaosPlan, folder: Path) -> None:
        self.report = ChaosReport()
        self._plan = plan
        self._folder = folder
        self._rng = random.Random(plan.seed)
        self._model = save_tiny_model(folder / "model")
        self._stack = ExitStack()
        self._servers: list[tuple[str, ServerProcess]] = []
        self._sizes = Sizes()
        self._clients: dict[int, Swarm] = {}
        self._usual_tokens: dict[str, int] = {}
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._said: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __enter__(self) -> "Chaos":
        """Start the servers."""
        with ExitStack() as stack:
            self._stack = stack
            for span in [*self._plan.spans] * self._plan.replicas:
                self._servers.append((span, self._start(span)))
            for _, server in self._servers:
                server.wait_for("online", within_s=_START_S)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._stack.close()

    def run(self) -> ChaosReport:
        """Let it happen.

        Returns:
            What has happened.

        Raises:
            PeerTimeout: If servers still hold sessions when all clients have gone.
        """
        self._said = [self._speak_alone(number) for number in range(_PROMPTS)]
        self._usual_tokens = self._free_tokens()
        with ThreadPoolExecutor(self._plan.clients) as clients:
            talks = [clients.submit(self._talk, number) for number in range(self._plan.clients)]
            try:
                self._befall()
                self._measure()
            finally:
                self._is_over.set()
            for talk in talks:
                talk.result()
        self._check_freed()
        self.report.grown = self._sizes.growths()
        return self.report

    def _start(self, span: str) -> ServerProcess:
        known = [server.address for _, server in self._servers]
        log = self._folder / f"server-{time.monotonic_ns()}.log"
        arguments = ["--blocks", span, "--threads", "1", "--kv-bytes", str(16 << 20), "--precision", "float32"]
        arguments += ["--metrics-port", "0"]
        server = ServerProcess(str(self._model), *arguments, peers=known[:2], log=log)
        self._stack.enter_context(server)
        server.wait_for("listening", within_s=_START_S)
        return server

    def _befall(self) -> None:
        """Let one disaster follow another; each block keeps a server that nothing happens to meanwhile."""
        due_s = time.monotonic() + self._rng.expovariate(1 / self._plan.every_s)
        until_s = time.monotonic() + self._plan.run_s
        while (left_s := until_s - time.monotonic()) > 0 or self.report.disasters.total() < len(_KINDS):
            rest_s = due_s - time.monotonic()
            self._is_over.wait(max(0.0, min(left_s, rest_s)))
            due_s = time.monotonic() + self._rng.expovariate(1 / self._plan.every_s)
            kind = _KINDS[self.report.disasters.total() % len(_KINDS)]
            index = self._rng.randrange(self._spared, len(self._servers))
            span, server = self._servers[index]
            self._measure()
            if kind == "freeze":
                psutil.Process(server.process.pid).suspend()
                self._is_over.wait(self._plan.frozen_s)
                psutil.Process(server.process.pid).resume()
            else:
                if kind == "kill":
                    server.kill()
                self._servers.pop(index)
                fresh = self._start(span)
                self._servers.append((span, fresh))
                fresh.wait_for("online", within_s=_START_S)
                if kind == "leave":
                    server.leave()
                    server.process.wait(_START_S)
            self.report.disasters[kind] += 1

    def _talk(self, number: int) -> None:
        """Be a client until all is over: several texts a session, each compared."""
        rng = random.Random(self._plan.seed * 1000 + number)
        addresses = [server.address for _, server in self._servers]
        try:
            with Swarm(addresses, config=_PATIENT) as swarm, ExitStack() as stack:
                self._clients[number] = swarm
                stack.callback(self._clients.pop, number)
                model = AutoModelForCausalLM.from_pretrained(str(self._model), swarm=swarm, dtype=torch.float32)
                while not self._is_over.is_set():
                    with model.session(128) as session:
                        for _ in range(rng.randint(1, _TURNS)):
                            self._compare(*self._said[rng.randrange(_PROMPTS)], model, session)
                            self._is_over.wait(rng.expovariate(1 / self._plan.rest_s) if self._plan.rest_s else 0)
                        with self._lock:
                            self.report.replays += len(session.replays)
        except Error as error:
            with self._lock:
                self.report.failures.append(f"client {number}: {error.message}")

    def _compare(self, prompt_BT: torch.Tensor, expected_BT: torch.Tensor, model: object, session: object) -> None:
        said_BT = _speak(model, prompt_BT, session=session)
        with self._lock:
            self.report.generations += 1
            if not torch.equal(said_BT, expected_BT):
                self.report.wrong.append(f"{said_BT.tolist()} instead of {expected_BT.tolist()}")

    def _speak_alone(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(self._model, dtype=torch.float32)
        generator = torch.Generator().manual_seed(number)
        prompt_BT = torch.randint(3, 98, (1, 4 + 5 * number), generator=generator)
        return prompt_BT, _speak(model, prompt_BT)

    @property
    def _spared(self) -> int:
        """How many servers, the first ones, are spared."""
        return self._plan.spared * len(self._plan.spans)

    def _measure(self) -> None:
        for _, server in self._servers[: self._spared]:
            self._sizes.note(f"server {server.peer_id[:8]}", Size.of_server(server))
        tasks = 0
        for swarm in [*self._clients.values()]:
            with suppress(SessionClosed):  # its client has failed just now
                tasks += swarm.call(_count_tasks)
        self._sizes.note("clients", Size.of(psutil.Process(), tasks))

    def _free_tokens(self) -> dict[str, int]:
        """Say what servers have to lend, by their blocks."""
        with Swarm([server.address for _, server in self._servers]) as swarm:
            return {str(one.span): one.free_tokens for one in swarm.call(_online, swarm.core)}

    def _check_freed(self) -> None:
        """Wait until servers hold nothing any more; note the tokens that they do not have back."""
        until_s = time.monotonic() + _FREED_S
        with Swarm([server.address for _, server in self._servers]) as swarm:
            while True:
                seen = swarm.call(_online, swarm.core)
                held = [one for one in seen if one.sessions]
                self.report.lost_tokens = sum(self._usual_tokens[str(one.span)] - one.free_tokens for one in seen)
                if not held and not self.report.lost_tokens:
                    return
                if time.monotonic() > until_s:
                    break
                time.sleep(0.2)
        if held:
            names = ", ".join(f"{one.peer[:8]}: {one.sessions}" for one in held)
            raise PeerTimeout(f"servers hold sessions that nobody has any more: {names}")


async def _online(swarm: AsyncSwarm) -> list[Announcement]:
    """List the servers that serve."""
    return [one for one in swarm.snapshot().announcements if one.state == "online"]


async def _count_tasks() -> int:
    """Count the tasks of this event loop."""
    return len(asyncio.all_tasks())


def _speak(model: object, prompt_BT: torch.Tensor, **more: object) -> torch.Tensor:
    generate = model.generate  # type: ignore[attr-defined]
    options = {"max_new_tokens": _NEW_TOKENS, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    said_BT: torch.Tensor = generate(prompt_BT, **options, **more)
    return said_BT
