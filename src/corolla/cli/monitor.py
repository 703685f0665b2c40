"""``corolla monitor``: a page and an API that show a swarm. It needs no torch."""

import signal
from dataclasses import replace

import anyio

from corolla.cli.config import OutputConfig
from corolla.cli.console import Output
from corolla.cli.finding import find_peers
from corolla.cli.flags import FINDING_FLAGS, Flag, command
from corolla.cli.settings import Settings
from corolla.cli.signals import catch_signals
from corolla.cli.state import state_directory, with_state
from corolla.cli.web import WebServer, listen
from corolla.monitor import MonitorConfig, observing
from corolla.swarm import SwarmConfig
from corolla.telemetry import configure_logging

__all__ = ["monitor"]


@command(
    sections=("monitor", "chat", "swarm"),
    flags=(
        *FINDING_FLAGS,
        Flag("monitor.host"),
        Flag("monitor.port"),
        Flag("monitor.title"),
        Flag("monitor.show_addresses"),
        Flag("monitor.database"),
        Flag("output.log_level"),
        Flag("output.log_json"),
        Flag("output.json"),
        Flag("output.quiet"),
    ),
)
def monitor(settings: Settings) -> None:
    """Show a swarm on a page: its servers, the bottleneck, what happened.

    The same is there as JSON at /api/swarm, and for Prometheus at /metrics. Only this machine can see it unless --host
    says otherwise. It takes no part in the swarm: stop it at any time, and run as many as you like.

    Examples:

    corolla monitor --peer tls://192.0.2.7:31330

    corolla monitor --invite invite.txt --host 0.0.0.0 --title "Our lab"
    """
    from corolla.monitor.web import make_app

    output_config, config = settings.get(OutputConfig), settings.get(MonitorConfig)
    configure_logging(output_config.log_level, json=output_config.log_json)
    output = Output(output_config)
    peers = find_peers(settings, output)
    if config.database is None:
        config = replace(config, database=state_directory() / "monitor.sqlite")

    async def live() -> None:
        with listen(config.host, config.port) as (ear, url):
            async with observing(with_state(settings.get(SwarmConfig)), peers, config) as observer:
                server = WebServer(make_app(observer))
                with catch_signals(server.stop, signal.SIGINT, signal.SIGTERM):
                    if output.is_json:
                        output.json({"stage": "online", "url": f"{url}/"})
                    output.note(f"the swarm is shown at {url}/; Ctrl-C ends it", "bold green")
                    await server.run(ear)

    anyio.run(live)
