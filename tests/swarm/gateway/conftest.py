"""A tiny swarm, and a gateway over it on a free port."""

from collections.abc import Iterator
from dataclasses import dataclass

import anyio
import openai
import pytest
import torch
from anyio.from_thread import BlockingPortal, start_blocking_portal

from corolla.cli.web import WebServer, listen
from corolla.client import ClientConfig, Swarm
from corolla.gateway import GatewayConfig, KeyConfig
from corolla.gateway.accounts import Accounts
from corolla.gateway.app import make_app
from corolla.gateway.catalog import Catalog
from corolla.gateway.gateway import Gateway
from corolla.hub import HubConfig, stay_silent
from corolla.testing import ThreadedSwarm, save_tiny_model

# As Qwen's: it says which tools there are, and how to call them.
TEMPLATE = (
    "{% if tools %}tools:{% for tool in tools %} {{ tool.function.name }}{% endfor %}, as <tool_call>{% endif %}"
    "{% for message in messages %}{{ message.role }}: {{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@dataclass(frozen=True)
class Running:
    """A gateway that runs on a thread."""

    url: str
    key: str
    model: str
    gateway: Gateway
    accounts: Accounts
    portal: BlockingPortal

    def client(self, **options) -> openai.OpenAI:
        http = openai.DefaultHttpxClient(verify=False)  # certificates take long to load and are not needed
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, timeout=60, http_client=http, **options
        )


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), context_tokens=2048, chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def servers(directory):
    torch.set_num_threads(1)
    with ThreadedSwarm(str(directory), ["0:2", "2:4"]) as servers:
        yield servers


@pytest.fixture(scope="module")
def running(directory, servers, tmp_path_factory) -> Iterator[Running]:
    with GatewayOver(servers, str(directory), tmp_path_factory.mktemp("keys") / "keys.sqlite") as running:
        yield running


@pytest.fixture
def client(running):
    with running.client() as client:
        yield client


@pytest.fixture
def at_once():
    """Call a function for each of some things, all at once, and give the results in their order."""

    def call_all(function, things):
        async def run():
            results, limiter = {}, anyio.CapacityLimiter(len(things))

            async def call(index, thing):
                results[index] = await anyio.to_thread.run_sync(function, thing, limiter=limiter)

            async with anyio.create_task_group() as tasks:
                for index, thing in enumerate(things):
                    tasks.start_soon(call, index, thing)
            return [results[index] for index in range(len(things))]

        return anyio.run(run)

    return call_all


@pytest.fixture
def gateway_over():
    """The class of gateways with settings of one's own."""
    return GatewayOver


class GatewayOver:
    """A gateway for as long as a context lasts."""

    def __init__(self, servers, model, database, **config):
        self._servers, self._model, self._database = servers, model, database
        self._config = GatewayConfig(port=0, **config)

    def __enter__(self) -> Running:
        self._accounts = Accounts(self._database)
        self._swarm = Swarm(self._servers.address, config=ClientConfig(chain_s=0.5))
        catalog = Catalog.load(
            [self._model], self._swarm, adapters=self._config.adapters, hub=HubConfig(), report=stay_silent
        )
        self._context = start_blocking_portal()
        portal = self._context.__enter__()
        self._life, (url, gateway, self._server) = portal.start_task(self._run, catalog)
        key = self._accounts.make(KeyConfig(name="test"))
        self._portal = portal
        return Running(url, key.text, self._model, gateway, self._accounts, portal)

    def __exit__(self, *error):
        self._server.stop()
        self._life.result()
        self._context.__exit__(None, None, None)
        self._swarm.close()
        self._accounts.close()

    async def _run(self, catalog, *, task_status):
        gateway = Gateway(catalog, self._accounts, self._config)
        server = WebServer(make_app(gateway))
        with listen(self._config.host, self._config.port) as (ear, url):
            async with gateway:
                task_status.started((url, gateway, server))
                await server.run(ear)
