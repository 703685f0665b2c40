"""Compare what the lab emulates with what it was asked for: ``python -m bench.wanlab.selftest``, as root; 50 s."""

import contextlib
import itertools
import os
import signal
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, get_args

from bench.wanlab.hosts import Host, NatKind
from bench.wanlab.lab import Lab
from bench.wanlab.namespaces import find_namespaces, is_stale

__all__ = ["main"]

_STAMP: Final = 35  # SO_TIMESTAMPNS
_SINK: Final = """import socket, time
conn, total, start = socket.create_server(("", 8)).accept()[0], 0, time.monotonic() + 0.5
while data := conn.recv(1 << 18):
    if time.monotonic() > start: total += len(data)
print(total * 8e-6 / (time.monotonic() - start))"""
_OWNER: Final = """import time
from bench.wanlab import Lab
print(Lab.load("lan").up().name, flush=True); time.sleep(99)"""

_Check = tuple[str, str, str, bool]  # what, wanted, measured, whether that is good


def main() -> int:
    """Print one line a check; give the number of those that failed."""
    failed = 0
    for what, wanted, measured, is_good in itertools.chain(_check_links(), _check_routers(), _check_cleanup()):
        failed += not is_good
        print(f"{what:<34}{wanted:<22}{measured:<36}{'ok' if is_good else 'FAILED'}", flush=True)
    return failed


def _udp(lab: Lab, host: str, port: int = 0) -> socket.socket:
    made = lab.socket(host)
    made.bind(("", port))
    made.settimeout(0.5)
    return made


def _arrives(lab: Lab, a: str, b: str) -> bool:
    """Say whether a full-size datagram gets from a to b's public address."""
    with _udp(lab, a) as here, _udp(lab, b, 7) as there:
        here.sendto(bytes(1472), (lab.addr(b), 7))
        with contextlib.suppress(TimeoutError):
            return len(there.recv(2000)) == 1472
        return False


def _one_way_ms(lab: Lab, a: str, b: str, gap_s: float) -> list[float]:
    """Time 200 datagrams from a to b, by the kernel's clock of arrivals."""
    with _udp(lab, a) as here, _udp(lab, b, 7) as there:
        there.setsockopt(socket.SOL_SOCKET, _STAMP, 1)
        time.sleep(0.05)
        for _ in range(200):
            here.sendto(struct.pack("q", time.time_ns()), (lab.addr(b), 7))
            time.sleep(gap_s)
        times: list[float] = []
        with contextlib.suppress(TimeoutError):
            while len(times) < 200:
                sent, ((_, _, stamp),), *_ = there.recvmsg(8, 64)
                seconds, nanoseconds = struct.unpack("qq", stamp)
                times.append((seconds * 10**9 + nanoseconds - struct.unpack("q", sent)[0]) / 1e6)
        return times


def _echoes(lab: Lab, a: str, b: str) -> bool:
    """Say whether b can answer a."""
    with _udp(lab, a) as here, _udp(lab, b, 7) as there:
        here.sendto(b"", (lab.addr(b), 7))
        with contextlib.suppress(TimeoutError):
            there.sendto(b"answer", there.recvfrom(9)[1])
            return here.recv(9) == b"answer"
        return False


def _goodput_mbit(lab: Lab, a: str, b: str) -> float:
    """Measure TCP from a to b, but for the first half second."""
    with lab.popen(b, [sys.executable, "-c", _SINK], stdout=subprocess.PIPE, text=True) as sink:
        time.sleep(0.3)
        with lab.socket(a, socket.SOCK_STREAM) as made:
            made.connect((lab.addr(b), 8))
            end = time.monotonic() + 2.5
            while time.monotonic() < end:
                made.sendall(bytes(1 << 18))
        return float(sink.stdout.read()) if sink.stdout else 0.0


def _punches(lab: Lab, a: str, b: str) -> bool:
    """Say whether a and b reach each other by UDP once a public host has introduced them."""
    with _udp(lab, a, 9) as x, _udp(lab, b, 9) as y, _udp(lab, "pub", 9) as meet:
        peers = {}
        for made, other in ((x, y), (y, x)):
            made.sendto(b"", (lab.addr("pub"), 9))
            peers[other] = meet.recvfrom(9)[1]
            made.settimeout(0.1)
        heard = set()
        for _ in range(3):
            for made, peer in peers.items():
                made.sendto(b"", peer)
            for made in peers:
                with contextlib.suppress(TimeoutError):
                    peers[made] = made.recvfrom(9)[1]  # maybe not whom we were told
                    heard.add(made)
        return len(heard) == 2


def _set_rtt(lab: Lab, rtt_ms: float) -> None:
    lab.path("a", "b").delay_ms = lab.path("b", "a").delay_ms = rtt_ms / 2


def _check_links() -> Iterator[_Check]:
    with Lab([Host("a"), Host("b"), Host("c")]) as lab:
        a, b = lab.link("a"), lab.link("b")
        for want in (0, 5, 50, 100, 200):
            _set_rtt(lab, want)
            there, back = _one_way_ms(lab, "a", "b", 0.005), _one_way_ms(lab, "b", "a", 0.005)
            errors = sorted(abs(out + home - want) for out, home in zip(there, back, strict=False))
            p50, p99 = errors[len(errors) // 2], errors[len(errors) * 99 // 100]
            yield "RTT", f"{want} ms", f"error p50 {p50:.2f} ms, p99 {p99:.2f} ms", p50 < 1 and p99 < 2
        a.set(jitter_ms=5)
        sigma = statistics.stdev(_one_way_ms(lab, "a", "b", 0.015))
        yield "jitter", "5 ms", f"{sigma:.1f} ms", 3.5 < sigma < 6.5
        a.set(jitter_ms=0, loss=10)
        loss = statistics.mean(100 - len(_one_way_ms(lab, "a", "b", 0)) / 2 for _ in range(8))
        yield "loss", "10 %", f"{loss:.1f} %", 7 < loss < 13
        a.set(loss=0)
        _set_rtt(lab, 20)
        for link, key, rate in ((a, "up_mbit", 10), (a, "up_mbit", 100), (a, "up_mbit", 300), (b, "down_mbit", 50)):
            link.set(**{key: rate})
            got = _goodput_mbit(lab, "a", "b")
            yield f"{key}, TCP at RTT 20 ms", f"{rate} Mbit/s", f"{got:.1f} Mbit/s", 0.85 < got / rate < 1
            link.set(**{key: 0})
        _set_rtt(lab, 0)
        before, got = lab.table.head.delivered, _goodput_mbit(lab, "a", "b")
        pace = (lab.table.head.delivered - before) / 2.5
        yield "no cap, TCP", "> 300 Mbit/s", f"{got:.0f} Mbit/s, {pace:.0f} packets/s", got > 300
        yield from _check_cuts(lab)


def _check_cuts(lab: Lab) -> Iterator[_Check]:
    b = lab.link("b")
    lab.partition({"a"}, {"b"})
    yield "partition a | b", "a-b cut, a-c not", "", not _arrives(lab, "a", "b") and _arrives(lab, "a", "c")
    lab.heal()
    yield "heal", "a-b", "", _arrives(lab, "a", "b")
    b.set(up=False)
    yield "link of b down", "c-b cut", "", not _arrives(lab, "c", "b")
    b.set(up=True)
    yield "link of b up", "c-b", "", _arrives(lab, "c", "b")
    old = lab.addr("b")
    lab.readdress("b")
    yield "another address for b", "c-b", "", lab.addr("b") != old and _arrives(lab, "c", "b")


def _check_routers() -> Iterator[_Check]:
    kinds: tuple[NatKind, ...] = get_args(NatKind)[1:]
    hosts = [Host(f"{nat}{number}", nat=nat) for nat in kinds for number in (1, 2)]
    with Lab([Host("pub"), *hosts]) as lab:
        for nat in kinds:
            out, is_open = _arrives(lab, f"{nat}1", "pub"), _arrives(lab, "pub", f"{nat}1")
            yield f"{nat} NAT", "out, answer, not in", "", out and _echoes(lab, f"{nat}1", "pub") and not is_open
        for a, b in itertools.combinations_with_replacement(kinds, 2):
            wanted, works = b != "symmetric" or a == "full-cone", _punches(lab, f"{a}1", f"{b}2")
            words = ("punch works" if wanted else "punch fails", "works" if works else "fails")
            yield f"{a}, {b}", *words, works == wanted
        rate = _goodput_mbit(lab, "symmetric1", "pub")
        yield "TCP through NAT", "> 300 Mbit/s", f"{rate:.0f} Mbit/s", rate > 300


def _check_cleanup() -> Iterator[_Check]:
    lab = Lab.load("world").up()
    sleeper, made = lab.popen("eu1", ["sleep", "99"]), len(find_namespaces(lab.name))
    time.sleep(0.1)
    lab.down()
    yield "world up, namespaces", "19", f"{made}", made == 19
    yield "world down", "0", f"{len(find_namespaces(lab.name))}", not find_namespaces(lab.name)
    yield "its processes", "ended", "", sleeper.wait(1) == -signal.SIGTERM
    for number in (signal.SIGINT, signal.SIGKILL):
        with subprocess.Popen(
            [sys.executable, "-c", _OWNER],
            stdout=subprocess.PIPE,
            text=True,
            stderr=subprocess.DEVNULL,
            cwd=Path(__file__).parents[2],
        ) as owner:
            name = owner.stdout.readline().strip() if owner.stdout else ""
            owner.send_signal(number)
        time.sleep(1)
        left = len(find_namespaces(name))
        yield f"owner ended by {number.name}", "nothing left", f"{left}", name != "" and not left
    lab = Lab.load("lan").up()
    os.kill(lab.keeper_id, signal.SIGKILL)
    time.sleep(0.2)
    yield "keeper killed", "stale", "", is_stale(lab.name)
    lab.down()
    yield "stale lab removed", "nothing left", "", not find_namespaces(lab.name)


if __name__ == "__main__":
    sys.exit(main())
