"""``corolla doctor``: what works on this machine and in the swarm, what does not, and what to do about it. No torch."""

from collections import Counter
from collections.abc import Iterator, Sequence

import anyio

import corolla
from corolla.cli.config import ChatConfig, OutputConfig
from corolla.cli.console import Output
from corolla.cli.finding import find_peers
from corolla.cli.findings import Finding, show_findings
from corolla.cli.flags import FINDING_FLAGS, Flag, command
from corolla.cli.machine import examine_machine, examine_port
from corolla.cli.settings import Settings
from corolla.cli.state import with_state
from corolla.errors import ConfigError, Error
from corolla.monitor import watching
from corolla.swarm import Channel, Contact, Endpoint, LightConfig, Outlook, SwarmConfig, look_out, split_address
from corolla.terms import Announcement, Claim, Snapshot

__all__ = ["doctor", "tell_outlook", "tell_swarm"]

_CLOCK_S = 30.0
_WRONG_CLOCK_S = 300.0  # invites are checked with so much tolerance
_UNHEALTHY = 1


@command(
    sections=("chat", "swarm", "light"),
    flags=(
        Flag("chat.model", "MODEL"),
        *FINDING_FLAGS,
        Flag("light.host"),
        Flag("light.port"),
        Flag("output.json"),
        Flag("output.quiet"),
    ),
)
def doctor(settings: Settings) -> int:
    """Say what works on this machine, what does not, and what to do about it.

    It looks at packages, memory, disk, GPU, threads and the files of MODEL. With a --peer or an --invite it also asks
    the swarm: whether it can be reached, whether its peers can reach a server here, what kind of router is between,
    whether there is a relay, whose clock is wrong, and which blocks have no server. The exit code is 1 if anything is
    in the way.

    Examples:

    corolla doctor

    corolla doctor meta-llama/Llama-3.1-70B-Instruct --peer tls://192.0.2.7:31330
    """
    output, config = Output(settings.get(OutputConfig)), settings.get(ChatConfig)
    light, swarm = settings.get(LightConfig), with_state(settings.get(SwarmConfig))
    findings = examine_machine(config.model, None)
    port = examine_port(light.host, light.port)
    findings.append(port)
    try:
        peers = find_peers(settings, output)
    except Error as error:
        findings.append(Finding("swarm", "unknown", "no swarm was asked", error.message))
    else:
        findings += anyio.run(_examine_swarm, swarm, peers, light if port.state == "good" else None)
    is_well = all(one.state != "bad" for one in findings)
    if output.is_json:
        output.json({"is_well": is_well, "findings": findings})
    else:
        show_findings(findings, output)
    return 0 if is_well else _UNHEALTHY


async def _examine_swarm(config: SwarmConfig, peers: Sequence[str], listening: LightConfig | None) -> list[Finding]:
    """Ask a swarm.

    Args:
        config: How to talk to it.
        peers: Whom to ask first.
        listening: Where a server would listen; ``None`` if that cannot be tried.
    """
    try:
        async with watching(config, peers) as (endpoint, watcher), anyio.create_task_group() as tasks:
            snapshot = watcher.snapshot()
            port = None
            if listening is not None:
                port = await _listen(endpoint, listening)
                tasks.start_soon(endpoint.serve, _ignore)
            claims: list[Claim] = [*snapshot.announcements, *snapshot.relay_offers]
            outlook = await look_out(endpoint, [Contact(one.peer, one.addresses) for one in claims], port)
            tasks.cancel_scope.cancel()
    except Error as error:
        return [Finding("swarm", "bad", error.message, "is the address right, and does a server run there?")]
    return [*tell_swarm(snapshot), *tell_outlook(outlook, snapshot, port)]


async def _listen(endpoint: Endpoint, config: LightConfig) -> int | None:
    try:
        listener = await endpoint.listen("tls", config.host, config.port)
    except ConfigError:
        return None
    return split_address(listener.addresses[0]).port


async def _ignore(channel: Channel) -> None:
    """Let whoever dials back find what it came for, the handshake."""


def tell_swarm(snapshot: Snapshot) -> Iterator[Finding]:
    """Say how a swarm is.

    Args:
        snapshot: Of it.
    """
    servers = snapshot.announcements
    if not servers:
        yield Finding("swarm", "note", "it is reached, and has no server", "start one: corolla serve MODEL --peer ...")
        return
    yield Finding("swarm", "good", f"it is reached; {len(servers)} servers are seen")
    models: dict[str, list[Announcement]] = {}
    for server in servers:
        models.setdefault(server.model, []).append(server)
    for these in models.values():
        blocks = these[0].num_blocks
        online = [one.span for one in these if one.state == "online"]
        missing = [block for block in range(blocks) if not any(block in span for span in online)]
        name = these[0].model_name
        if missing:
            says = f"{len(missing)} of {blocks} blocks of {name} have no server, the first is block {missing[0]}"
            yield Finding("blocks", "bad", says, f"serve it as well: corolla serve {name} --peer ...")
        else:
            yield Finding("blocks", "good", f"all {blocks} blocks of {name} have a server")
    versions = Counter(server.version for server in servers)
    most, _ = versions.most_common(1)[0]
    if most != corolla.__version__:
        says = f"this is corolla {corolla.__version__}, most servers run {most}"
        yield Finding("release", "note", says, "if anything fails, run the same release everywhere")


def tell_outlook(outlook: Outlook, snapshot: Snapshot, port: int | None) -> Iterator[Finding]:
    """Say how this machine looks to others.

    Args:
        outlook: What they said.
        snapshot: Of the swarm: whether it has relays.
        port: Where a server would listen; ``None`` if that was not tried.
    """
    if not outlook.asked:
        yield Finding("reach", "unknown", "no peer that can be dialled was there to say how it sees this machine")
        return
    hosts = " and ".join(outlook.hosts)
    routers = {
        "none": ("good", f"peers see this machine at {hosts}, its own address: no router is between"),
        "some": ("note", f"a router is between; peers see this machine at {hosts}; one more peer could tell its kind"),
        "friendly": ("good", f"a router is between that shows all peers the same port; it is {hosts} to them"),
        "symmetric": ("note", f"a router is between that shows each peer another port; it is {hosts} to them"),
        "unknown": ("unknown", "nobody could say what is between"),
    }
    state, says = routers[outlook.router]
    yield Finding("router", "good" if state == "good" else "note", says)
    relays = sum(one.is_relay for one in snapshot.announcements) + len(snapshot.relay_offers)
    if port is None:
        yield Finding("reach", "unknown", "whether a server here can be dialled was not tried, as its port is in use")
    elif outlook.verdict == "unknown":
        yield Finding("reach", "unknown", f"nobody tried whether a server here can be dialled on port {port}")
    elif outlook.verdict == "direct":
        yield Finding("reach", "good", f"a server here can be dialled on port {port}")
    elif relays:
        which = f"{relays} relay{'s' if relays > 1 else ''}"
        says = f"a server here cannot be dialled on port {port}, but reached through the swarm's {which}; slower"
        yield Finding("reach", "note", says, f"to be dialled: forward TCP port {port} in the router to this machine")
    else:
        says = f"a server here cannot be dialled on port {port}, and the swarm has no relay: {outlook.problem}"
        remedy = f"forward TCP port {port} in the router and let it through the firewall, or start a corolla relay"
        yield Finding("reach", "bad", says, remedy)
    yield _tell_clock(outlook.ahead_s)


def _tell_clock(ahead_s: float | None) -> Finding:
    if ahead_s is None:
        return Finding("clock", "unknown", "nobody said what time it is")
    says = f"this machine's clock is {abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'} those of its peers"
    if abs(ahead_s) > _WRONG_CLOCK_S:
        return Finding("clock", "bad", says, "set it by NTP: announcements and invites are dropped for their date")
    if abs(ahead_s) > _CLOCK_S:
        return Finding("clock", "note", says, "set it by NTP")
    return Finding("clock", "good", f"this machine's clock agrees with its peers' within {abs(ahead_s):.1f} s")
