"""How soon a server is of use, and how soon a swarm is whole again after a third of it was killed. Real processes.

Tiny models, so that what is measured is the life of a server and not its download: imports, the test of the family,
claiming, loading, measuring, and what the swarm needs to hear and to decide.
"""

import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import torch

from bench.report import Row, write_report
from corolla.client import AutoModelForCausalLM, ClientConfig, Swarm
from corolla.testing import LocalSwarm, ServerProcess, save_tiny_model

__all__ = ["main"]

ARGUMENTS = ("--threads", "1", "--kv-bytes", "16MiB", "--precision", "float32")
JOINS = 1
SERVERS = 3
PROMPT_BT = torch.arange(3, 12)[None]


def main() -> None:
    """Measure both, print the table, write the report."""
    with tempfile.TemporaryDirectory() as directory:
        logs = Path(directory)
        model = str(save_tiny_model(logs / "model"))
        rows = [*measure_joins(model, logs), *measure_recovery(model, logs)]
    write_report("join", rows, "a tiny model on one machine, all processes on it")


def measure_joins(model: str, logs: Path) -> list[Row]:
    """Start servers of a whole model: from the command to the first token of a client that waits for it."""
    online_s, routed_s = [], []
    for number in range(JOINS):
        started_s = time.perf_counter()
        with ServerProcess(model, *ARGUMENTS, log=logs / f"join{number}.log") as server:
            server.wait_for("online")
            online_s.append(time.perf_counter() - started_s)
            with Swarm(server.address) as swarm:
                remote = AutoModelForCausalLM.from_pretrained(model, swarm=swarm, dtype=torch.float32)
                remote.generate(PROMPT_BT, max_new_tokens=1, do_sample=False, pad_token_id=0)
                routed_s.append(time.perf_counter() - started_s)
    return [
        Row("corolla serve to online, median", statistics.median(online_s), "s"),
        Row("corolla serve to the first routed token, median", statistics.median(routed_s), "s"),
    ]


def measure_recovery(model: str, logs: Path) -> list[Row]:
    """Kill the third of a swarm that has all of one half of the model; the others have to close the gap."""
    with ExitStack() as stack:
        servers = stack.enter_context(LocalSwarm(model, [None] * SERVERS, *ARGUMENTS, "--num-blocks", "2", logs=logs))
        servers.wait_until_online()
        halves: dict[tuple[int, ...], list[ServerProcess]] = {}
        for server in servers.servers:
            halves.setdefault(tuple(server.stages["online"]["span"]), []).append(server)
        killed = min(halves.values(), key=len)
        entry = next(server for server in servers.servers if server not in killed)
        swarm = stack.enter_context(Swarm(entry.address, config=ClientConfig(chain_s=120.0)))
        remote = AutoModelForCausalLM.from_pretrained(model, swarm=swarm, dtype=torch.float32)
        remote.generate(PROMPT_BT, max_new_tokens=4, do_sample=False, pad_token_id=0)
        for server in killed:
            server.kill()
        killed_s = time.perf_counter()
        remote.generate(PROMPT_BT, max_new_tokens=4, do_sample=False, pad_token_id=0)
        recovered_s = time.perf_counter() - killed_s
    what = f"{len(killed)} of {SERVERS} servers killed, all that had half of the model"
    return [Row(f"{what}: to the next whole answer", recovered_s, "s")]


if __name__ == "__main__":
    main()
