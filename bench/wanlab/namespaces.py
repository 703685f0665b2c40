"""Network namespaces: what a host and its home router are made of, and how all of it is removed again.

Everything is named ``wl.<lab>.<host>``; nothing else of the machine is touched.
"""

import contextlib
import ctypes
import fcntl
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from bench.wanlab.hosts import Host, NatKind

__all__ = [
    "STATE", "Plan", "build_host", "change_address", "find_labs", "find_namespaces", "find_obstacle", "inside",
    "is_stale", "run_quietly", "teardown",
]  # fmt: skip

STATE: Final = Path("/run/wanlab")
_NETNS, _ETC, _TUN = Path("/run/netns"), Path("/etc/netns"), Path("/dev/net/tun")
_MASQUERADE: Final = {"symmetric": "masquerade random,fully-random"}
_GRACE_S: Final = 1.0


class Plan:
    """What a namespace must know of its lab.

    Args:
        lab: The lab's name.
        names: Lines of ``/etc/hosts``.
        mtu: Of the access link.
        tcp: Congestion control.
    """

    def __init__(self, lab: str, names: str, *, mtu: int, tcp: str) -> None:
        self.lab = lab
        self.names = names
        self.mtu = mtu
        self.tcp = tcp


def find_obstacle() -> str | None:
    """Say what keeps a lab from being built on this machine; ``None`` if nothing does."""
    if not sys.platform.startswith("linux"):
        return "wanlab needs Linux"
    if os.geteuid() != 0:
        return "wanlab needs root, for network namespaces"
    for program, package in (("ip", "iproute2"), ("nft", "nftables")):
        if shutil.which(program) is None:
            return f"wanlab needs {program}; install {package}"
    if not _TUN.exists():
        return f"wanlab needs {_TUN}"
    done = subprocess.run(["ip", "netns", "list"], check=False, capture_output=True, text=True)
    return None if done.returncode == 0 else f"wanlab needs network namespaces: {done.stderr.strip()}"


def run_quietly(*command: str, stdin: str = "") -> None:
    """Run a program.

    Raises:
        RuntimeError: If it fails; with what it said.
    """
    done = subprocess.run(command, input=stdin, text=True, capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


@contextlib.contextmanager
def inside(namespace: str) -> Iterator[None]:
    """Put the calling thread into a network namespace.

    Raises:
        OSError: If it cannot be entered.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/proc/thread-self/ns/net").open() as home, (_NETNS / namespace).open() as there:
        if libc.setns(there.fileno(), 0):
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
        try:
            yield
        finally:
            libc.setns(home.fileno(), 0)


def build_host(plan: Plan, host: Host, address: str) -> int:
    """Create a host and its home router, if any; give the TUN device that is its access link."""
    name = f"wl.{plan.lab}.{host.name}"
    edge = f"{name}.nat" if host.nat else name
    _add_namespace(plan, edge)
    tun = _add_tun(edge, "wan")
    commands = f"""
        addr add {address}/32 dev wan
        link set wan mtu {plan.mtu} txqueuelen 5000 up
        route add default dev wan congctl {plan.tcp}"""
    run_quietly("ip", "-n", edge, "-batch", "-", stdin=commands)
    if host.nat:
        _add_router(plan, name, edge, host.nat)
    return tun


def change_address(edge: str, old: str, new: str) -> None:
    """Give the access link of a host or its router another address, as a provider may at any time."""
    run_quietly("ip", "-n", edge, "-batch", "-", stdin=f"addr add {new}/32 dev wan\naddr del {old}/32 dev wan\n")


def find_namespaces(lab: str = "*") -> list[Path]:
    """List the namespaces of a lab, or of all."""
    return sorted(_NETNS.glob(f"wl.{lab}.*"))


def find_labs() -> list[str]:
    """List the names of all labs, stale ones included."""
    return sorted({path.name for path in STATE.glob("*")} | {path.name.split(".")[1] for path in find_namespaces()})


def is_stale(lab: str) -> bool:
    """Say whether a lab is without a keeper."""
    try:
        with (STATE / lab / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except FileNotFoundError:
        pass
    return True


def teardown(lab: str) -> None:
    """Remove whatever there is of a lab: names first, so that no process can still enter."""
    inodes = {namespace.stat().st_ino for namespace in find_namespaces(lab)}
    for namespace in find_namespaces(lab):
        subprocess.run(["ip", "netns", "del", namespace.name], check=False)
        shutil.rmtree(_ETC / namespace.name, ignore_errors=True)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in _members(inodes):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + _GRACE_S
        while any(_members(inodes)) and time.monotonic() < deadline:
            time.sleep(0.02)
    shutil.rmtree(STATE / lab, ignore_errors=True)


def _members(inodes: set[int]) -> Iterator[int]:
    """Give the processes in the network namespaces of these inodes."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "ns/net").stat().st_ino in inodes:
                yield int(process.name)


def _add_namespace(plan: Plan, namespace: str) -> None:
    """Add a namespace that resolves the names of the lab's hosts."""
    run_quietly("ip", "netns", "add", namespace)
    with inside(namespace):
        Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1")
        Path("/proc/sys/net/ipv4/tcp_no_metrics_save").write_text("1")
    run_quietly("ip", "-n", namespace, "link", "set", "lo", "up")
    (_ETC / namespace).mkdir(parents=True, exist_ok=True)
    (_ETC / namespace / "hosts").write_text(f"127.0.0.1 localhost\n{plan.names}")


def _add_tun(namespace: str, name: str) -> int:
    """Add a TUN device for raw IP packets, which lasts as long as its descriptor."""
    tun, no_packet_info, set_interface = 1, 0x1000, 0x400454CA
    with inside(namespace):
        descriptor = os.open(_TUN, os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(descriptor, set_interface, struct.pack("16sH22x", name.encode(), tun | no_packet_info))
    return descriptor


def _add_router(plan: Plan, name: str, edge: str, kind: NatKind) -> None:
    _add_namespace(plan, name)
    with inside(edge):
        Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    run_quietly("ip", "netns", "exec", edge, "nft", "-f", "-", stdin=_router_rules(kind))
    commands = f"""
        link add lan mtu {plan.mtu} type veth peer name lan mtu {plan.mtu} netns {name}
        addr add 192.168.1.1/24 dev lan
        link set lan up"""
    run_quietly("ip", "-n", edge, "-batch", "-", stdin=commands)
    commands = f"""
        addr add 192.168.1.2/24 dev lan
        link set lan up
        route add default via 192.168.1.1 congctl {plan.tcp}"""
    run_quietly("ip", "-n", name, "-batch", "-", stdin=commands)


def _router_rules(kind: NatKind) -> str:
    """Write the rules of a home router.

    What leaves is rewritten; what was not asked for is dropped without a trace. A full cone also lets anyone in through
    a port that was used to go out.
    """
    is_cone = kind == "full-cone"
    learn = 'iifname "lan" meta l4proto {tcp, udp} update @cone {meta l4proto . th sport : ip saddr}'
    enter = 'iifname "wan" dnat to meta l4proto . th dport map @cone'
    return f"""table ip wan {{
        map cone {{ type inet_proto . inet_service : ipv4_addr; flags dynamic,timeout; timeout 2m; }}
        chain before {{ type nat hook prerouting priority dstnat;
            {enter if is_cone else ""}
        }}
        chain after {{ type nat hook postrouting priority srcnat;
            oifname "wan" {_MASQUERADE.get(kind, "masquerade")};
        }}
        chain inbound {{ type filter hook input priority 0;
            iifname "wan" icmp type echo-request accept
            iifname "wan" ct state {{ new, invalid }} drop
        }}
        chain through {{ type filter hook forward priority 0; policy drop;
            ct state invalid drop
            {learn if is_cone else ""}
            iifname "lan" accept
            ct state established,related accept
            ct status dnat accept
        }}
    }}"""
