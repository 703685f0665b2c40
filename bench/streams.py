"""Whether memory stays where it is, and nothing is lost, while a gateway answers fifty streams at once for minutes.

A tiny model, so that what is measured is the way of a stream: two server processes, ``corolla gateway`` in a process of
its own, and fifty clients here, each of which asks again as soon as its answer has ended. Growth is the slope of a line
through what each process holds in memory after the warm-up, by least squares.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import anyio
import httpx
import psutil

from bench.report import Row, write_report
from corolla.testing import LocalSwarm, save_tiny_model

__all__ = ["GatewayProcess", "main", "run_gateway"]

STREAMS = 50
MINUTES = 3.0
WARM_UP_S = 30.0
LOOK_S = 2.0
TOKENS = 48
ARGUMENTS = ("--threads", "1", "--no-lan", "--precision", "float32")


class GatewayProcess(NamedTuple):
    """A gateway that runs.

    Args:
        url: Where it is.
        key: A key for it.
        process: Its process.
    """

    url: str
    key: str
    process: "subprocess.Popen[str]"


class Seen(NamedTuple):
    """What was seen of the streams.

    Args:
        ended: How many came to their end.
        lost: How many did not.
        pieces: How many pieces came.
        memory_bytes: The resident memory of each process, by the time in seconds.
    """

    ended: int
    lost: int
    pieces: int
    memory_bytes: dict[str, list[tuple[float, int]]]


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=MINUTES)
    minutes = parser.parse_args([] if sys.argv[0].endswith("__main__.py") else None).minutes
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        template = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
        model = str(save_tiny_model(folder / "model", context_tokens=2048, chat_template=template))
        with (
            LocalSwarm(model, ["0:2", "2:4"], *ARGUMENTS, logs=folder) as servers,
            run_gateway(model, servers.wait_until_online().address, folder) as gateway,
        ):
            pids = {"gateway": gateway.process.pid} | {
                f"server {number}": server.process.pid for number, server in enumerate(servers.servers, 1)
            }
            seen = anyio.run(watch, gateway, model, pids, minutes * 60)
    write_report("streams", rows(seen, minutes * 60), f"{STREAMS} streams at once through one gateway, a tiny model")


@contextmanager
def run_gateway(model: str, peer: str, folder: Path) -> Iterator[GatewayProcess]:
    """Run ``corolla gateway`` during a ``with``.

    Args:
        model: What it offers.
        peer: Where the swarm is.
        folder: For its database.
    """
    command = [sys.executable, "-m", "corolla", "gateway", model, "--peer", peer, "--port", "0", "--json"]
    command += ["--database", f"sqlite:///{folder}/keys.sqlite"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            said = json.loads(process.stdout.readline())  # type: ignore[union-attr]  # it is a pipe
            yield GatewayProcess(said["url"], said["key"], process)
        finally:
            process.terminate()


async def watch(gateway: GatewayProcess, model: str, pids: dict[str, int], seconds: float) -> Seen:
    """Keep the streams going for some time, and look at memory meanwhile.

    Args:
        gateway: The gateway.
        model: What to ask.
        pids: The processes to look at, by their names in the report.
        seconds: For how long.
    """
    ended, lost, pieces, began_s = 0, 0, 0, time.perf_counter()
    processes = {name: psutil.Process(pid) for name, pid in pids.items()}
    memory: dict[str, list[tuple[float, int]]] = {name: [] for name in pids}
    limits = httpx.Limits(max_connections=STREAMS)
    headers = {"Authorization": f"Bearer {gateway.key}"}

    async def stream(http: httpx.AsyncClient, index: int) -> None:
        nonlocal ended, lost, pieces
        number = 0
        while time.perf_counter() - began_s < seconds:
            number += 1
            said = {
                "model": model,
                "messages": [{"role": "user", "content": f"stream {index}, question {number}"}],
                "max_tokens": TOKENS,
                "stream": True,
            }
            last = ""
            async with http.stream("POST", "/v1/chat/completions", json=said) as answer:
                async for line in answer.aiter_lines():
                    last, pieces = line or last, pieces + bool(line)
            ended, lost = (ended + 1, lost) if last == "data: [DONE]" else (ended, lost + 1)

    async with (
        httpx.AsyncClient(base_url=gateway.url, headers=headers, timeout=120, limits=limits, verify=False) as http,
        anyio.create_task_group() as tasks,
    ):
        for index in range(STREAMS):
            tasks.start_soon(stream, http, index)
        while (now_s := time.perf_counter() - began_s) < seconds:
            for name, process in processes.items():
                memory[name].append((now_s, process.memory_info().rss))
            await anyio.sleep(LOOK_S)
    return Seen(ended, lost, pieces, memory)


def rows(seen: Seen, seconds: float) -> list[Row]:
    """Say what came of it: how many streams, and how each process's memory grew after the warm-up."""
    found = [
        Row("streams that came to their end", seen.ended, ""),
        Row("streams lost", seen.lost, ""),
        Row("pieces a second", seen.pieces / seconds, "1/s"),
    ]
    for name, looks in seen.memory_bytes.items():
        warm = [(at_s / 60, size / 2**20) for at_s, size in looks if at_s >= min(WARM_UP_S, seconds / 3)]
        slope, start = statistics.linear_regression(*zip(*warm, strict=True))
        found += [
            Row(f"{name}: memory after the warm-up", start + slope * warm[0][0], "MiB"),
            Row(f"{name}: memory at its most", max(size for _, size in warm), "MiB"),
            Row(f"{name}: growth", slope, "MiB/min"),
        ]
    return found


if __name__ == "__main__":
    main()
