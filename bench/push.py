"""What a step takes over several hops, pushed and by way of the client, on an emulated internet.

Servers of a tiny model are processes on hosts of their own (``bench/wanlab``), whose access links delay by
``DELAY_MS`` each way, so that one way between two hosts takes twice that. The time that is due is that of all one-way
delays and what the servers say they waited and computed; what the client's host sends is counted. Needs root.

    python -m bench.push
"""

# N packed tokens

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from bench.report import Row, write_report
from bench.wanlab import Host, Lab, find_obstacle
from corolla.blocks import load_config
from corolla.client import ClientConfig, Session, StepTokens, Swarm, Target
from corolla.hub import HubConfig, open_repository
from corolla.terms import Span
from corolla.testing import save_tiny_model

__all__ = ["main"]

DELAY_MS = 10.0
MBIT = 100.0
STEPS = 40
WARM = 5
SPANS = {"one": "0:4", "two-a": "0:2", "two-b": "2:4", "three-a": "0:1", "three-b": "1:3", "three-c": "3:4"}
CHAINS = (("one",), ("two-a", "two-b"), ("three-a", "three-b", "three-c"))


def main() -> None:
    """Measure, print the table, write the report."""
    if obstacle := find_obstacle():
        sys.exit(f"no emulated internet here: {obstacle}")
    with tempfile.TemporaryDirectory() as folder:
        model = str(save_tiny_model(Path(folder) / "model"))
        with Stage([*SPANS]) as stage:
            for name, span in SPANS.items():
                stage.serve(name, model, span)
            rows = [row for chain in CHAINS for row in steps(stage, model, chain)]
    write_report("push", rows, f"{DELAY_MS:g} ms at each access link, {MBIT:g} Mbit/s")


class Stage:
    """Hosts, servers on them, and a client on one more. Use it as a context manager.

    Args:
        names: Of the servers' hosts.
    """

    def __init__(self, names: list[str]) -> None:
        self.lab = Lab(
            [
                Host(name, delay_ms=DELAY_MS, up_mbit=MBIT, down_mbit=MBIT, queue_ms=2000.0)
                for name in ["client", *names]
            ]
        )
        self.servers: dict[str, tuple[subprocess.Popen[str], str]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "Stage":
        self._stack.enter_context(self.lab)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def serve(self, host: str, model: str, span: str) -> None:
        """Start a server on a host, and wait until it is online."""
        join = [word for _, peer in [*self.servers.values()][:1] for word in ("--peer", peer)]
        flags = ["--json", "--until-eof", "--blocks", span, "--threads", "1", "--kv-bytes", "256MiB", "--no-lan", *join]
        process = self.start(host, "corolla", "serve", model, "--precision", "float32", *flags)
        said = hear(process, "stage", "online")
        self.servers[host] = process, f"tls://{self.lab.addr(host)}:31330/{said['peer']}"

    def start(self, host: str, *command: str) -> "subprocess.Popen[str]":
        """Start a Python module on a host."""
        pipe = subprocess.PIPE
        root = Path(__file__).parents[1]
        environment = {**os.environ, "PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}", "HF_HUB_OFFLINE": "1"}
        process = self.lab.popen(
            host, [sys.executable, "-m", *command], stdin=pipe, stdout=pipe, text=True, env=environment
        )
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        return process

    def speak(self, model: str, chain: tuple[str, ...], *, push: bool = True) -> "subprocess.Popen[str]":
        """Start a client that knows these servers alone."""
        known = [self.servers[name][1] for name in chain]
        return self.start("client", "bench.push", json.dumps({"model": model, "peers": known, "push": push}))

    def packets(self) -> tuple[int, int]:
        """Say how many packets and bytes the client has sent."""
        link = self.lab.link("client")
        return link.tx_packets, link.tx_bytes


def hear(process: "subprocess.Popen[str]", key: str, value: object) -> dict[str, Any]:
    """Wait until a process says something, one JSON object a line."""
    if process.stdout is not None:
        for line in process.stdout:
            if line.startswith("{") and (said := json.loads(line)).get(key) == value:
                return dict(said)
    raise RuntimeError(f"a process ended before it said that {key} is {value}")


def tell(process: "subprocess.Popen[str]", **order: object) -> dict[str, Any]:
    """Let a client do something, and wait for what came of it."""
    if process.stdin is None:
        raise RuntimeError("a process without an input was told something")
    process.stdin.write(json.dumps(order) + "\n")
    process.stdin.flush()
    return hear(process, "done", True)


def steps(stage: Stage, model: str, chain: tuple[str, ...]) -> list[Row]:
    """Time steps over a chain, and count what the client sends."""
    rows = []
    for push in (True, False):
        client = stage.speak(model, chain, push=push)
        tell(client, tokens=8, steps=WARM)
        before = stage.packets()
        said = tell(client, steps=STEPS)
        packets, nbytes = (after - earlier for after, earlier in zip(stage.packets(), before, strict=True))
        client.kill()
        ways = len(chain) + 1 if push else 2 * len(chain)
        name = f"{len(chain)} hops, {'pushed' if push else 'by the client'}"
        due_s = ways * 2 * DELAY_MS / 1000 + said["compute_s"]
        base = f"{name}: {ways} ways and the computing"
        rows += [
            Row(base, 1000 * due_s, "ms"),
            Row(f"{name}: a step", 1000 * said["step_s"], "ms", base, said["step_s"] / due_s),
            Row(f"{name}: packets from the client", packets / STEPS, "a step"),
            Row(f"{name}: bytes from the client", nbytes / STEPS, "a step"),
        ]
    return rows


class Speaker:
    """What the client's process does: takes steps when it is told to."""

    def __init__(self, model: str, peers: list[str], *, push: bool) -> None:
        ids = tuple(peer.rsplit("/", 1)[1] for peer in peers)
        self._swarm = Swarm(peers[:1], config=ClientConfig(push=push, allow_peers=ids, codec="half", chain_s=60.0))
        repository = open_repository(model, config=HubConfig())
        config = load_config(repository.fetch(set()))
        self._width = config.hidden_size
        target = Target(repository.model_id, Span(0, config.num_hidden_layers), "half")
        self._session = Session(self._swarm.core, target, rows=1, max_tokens=min(1500, config.max_position_embeddings))
        self._swarm.call(self._session.open)
        self._position = 0

    def obey(self, steps: int, tokens: int = 0) -> dict[str, object]:
        """Take a prompt, perhaps, and steps."""
        if tokens:
            self._step(tokens)
        elapsed_s, compute_s = [], []
        for _ in range(steps):
            began_s = time.perf_counter()
            self._step(1)
            elapsed_s.append(time.perf_counter() - began_s)
            compute_s.append(sum(one.compute_s + one.queue_s for one in self._session.timings))
        return {
            "done": True,
            "step_s": statistics.median(elapsed_s),
            "compute_s": statistics.median(compute_s),
        }

    def _step(self, tokens: int) -> None:
        one = StepTokens(torch.randn(tokens, self._width), (self._position,), (tokens,))
        self._swarm.call(self._session.step, one)
        self._position += tokens


def speak(orders: dict[str, Any]) -> None:
    """Be the client: do what standard input says, one JSON object a line."""
    torch.set_num_threads(1)
    speaker = Speaker(orders["model"], orders["peers"], push=orders["push"])
    for line in sys.stdin:
        print(json.dumps(speaker.obey(**json.loads(line))), flush=True)


if __name__ == "__main__":
    if sys.argv[1:]:
        speak(json.loads(sys.argv[1]))
    else:
        main()
