"""What training through a swarm costs, beside transformers on the same machine.

SmolLM2-135M in float32, through two servers of half of the blocks each, one thread a process. Contenders take turns, so
that a change of the machine's mood meets all of them. Local transformers computes blocks again on the way back
(gradient checkpointing), as whoever has not got the memory must; servers do so only beyond ``graph_bytes``.
"""

# B batch, T tokens, D model width

import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from rich.progress import track
from transformers import AutoModelForCausalLM as LocalModel

from bench.report import Row, write_report
from bench.speed import BLOCKS, MODEL, Clock, generate, paired, tokens_of
from corolla.client import AutoModelForCausalLM, ClientConfig, Swarm
from corolla.hub import HubConfig, open_repository
from corolla.swarm import Identity, SwarmConfig
from corolla.swarm.transports.tls import TlsTransport
from corolla.testing import CountingTransport, LocalSwarm

__all__ = ["main"]

ROWS, TOKENS = 16, 128
MORE_ROWS = 64
ROUNDS = 3
RANK = 8
TRAINERS, CHATTERS = 2, 4
ACCURACY_STEPS = 60
ROOT = Path(__file__).parents[1]


def main() -> None:
    """Measure all, print the table, write the report. ``BENCH_ACCURACY=1`` trains the example twice as well."""
    torch.set_num_threads(1)
    directory = open_repository(MODEL, config=HubConfig()).metadata_directory()
    local = LocalModel.from_pretrained(directory, dtype=torch.float32).requires_grad_(False)
    local.gradient_checkpointing_enable()
    local.train()  # transformers computes again only while training; SmolLM2 has no dropout
    with two_servers() as (servers, swarm, counts):
        model = AutoModelForCausalLM.from_pretrained(MODEL, swarm=swarm, dtype=torch.float32).requires_grad_(False)
        rows = speeds(local, model)
        rows += memory(model, servers)
        rows += beside_chats(model)
        rows += bytes_of_lora(model, counts)
    if os.environ.get("BENCH_ACCURACY"):
        rows += accuracies()
    write_report("tuning", rows, f"training {MODEL} through two servers, fp32, medians of {ROUNDS} rounds in turns")


@contextmanager
def two_servers() -> Iterator[tuple[LocalSwarm, Swarm, CountingTransport]]:
    """Start two servers, and enter their swarm through a transport that counts bytes."""
    made: list[CountingTransport] = []

    def transport(identity: Identity) -> CountingTransport:
        made.append(CountingTransport(TlsTransport(identity, SwarmConfig())))
        return made[-1]

    spans = [f"0:{BLOCKS // 2}", f"{BLOCKS // 2}:{BLOCKS}"]
    arguments = ("--precision", "float32", "--threads", "1", "--kv-bytes", "256MiB")
    with (
        tempfile.TemporaryDirectory() as logs,
        LocalSwarm(MODEL, spans, *arguments, logs=Path(logs)) as servers,
    ):
        servers.wait_until_online(within_s=600)
        with Swarm(servers.address, config=ClientConfig(), transport=transport) as swarm:
            yield servers, swarm, made[0]


def step(model: Any, rows: int = ROWS) -> None:
    """Go forward and back once, without the head, which is the same everywhere."""
    ids_BT = tokens_of(model, rows * TOKENS).view(rows, TOKENS)
    inputs_BTD = model.get_input_embeddings()(ids_BT).detach().requires_grad_()
    base = model.model if hasattr(model, "model") else model
    base(inputs_embeds=inputs_BTD, use_cache=False).last_hidden_state.square().mean().backward()


def rate_of(model: Any) -> float:
    """The tokens a second of a step."""
    began_s = time.perf_counter()
    step(model)
    return ROWS * TOKENS / (time.perf_counter() - began_s)


def with_threads(count: int, model: Any) -> float:
    """The rate of a model in this process, with so many threads."""
    torch.set_num_threads(count)
    try:
        return rate_of(model)
    finally:
        torch.set_num_threads(1)


def speeds(local: Any, model: Any) -> list[Row]:
    """Compare steps: local with the threads of one server, and of both together; and through the swarm."""
    contenders: dict[str, Callable[[], float]] = {
        "local, 1 thread": lambda: with_threads(1, local),
        "local, 2 threads": lambda: with_threads(2, local),
        "2 servers of 1 thread": lambda: rate_of(model),
    }
    step(model, 1)
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in track(range(ROUNDS), description="steps in turns"):
        for name, measure in contenders.items():
            rates[name].append(measure())
    ours = rates["2 servers of 1 thread"]
    rows = [Row(f"forward and backward, {name}", statistics.median(found), "tokens/s") for name, found in rates.items()]
    for name in ("local, 1 thread", "local, 2 threads"):
        ratio = paired(ours, rates[name])
        rows.append(Row(f"2 servers, as a share of {name}", ratio, "", f"forward and backward, {name}", ratio))
    return rows


def memory(model: Any, servers: LocalSwarm) -> list[Row]:
    """See how much more memory a server takes at its peak when a batch has more sequences."""
    rows = []
    before = [peak_bytes(server.process.pid) for server in servers.servers]
    step(model, MORE_ROWS)
    for index, server in enumerate(servers.servers):
        grown_mib = (peak_bytes(server.process.pid) - before[index]) / 2**20
        rows.append(Row(f"more memory for {MORE_ROWS} than for {ROWS} sequences, server {index + 1}", grown_mib, "MiB"))
    return rows


def peak_bytes(pid: int) -> int:
    """The most memory that a process has had so far; 0 where the system does not say."""
    path = Path(f"/proc/{pid}/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", path.read_text(encoding="utf-8")) if path.exists() else None
    return int(found[1]) * 1024 if found else 0


def bytes_of_lora(model: Any, counts: CountingTransport) -> list[Row]:
    """Count what LoRA adds to the bytes of a step; last, since the adapter stays."""
    before = counts.total_bytes
    step(model)
    plain_bytes = counts.total_bytes - before
    rows = [Row("bytes of a step", plain_bytes / 2**20, "MiB")]
    for targets in (["q_proj"], ["q_proj", "v_proj"]):
        config = peft.LoraConfig(r=RANK, target_modules=targets, init_lora_weights=False)
        tuned = peft.get_peft_model(model, config)
        before = counts.total_bytes
        step(tuned.base_model.model)
        more = (counts.total_bytes - before) / plain_bytes - 1
        rows.append(Row(f"LoRA of rank {RANK} on {' and '.join(targets)}, more bytes", more, "of a step's"))
        model = tuned.unload()
    return rows


def beside_chats(model: Any) -> list[Row]:
    """Let some chat while others train, and compare the pauses between tokens with those of chats alone."""
    alone_ms = pauses_ms(model)
    is_over = threading.Event()

    def train() -> None:
        while not is_over.is_set():
            step(model, 4)

    trainers = [threading.Thread(target=train) for _ in range(TRAINERS)]
    for trainer in trainers:
        trainer.start()
    try:
        beside_ms = pauses_ms(model)
    finally:
        is_over.set()
        for trainer in trainers:
            trainer.join()
    name = f"95th percentile of pauses between tokens, {CHATTERS} chats"
    ratio = beside_ms / alone_ms
    return [Row(f"{name} alone", alone_ms, "ms"), Row(f"{name} and {TRAINERS} trainings", beside_ms, "ms", name, ratio)]


def pauses_ms(model: Any) -> float:
    """The 95th percentile of the times between tokens of several chats at once."""
    clocks = [Clock() for _ in range(CHATTERS)]
    chats = [threading.Thread(target=generate, args=(model, tokens_of(model, 32), clock)) for clock in clocks]
    for chat in chats:
        chat.start()
    for chat in chats:
        chat.join()
    pauses_s = [
        later_s - sooner_s
        for clock in clocks
        for sooner_s, later_s in zip(clock.times_s[1:], clock.times_s[2:], strict=False)
    ]
    return 1000 * statistics.quantiles(pauses_s, n=20)[-1]


def accuracies() -> list[Row]:
    """Train the example of film reviews through a swarm and with all blocks in one process."""
    found = {}
    for name, place in (("through a swarm", []), ("with all blocks local", ["--local"])):
        with tempfile.TemporaryDirectory() as out:
            command = [sys.executable, "sentiment.py", *place, "--steps", str(ACCURACY_STEPS), "--out", out]
            done = subprocess.run(command, cwd=ROOT / "examples", capture_output=True, text=True, check=True)
        said = re.search(r"accuracy before: (\S+), after \d+ steps: (\S+)", done.stdout)
        if said is None:
            raise SystemExit(f"the example did not say how well it did: {done.stdout}")
        found[name] = [100 * float(number) for number in said.groups()]
    rows = [Row("accuracy before training", found["through a swarm"][0], "%")]
    return rows + [Row(f"accuracy after training {name}", values[1], "%") for name, values in found.items()]
