"""An emulated internet for tests: home routers of every kind, relays, and peers as processes behind and beside them."""

import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import ExitStack
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from bench.wanlab import Host, Lab, find_obstacle  # noqa: E402
from corolla.testing import save_tiny_model  # noqa: E402

WITHIN_S = 60.0
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
HOSTS = (
    Host("relay1", delay_ms=5),
    Host("relay2", delay_ms=8),
    Host("open1", delay_ms=10),
    Host("open2", delay_ms=10),
    *(Host(f"{nat}{number}", nat=nat, delay_ms=10) for nat in ("port-restricted", "symmetric") for number in (1, 2)),
)


class Program:
    """A process in a host of the lab that says what happens, one JSON object a line."""

    def __init__(self, lab, host, *command):
        pipe = subprocess.PIPE
        self.host = host
        self.process = lab.popen(host, [sys.executable, *command], stdin=pipe, stdout=pipe, env=ENVIRONMENT)
        self._said = deque()
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.process.stdout:
            if line.startswith(b"{"):
                with self._changed:
                    self._said.append(json.loads(line))
                    self._changed.notify_all()

    def tell(self, line):
        self.process.stdin.write(f"{line}\n".encode())
        self.process.stdin.flush()

    def wait_for(self, predicate, within_s=WITHIN_S):
        """Give the first thing said, and not yet taken, that is as wanted."""
        deadline = time.monotonic() + within_s
        with self._changed:
            while time.monotonic() < deadline:
                for index, said in enumerate(self._said):
                    if predicate(said):
                        del self._said[index]
                        return said
                self._changed.wait(max(0.0, deadline - time.monotonic()))
        raise AssertionError(f"{self.host} said only {list(self._said)}")

    def ping(self, peer):
        self.tell(f"ping {peer}")
        return self.wait_for(lambda said: said.get("pinged") == peer)

    def ping_until(self, peer, predicate, within_s=WITHIN_S):
        """Ping until the answer is as wanted."""
        deadline = time.monotonic() + within_s
        while True:
            answer = self.ping(peer)
            if predicate(answer):
                return answer
            assert time.monotonic() < deadline, answer
            time.sleep(0.2)

    def stop(self):
        self.process.kill()
        self.process.wait()
        self._reader.join()
        self.process.stdin.close()
        self.process.stdout.close()


class Internet:
    """The lab, two relays, a peer on every other host, and a server of a tiny model on one of them."""

    def __init__(self, lab, stack, model):
        self.lab = lab
        self._stack = stack
        self.relays = {}
        self.start_relay("relay1")
        self.start_relay("relay2")
        self._peers = {host.name: self.start_peer(host.name) for host in HOSTS if host.name not in self.relays}
        serve = ("-m", "corolla", "serve", str(model), "--json", "--until-eof", "--threads", "1", "--kv-bytes", "64MiB")
        self.server = self.run("symmetric1", *serve, "--precision", "float32", "--peer", self.entry)

    def run(self, host, *command):
        program = Program(self.lab, host, *command)
        self._stack.callback(program.stop)
        return program

    def start_relay(self, host):
        join = ["--peer", self.entry] if self.relays else []
        program = self.run(host, "-m", "corolla", "relay", "--json", *join)
        program.id = program.wait_for(lambda said: said.get("stage") == "joined")["peer"]
        self.relays[host] = program

    @property
    def entry(self):
        return f"tls://{self.lab.addr('relay1')}:31330"

    def start_peer(self, host):
        return self.run(host, str(Path(__file__).with_name("peer.py")), self.entry)

    def peer(self, host):
        """Give the peer of a host once it knows whether it can be dialled, and is found."""
        program = self._peers[host]
        if not hasattr(program, "state"):
            wanted = 1 if host.startswith("open") else 2
            program.state = program.wait_for(
                lambda said: said.get("verdict") in ("direct", "hidden") and len(said["addresses"]) >= wanted
            )
            program.id = program.state["peer"]
        return program


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A tiny model's directory."""
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def internet(model):
    if not os.environ.get("EMULATE_WAN"):
        pytest.skip("emulated routers take a minute and root: make wan")
    if obstacle := find_obstacle():
        pytest.skip(obstacle)
    with Lab(HOSTS) as lab, ExitStack() as stack:
        yield Internet(lab, stack, model)
