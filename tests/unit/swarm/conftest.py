"""Both transports behind one fixture, so that one suite holds for each."""

import contextlib
import random
from dataclasses import dataclass

import anyio
import pytest

from corolla.swarm import (
    Channel,
    Contacts,
    Directory,
    Endpoint,
    Identity,
    MemoryNetwork,
    SwarmConfig,
    TlsTransport,
    make_presence,
    make_watcher,
)
from corolla.terms import Announcement, ModelId, Span

HOSTS = {"tls": "127.0.0.1", "memory": "here"}
MODEL = ModelId("ab" * 32)


@dataclass
class Net:
    """Makes peers that can reach each other."""

    scheme: str
    memory: MemoryNetwork

    def transport(self, identity, config=None):
        if self.scheme == "memory":
            return self.memory.transport(identity)
        return TlsTransport(identity, config or SwarmConfig())

    def endpoint(self, config=None):
        identity = Identity.generate()
        config = config or SwarmConfig()
        return Endpoint(identity, [self.transport(identity, config)], config)

    @contextlib.asynccontextmanager
    async def serving(self, handler, config=None, *, port=0):
        """Have a peer whose ears are answered by a handler of channels."""
        async with self.endpoint(config) as endpoint, anyio.create_task_group() as tasks:
            await endpoint.listen(self.scheme, HOSTS[self.scheme], port)
            tasks.start_soon(endpoint.serve, handler)
            yield endpoint
            tasks.cancel_scope.cancel()

    @contextlib.asynccontextmanager
    async def listening(self, handler, config=None):
        """Have a listener whose streams go to a handler; yields the listener and its peer id."""
        identity = Identity.generate()
        listener = await self.transport(identity, config).listen(HOSTS[self.scheme], 0)
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(listener.serve, handler)
                yield listener, identity.peer_id
                tasks.cancel_scope.cancel()
        finally:
            await listener.aclose()

    async def dial(self, peer, address, config=None):
        return await self.transport(Identity.generate(), config).dial(peer, address)


@pytest.fixture(params=["memory", "tls"])
def net(request):
    return Net(request.param, MemoryNetwork())


@pytest.fixture
def memory_net():
    return Net("memory", MemoryNetwork())


@pytest.fixture
def tls_net():
    return Net("tls", MemoryNetwork())


async def echo(stream):
    """Send back whatever comes, then the end."""
    with contextlib.suppress(anyio.BrokenResourceError):
        with contextlib.suppress(anyio.EndOfStream):
            while True:
                await stream.send(await stream.receive())
        await stream.send_eof()


async def receive_exactly(stream, nbytes):
    received = b""
    while len(received) < nbytes:
        received += await stream.receive()
    return received


async def receive_all(stream):
    received = bytearray()
    with contextlib.suppress(anyio.EndOfStream):
        while True:
            received += await stream.receive()
    return bytes(received)


def claim(endpoint, span=(0, 4), **changes):
    """Make the announcement of a peer."""
    fields = {
        "peer": endpoint.peer_id,
        "sequence": 0,
        "ttl_s": 20.0,
        "model": MODEL,
        "model_name": "tiny",
        "num_blocks": 8,
        "span": Span(*span),
        "state": "online",
        "precision": "float32",
        "addresses": endpoint.addresses,
    }
    return Announcement(**{**fields, **changes})


class Member:
    """A peer that takes part in the directory."""

    def __init__(self, endpoint, bootstrap, seed, *, serves=True):
        self.serves = serves
        self.endpoint = endpoint
        self.directory = Directory(endpoint.config)
        self.gossip = make_presence(endpoint, self.directory, Contacts(bootstrap), rng=random.Random(seed))
        self.scope = anyio.CancelScope()
        self.ready = anyio.Event()

    async def run(self, scheme):
        with self.scope:
            async with self.endpoint as endpoint, anyio.create_task_group() as tasks:
                await endpoint.listen(scheme, HOSTS[scheme], 0)
                tasks.start_soon(endpoint.serve, self.answer)
                await self.gossip.join()
                if self.serves:
                    await self.gossip.announce(claim(endpoint, ttl_s=endpoint.config.ttl_s))
                tasks.start_soon(self.gossip.run)
                self.ready.set()

    async def answer(self, channel: Channel):
        async for received in channel:
            await self.gossip.handle(channel, received.message)

    def seen(self):
        return {found.peer: found for found in self.gossip.snapshot().announcements}


def watcher(endpoint, bootstrap, seed=0):
    return make_watcher(endpoint, Directory(endpoint.config), Contacts(bootstrap), rng=random.Random(seed))
