"""``corolla gateway``: an OpenAI-compatible API and a chat page over a swarm, and its API keys."""

import signal
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import anyio
import torch
import typer
from platformdirs import user_data_path
from prometheus_client import CollectorRegistry
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from corolla.cli.config import ChatConfig, MetricsConfig, OutputConfig, TracesConfig
from corolla.cli.console import Output, without_controls
from corolla.cli.finding import find_peers
from corolla.cli.flags import FINDING_FLAGS, Flag, command
from corolla.cli.progress import show_progress
from corolla.cli.prometheus import METRICS_FLAGS, answer_prometheus
from corolla.cli.settings import Settings
from corolla.cli.signals import catch_signals
from corolla.cli.state import with_state
from corolla.cli.web import WebServer, listen
from corolla.client import ClientConfig, Swarm
from corolla.errors import UsageError
from corolla.gateway import GatewayConfig, KeyConfig
from corolla.gateway.accounts import Accounts, NewKey, Spent
from corolla.gateway.app import make_app
from corolla.gateway.catalog import Catalog
from corolla.gateway.gateway import Gateway
from corolla.hub import HubConfig
from corolla.swarm import SwarmConfig
from corolla.telemetry import configure_logging
from corolla.telemetry.spans import export_spans

__all__ = ["gateway", "keys", "list_", "new", "revoke", "run"]


class _KeysOrRun(TyperGroup):
    """``corolla gateway keys`` is one thing; anything else that follows ``corolla gateway`` is a run."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401 - of typer's own copy of click, or click
        return super().parse_args(ctx, args if args and args[0] in self.commands else ["run", *args])


gateway = typer.Typer(
    cls=_KeysOrRun,
    help="Offer models of a swarm by an API like OpenAI's, and by a chat page.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
keys = typer.Typer(
    help="The gateway's API keys.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)
_LEAVE_S = 5
_IDLE_S = 15
_DATABASE = Flag("gateway.database")
_OUTPUT = (Flag("output.json"), Flag("output.quiet"))


@command(
    sections=("gateway", "chat", "client", "swarm", "hub", "metrics", "traces"),
    flags=(
        Flag("gateway.models", "MODEL"),
        *FINDING_FLAGS,
        Flag("gateway.adapters", "--adapter"),
        Flag("gateway.host"),
        Flag("gateway.port"),
        _DATABASE,
        Flag("gateway.cors_origins", "--cors-origin"),
        Flag("gateway.max_answers"),
        *METRICS_FLAGS,
        Flag("traces.otlp"),
        Flag("client.codec"),
        Flag("client.precision"),
        Flag("client.allow_peers", "--allow-peer"),
        Flag("client.avoid_peers", "--avoid-peer"),
        Flag("chat.threads"),
        Flag("output.log_level"),
        Flag("output.log_json"),
        *_OUTPUT,
    ),
)
def run(settings: Settings) -> None:
    """Offer models of a swarm to programs, by an API like OpenAI's, and to people, by a page.

    The first run makes an API key and shows it, once. corolla gateway keys makes more, lists and revokes them.

    Examples:

    corolla gateway --peer tls://192.0.2.7:31330

    corolla gateway smollm2 --host 0.0.0.0 --port 80 --metrics-port 9465
    """
    output, config = Output(settings.get(OutputConfig)), settings.get(GatewayConfig)
    configure_logging(settings.get(OutputConfig).log_level, json=settings.get(OutputConfig).log_json)
    chat = settings.get(ChatConfig)
    if chat.threads:
        torch.set_num_threads(chat.threads)
    with closing(_accounts(config)) as accounts:
        peers = find_peers(settings, output, config.models)
        swarm = Swarm(peers, config=settings.get(ClientConfig), swarm_config=with_state(settings.get(SwarmConfig)))
        with closing(swarm), export_spans(settings.get(TracesConfig).otlp, "corolla gateway"):
            with show_progress(output) as report:
                hub = settings.get(HubConfig)
                catalog = Catalog.load(config.models, swarm, adapters=config.adapters, hub=hub, report=report)
            run = _Run(Gateway(catalog, accounts, config), accounts, output)
            with answer_prometheus(settings.get(MetricsConfig), lambda: run.registry, output):
                anyio.run(run.live)


@command(
    sections=("gateway", "key"),
    flags=(Flag("key.name"), Flag("key.requests_per_min"), Flag("key.tokens_per_day"), _DATABASE, *_OUTPUT),
)
def new(settings: Settings) -> None:
    """Make an API key, and show it, once.

    Examples:

    corolla gateway keys new --name Ada --requests-per-min 60 --tokens-per-day 100000
    """
    output = Output(settings.get(OutputConfig))
    with closing(_accounts(settings.get(GatewayConfig))) as accounts:
        made = accounts.make(settings.get(KeyConfig))
    if output.is_json:
        output.json({"id": made.id, "key": made.text})
        return
    output.note(f"API key {made.id}; it is shown only now, keep it like a password")
    output.result(made.text)


@command(sections=("gateway", "key"), flags=(Flag("key.id", "ID"), _DATABASE, *_OUTPUT))
def revoke(settings: Settings) -> None:
    """Take an API key back, from the next request on.

    Examples:

    corolla gateway keys revoke 3f9a1c2b
    """
    key = settings.get(KeyConfig).id
    if key is None:
        raise UsageError("say which key to revoke, by its id; corolla gateway keys list shows them")
    with closing(_accounts(settings.get(GatewayConfig))) as accounts:
        accounts.revoke(key)
    Output(settings.get(OutputConfig)).note(f"API key {key} is revoked")


@command(sections=("gateway",), flags=(_DATABASE, *_OUTPUT))
def list_(settings: Settings) -> None:
    """List the API keys, what they allow and what was spent with them.

    Examples:

    corolla gateway keys list --json
    """
    output = Output(settings.get(OutputConfig))
    with closing(_accounts(settings.get(GatewayConfig))) as accounts:
        spent = accounts.all()
    if output.is_json:
        output.json([{name: getattr(one, name) for name in one.__slots__} for one in spent])
        return
    table = Table("key", "for", "made", "allows", "requests", "read", "written", "", box=None, header_style="dim")
    for one in spent:
        cells = [one.id, one.name, _date(one.made_s), _allowance(one)]
        cells += [f"{number:,}" for number in (one.requests, one.read_tokens, one.written_tokens)]
        cells.append("" if one.revoked_s is None else f"revoked {_date(one.revoked_s)}")
        table.add_row(*(Text(without_controls(cell)) for cell in cells))
    output.result(table if spent else "there is no key; make one with: corolla gateway keys new")


gateway.add_typer(run)
gateway.add_typer(keys, name="keys")
for _command in (new, list_, revoke):
    keys.add_typer(_command)


class _Run:
    """A gateway at work, and what is told of it."""

    def __init__(self, gateway: Gateway, accounts: Accounts, output: Output) -> None:
        self._gateway = gateway
        self._accounts = accounts
        self._output = output

    @property
    def registry(self) -> CollectorRegistry:
        """What is told to Prometheus."""
        return self._gateway.metrics.registry

    async def live(self) -> None:
        """Serve until Ctrl-C or SIGTERM."""
        config = self._gateway.config
        server = WebServer(make_app(self._gateway), leave_s=_LEAVE_S, idle_s=_IDLE_S)
        with catch_signals(server.stop, signal.SIGINT, signal.SIGTERM):
            first = await anyio.to_thread.run_sync(_first_key, self._accounts)
            with listen(config.host, config.port) as (ear, url):
                async with self._gateway:
                    self._tell(url, first)
                    await server.run(ear)

    def _tell(self, address: str, first: NewKey | None) -> None:
        models = [offer.name for offer in self._gateway.catalog.all()]
        if self._output.is_json:
            self._output.json({"url": address, "models": models, "key": first and first.text})
            return
        page = address if first is None else f"{address}/#key={first.text}"
        self._output.result(f"offering {', '.join(map(without_controls, models))}; Ctrl-C leaves", style="bold")
        self._output.result(f"  for people:    {page}")
        self._output.result(f"  for programs:  {address}/v1")
        if first is None:
            self._output.note("  API keys are made by: corolla gateway keys new", "dim")
        else:
            self._output.result(f"  API key:       {first.text}   (shown only now; keep it like a password)")


def _first_key(accounts: Accounts) -> NewKey | None:
    return accounts.make(KeyConfig(name="first")) if accounts.is_empty() else None


def _accounts(config: GatewayConfig) -> Accounts:
    return Accounts(config.database or _file())


def _file() -> Path:
    return user_data_path("corolla", appauthor=False) / "gateway.sqlite"


def _date(seconds: int) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(seconds))


def _allowance(one: Spent) -> str:
    limits = [
        f"{number:,} {what}"
        for number, what in ((one.requests_per_min, "requests/min"), (one.tokens_per_day, "tokens/day"))
        if number is not None
    ]
    return ", ".join(limits) or "all"
