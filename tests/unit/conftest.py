"""Servers of a tiny model in a network in memory: their streams, handlers and engines, without processes or files."""

from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from typing import TYPE_CHECKING

import anyio
import pytest

if TYPE_CHECKING:
    from corolla.engine import Engine
    from corolla.server.handler import Handler
    from corolla.swarm import Endpoint, Gossip

MODEL = "ab" * 32
CONTEXT_TOKENS = 256


@cache
def tiny(family):
    from corolla.blocks import build_tiny
    from corolla.blocks.zoo import default_config

    return build_tiny(default_config(family))


def cut(family, span):
    from corolla.blocks import split_model
    from corolla.terms import Span

    return split_model(tiny(family), [Span.parse(span)], is_packable=family in ("llama", "mistral"))[0]


async def lie(gossip, answer, channel):
    """Be an honest member of the swarm, but answer as the test likes whatever is to be computed."""
    from corolla.wire import Backward, CloseSession, Forward, OpenSession, Step

    async for received in channel:
        if isinstance(received.message, Backward | CloseSession | Forward | OpenSession | Step):
            await answer(channel, received.message)
        else:
            await gossip.handle(channel, received.message)


@dataclass
class Host:
    """A server of some blocks."""

    endpoint: "Endpoint"
    gossip: "Gossip"
    handler: "Handler"
    engine: "Engine"

    @property
    def peer(self):
        return self.endpoint.peer_id

    @property
    def address(self):
        return f"{self.endpoint.addresses[0]}/{self.peer}"

    async def announce(self, **changes):
        from corolla.terms import Announcement

        fields = {
            "peer": self.peer,
            "sequence": 0,
            "ttl_s": 20.0,
            "model": MODEL,
            "model_name": "tiny",
            "num_blocks": 4,
            "span": self.engine.span.span,
            "state": "online",
            "precision": "float32",
            "addresses": self.endpoint.addresses,
            "free_tokens": self.engine.load.free_tokens,
        }
        await self.gossip.announce(Announcement(**fields | changes))


class Hosts:
    """Makes servers in one network, and whoever talks to them."""

    def __init__(self):
        from corolla.swarm import MemoryNetwork

        self.network = MemoryNetwork()
        self.all = []

    @asynccontextmanager
    async def host(
        self,
        span="0:4",
        *,
        family="llama",
        lease_s=60.0,
        is_loaded=True,
        pages=1000,
        answer=None,
        resume_s=0.2,
        context_tokens=CONTEXT_TOKENS,
    ):
        import random

        from corolla.cache import PAGE_TOKENS
        from corolla.engine import Engine, EngineConfig
        from corolla.engine.measure import page_cost
        from corolla.replay import Store
        from corolla.server.handler import Handler
        from corolla.server.outlet import Outlet
        from corolla.swarm import Contacts, Directory, Gossip

        blocks = await anyio.to_thread.run_sync(cut, family, span)
        cost = await anyio.to_thread.run_sync(page_cost, blocks)
        config = EngineConfig(threads=1, kv_bytes=int(pages * PAGE_TOKENS * cost.token_bytes))
        async with (
            self.endpoint() as endpoint,
            Engine(blocks, config, context_tokens=context_tokens) as engine,
            anyio.create_task_group() as tasks,
        ):
            contacts = Contacts([host.address for host in self.all[:1]])
            gossip = Gossip(endpoint, Directory(endpoint.config), contacts, rng=random.Random(0))
            outlet = Outlet(endpoint, Store(1 << 20), resume_s=resume_s)
            host = Host(endpoint, gossip, Handler(gossip, outlet, lease_s=lease_s), engine)
            if is_loaded:
                host.handler.take_over(engine, MODEL)
            await endpoint.listen("memory", "here", 0)
            tasks.start_soon(endpoint.serve, host.handler.serve if answer is None else partial(lie, gossip, answer))
            await gossip.join()
            tasks.start_soon(gossip.run)
            await host.announce()
            with anyio.fail_after(5):
                for other in [one for one in self.all if one.peer not in self.network._cut]:
                    while host.peer not in {seen.peer for seen in other.gossip.snapshot().announcements}:
                        await other.gossip.view.changed.wait()
            self.all.append(host)
            yield host
            self.all.remove(host)
            tasks.cancel_scope.cancel()

    @asynccontextmanager
    async def chain(self, *spans, **options):
        """Have a server for each span."""
        from contextlib import AsyncExitStack

        async with AsyncExitStack() as stack:
            yield [await stack.enter_async_context(self.host(span, **options)) for span in spans]

    def endpoint(self):
        from corolla.swarm import Endpoint, Identity, SwarmConfig

        identity = Identity.generate()
        return Endpoint(identity, [self.network.transport(identity)], SwarmConfig())

    @asynccontextmanager
    async def channel(self, host):
        """Have a stranger's channel to a server."""
        async with self.endpoint() as endpoint, endpoint.channel(host.peer, host.endpoint.addresses) as channel:
            yield channel

    def swarm(self, **config):
        """A client's place in the swarm; enter it."""
        from corolla.client import AsyncSwarm, ClientConfig

        settings = ClientConfig(**{"codec": "raw", "chain_s": 0.2, "resume_s": 0.2} | config)
        return AsyncSwarm([self.all[0].address], config=settings, transport=self.network.transport)


@pytest.fixture
def hosts():
    # Not in an event loop: importing takes seconds.
    import_module("corolla.client")
    import_module("corolla.server")
    tiny("llama")
    return Hosts()


@pytest.fixture
def until():
    """Waits until something is so, which must be soon."""

    async def wait(predicate):
        with anyio.fail_after(15):
            while not predicate():  # noqa: ASYNC110 - what it waits for has no event
                await anyio.sleep(0.005)

    return wait
