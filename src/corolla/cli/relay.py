"""``corolla relay``: a peer that serves no blocks and helps others to meet and to be reached. It needs no torch."""

import signal
from dataclasses import replace
from typing import TYPE_CHECKING

import anyio
from rich.filesize import decimal

from corolla import __version__
from corolla.cli.config import MetricsConfig, OutputConfig
from corolla.cli.console import Output
from corolla.cli.finding import is_told, seek_peers
from corolla.cli.flags import Flag, command
from corolla.cli.prometheus import METRICS_FLAGS, answer_prometheus
from corolla.cli.settings import Settings
from corolla.cli.signals import catch_signals
from corolla.cli.state import with_state
from corolla.swarm import LightConfig, LightPeer, RelayConfig, RelayLoad, SwarmConfig, is_loopback
from corolla.swarm.light import LightStage
from corolla.telemetry import configure_logging

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

__all__ = ["relay"]

_SHOW_S = 10.0


@command(
    sections=("light", "relay", "swarm", "metrics"),
    flags=(
        Flag("light.peers", "--peer"),
        Flag("light.host"),
        Flag("light.port"),
        Flag("light.announce"),
        Flag("light.identity"),
        Flag("light.name"),
        Flag("swarm.invite"),
        Flag("swarm.directory"),
        Flag("swarm.lan", "--lan/--no-lan"),
        Flag("swarm.dht"),
        *METRICS_FLAGS,
        Flag("relay.max_peers"),
        Flag("relay.max_streams"),
        Flag("relay.max_streams_per_peer"),
        Flag("relay.second_bytes"),
        Flag("relay.day_bytes"),
        Flag("output.log_level"),
        Flag("output.log_json"),
        Flag("output.json"),
        Flag("output.quiet"),
    ),
)
def relay(settings: Settings) -> None:
    """Help a swarm's peers to meet, and to be reached behind their routers.

    Others enter the swarm through this peer, learn from it how they are seen from outside, and are reached by it if
    they cannot be dialled. Without --peer it joins the swarm that it finds on the local network or, if it has an
    invite, in the DHT; if there is none, it starts one. What passes is encrypted between the two others. Run it where a
    public address is; it serves no blocks and needs little.

    Examples:

    corolla relay

    corolla relay --peer tls://192.0.2.7:31330 --announce tls://203.0.113.9:31330 --identity relay.key
    """
    config, output = settings.get(OutputConfig), Output(settings.get(OutputConfig))
    configure_logging(config.log_level, json=config.log_json)
    light, swarm = settings.get(LightConfig), with_state(settings.get(SwarmConfig))
    if not light.peers and not is_told(swarm) and (swarm.lan_interface or not is_loopback(light.host)):
        light = replace(light, peers=seek_peers(settings, output, None, is_one_model=False))
    peer = LightPeer(
        light,
        swarm=swarm,
        relay=replace(settings.get(RelayConfig), enabled=True),
        version=__version__,
    )
    anyio.run(_Run(peer, settings.get(MetricsConfig), output).live)


class _Run:
    """A relay at work, and what is told of it."""

    def __init__(self, peer: LightPeer, metrics: MetricsConfig, output: Output) -> None:
        self._peer = peer
        self._metrics = metrics
        self._output = output

    async def live(self) -> None:
        """Run it until it has left."""
        with (
            answer_prometheus(self._metrics, self._registry, self._output),
            catch_signals(self._peer.stop, signal.SIGINT, signal.SIGTERM),
        ):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._show_load)
                await self._peer.run(self._tell)
                tasks.cancel_scope.cancel()

    def _registry(self) -> "CollectorRegistry":
        from corolla.swarm.reach.metrics import relay_registry

        return relay_registry(lambda: self._peer.relay_load)

    async def _tell(self, stage: LightStage) -> None:
        peer = self._peer
        if self._output.is_json:
            self._output.json({"stage": stage, "peer": peer.peer_id, "addresses": peer.addresses})
            return
        if stage == "listening":
            self._output.note(f"peer {peer.peer_id[:8]} listens on {' '.join(peer.addresses)}")
        elif stage == "joined":
            swarm = "joined the swarm" if peer.config.peers else "started a new swarm"
            self._output.note(f"{swarm}; relaying for those who cannot be dialled; Ctrl-C leaves", "bold green")
            self._output.note(f"  to join it:  corolla serve MODEL --peer {peer.addresses[0]}", "bold")
        else:
            self._output.note("left the swarm")

    async def _show_load(self) -> None:
        """Say what it does whenever that has changed, and once that others cannot reach it."""
        before: RelayLoad | None = None
        verdict = "unknown"
        while True:
            await anyio.sleep(_SHOW_S)
            load = self._peer.relay_load
            if load is not None and load != before:
                before = load
                self._show(load)
            if self._peer.verdict != verdict:
                verdict = self._peer.verdict
                if verdict == "hidden":
                    note = "other peers cannot dial this one, so it is no use as a relay: open its port in the router"
                    self._output.note(note, "yellow")

    def _show(self, load: RelayLoad) -> None:
        if self._output.is_json:
            self._output.json({"stage": "relaying", **load._asdict()})
            return
        self._output.note(
            f"{load.peers} peers are reached through this one, {load.streams} streams are joined, "
            f"{decimal(load.passed_bytes)} passed on, {load.refused} requests refused"
        )
