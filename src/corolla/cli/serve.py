"""``corolla serve``: one server in the foreground, from its first stage to its last."""

import asyncio
import os
import shlex
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import anyio

from corolla.cli.config import MetricsConfig, OutputConfig, ParentConfig, SupervisorConfig, TracesConfig
from corolla.cli.console import Output
from corolla.cli.failures import INTERRUPTED, report_failure
from corolla.cli.flags import Flag, command
from corolla.cli.progress import show_progress
from corolla.cli.prometheus import METRICS_FLAGS, answer_prometheus
from corolla.cli.settings import Settings, limit_kernels
from corolla.cli.signals import catch_signals
from corolla.cli.state import with_state
from corolla.cli.supervisor import supervise
from corolla.engine import EngineConfig, share_heap
from corolla.hub import HubConfig
from corolla.server import Server, ServerConfig, Stage
from corolla.swarm import RelayConfig, SwarmConfig
from corolla.telemetry import configure_logging
from corolla.telemetry.spans import export_spans

__all__ = ["serve"]


@command(
    sections=("server", "engine", "swarm", "relay", "hub", "metrics", "traces", "parent", "supervisor"),
    flags=(
        Flag("server.model", "MODEL"),
        Flag("server.peers", "--peer"),
        Flag("swarm.invite"),
        Flag("swarm.directory"),
        Flag("server.new_swarm"),
        Flag("swarm.lan", "--lan/--no-lan"),
        Flag("swarm.dht"),
        Flag("server.blocks"),
        Flag("server.num_blocks"),
        Flag("server.stay"),
        Flag("server.precision"),
        Flag("server.device"),
        Flag("server.host"),
        Flag("server.port"),
        Flag("server.announce"),
        Flag("server.identity"),
        Flag("server.name"),
        Flag("server.adapters", "--adapter"),
        Flag("server.adapter_bytes"),
        Flag("server.shelf_bytes"),
        *METRICS_FLAGS,
        Flag("traces.otlp"),
        Flag("relay.enabled", "--relay"),
        Flag("engine.threads"),
        Flag("engine.kv_bytes"),
        Flag("engine.kept_bytes"),
        Flag("server.sharing"),
        Flag("hub.max_disk_bytes", "--max-disk"),
        Flag("output.log_level"),
        Flag("output.log_json"),
        Flag("output.json"),
        Flag("output.quiet"),
        Flag("supervisor.restart", "--restart/--no-restart"),
        Flag("parent.until_eof", is_hidden=True),
        Flag("parent.peers_from_stdin", is_hidden=True),
    ),
)
def serve(settings: Settings) -> int:
    """Serve a span of a model's blocks to a swarm.

    Without --peer, and without an --invite that names peers, it joins the swarm of this model on the local network. If
    there is none, it starts a new one, and prints the line that others need to join it. Ctrl-C lets sessions finish,
    then leaves; a second one leaves at once.

    Examples:

    corolla serve meta-llama/Llama-3.1-70B-Instruct --peer tls://192.0.2.7:31330

    corolla serve smollm2 --blocks 0:10 --invite invite.txt --restart
    """
    config, parent = settings.get(OutputConfig), settings.get(ParentConfig)
    configure_logging(config.log_level, json=config.log_json)
    supervisor = settings.get(SupervisorConfig)
    if supervisor.restart:
        with tempfile.TemporaryDirectory(prefix="corolla-") as scratch:  # a server that crashed comes back as itself
            own = [] if settings.get(ServerConfig).identity else ["--identity", str(Path(scratch) / "identity.pem")]
            arguments = [*sys.argv[1:], *own, "--no-restart"]
            return supervise(arguments, Output(config), longest_wait_s=supervisor.longest_wait_s)
    share_heap()
    limit_kernels()
    server_config = settings.get(ServerConfig)
    if parent.peers_from_stdin:
        line = _read_line()
        if not line:
            return INTERRUPTED  # the parent has ended meanwhile
        server_config = replace(server_config, peers=tuple(line.split()))
    server = Server(
        server_config,
        engine=settings.get(EngineConfig),
        swarm=with_state(settings.get(SwarmConfig)),
        hub=settings.get(HubConfig),
        relay=settings.get(RelayConfig),
    )
    run = _Run(server, settings.get(MetricsConfig), Output(config), until_eof=parent.until_eof)
    exporting = export_spans(settings.get(TracesConfig).otlp, "corolla serve")
    if not parent.until_eof:
        with exporting:
            anyio.run(run.live)
        return 0
    try:
        with exporting:
            anyio.run(run.live)
        code = 0
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the edge of the program, as in report_failure
        code = report_failure(error, debug=config.debug)
    run.end(code)  # the thread that waits for the end of standard input would keep the process alive
    return code


class _Run:
    """A server at work, and what is told of it."""

    def __init__(self, server: Server, metrics: MetricsConfig, output: Output, *, until_eof: bool) -> None:
        self._server = server
        self._metrics = metrics
        self._output = output
        self._until_eof = until_eof
        self._is_online = False
        self._signals = 0

    async def live(self) -> None:
        """Run the server until it has left."""
        loop = asyncio.get_running_loop()

        def count() -> None:
            self._signals += 1
            if self._signals > 1:
                self.end(INTERRUPTED)
            loop.call_soon_threadsafe(self._stop)

        stopping = () if self._until_eof else (signal.SIGINT, signal.SIGTERM)
        ignored = (signal.SIGINT,) if self._until_eof else ()
        with (
            answer_prometheus(self._metrics, lambda: self._server.metrics.registry, self._output),
            catch_signals(count, *stopping),
            catch_signals(lambda: None, *ignored),
        ):
            async with anyio.create_task_group() as tasks:
                if self._until_eof:
                    tasks.start_soon(self._stop_at_eof)
                with show_progress(self._output) as report:
                    await self._server.run(self._tell, report)
                tasks.cancel_scope.cancel()

    def end(self, code: int) -> None:
        """End the process now, whatever its threads are doing."""
        self._output.notes.show_cursor()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)

    def _stop(self) -> None:
        if not self._is_online:  # nobody has a session here, and a thread that downloads or loads cannot be stopped
            self._output.note("interrupted", "yellow")
            self.end(INTERRUPTED)
        self._server.stop()

    async def _stop_at_eof(self) -> None:
        await anyio.to_thread.run_sync(_read_to_end, abandon_on_cancel=True)
        self._stop()

    async def _tell(self, stage: Stage) -> None:
        server = self._server
        self._is_online = self._is_online or stage == "online"
        if self._output.is_json:
            self._output.json(
                {
                    "stage": stage,
                    "peer": server.peer_id,
                    "model": server.config.model,
                    "addresses": server.addresses,
                    "span": server.span,
                    "speed": server.speed,
                }
            )
        else:
            for line, style in self._describe(stage):
                self._output.note(line, style)

    def _describe(self, stage: Stage) -> list[tuple[str, str]]:
        server = self._server
        if stage == "listening":
            return [(f"peer {server.peer_id[:8]} listens on {' '.join(server.addresses)}", "")]
        if stage == "joined":
            model, address = shlex.quote(server.config.model), server.addresses[0]
            way = f"{model} --peer {address}" + (" --invite INVITE" if server.swarm_id else "")
            swarm = f"private swarm {server.swarm_id[:8]}" if server.swarm_id else "swarm"
            found = [(f"found peer {one.peer[:8]} at {one.addresses[0]}", "") for one in server.met if one.peer]
            return [
                *found,
                (f"started a new {swarm}" if server.is_founder else f"joined the {swarm}", ""),
                (f"  to join it:       corolla serve {way}", "bold"),
                (f"  to chat with it:  corolla chat {way}", "bold"),
            ]
        if stage == "claimed":
            return [(f"claimed blocks {server.span}", "")]
        if stage == "online" and server.speed is not None:
            decode, prefill = server.speed.decode_tokens_per_s, server.speed.prefill_tokens_per_s
            return [
                (f"measured {decode:.0f} tokens/s for one session, {prefill:.0f} tokens/s for a prompt", ""),
                (f"online: serving blocks {server.span} of {server.config.model}; Ctrl-C leaves", "bold green"),
            ]
        if stage == "reached":
            return [self._describe_reach()]
        if stage == "moving":
            return [("moving to blocks that need this server more", "yellow")]
        if stage == "draining":
            return [("leaving: open sessions may finish first; Ctrl-C again leaves at once", "yellow")]
        return [("left the swarm", "")] if stage == "left" else []

    def _describe_reach(self) -> tuple[str, str]:
        relays = [address for address in self._server.addresses if address.startswith("relay:")]
        if not self._server.is_hidden:
            return f"others reach this server at {' '.join(self._server.addresses)}", ""
        if relays:
            return f"others cannot dial this server and reach it through relays: {' '.join(relays)}", "yellow"
        return (
            "others cannot dial this server, and no relay is known: open its port in your router, or have someone "
            "with a public address run corolla relay",
            "yellow",
        )


def _read_line() -> str:
    """Read a line without a buffer, so that what follows is still there for the next reader."""
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(sys.stdin.fileno(), 1)):
        line += byte
    return line.decode()


def _read_to_end() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
