"""A relay, peers behind it, and whoever wants to reach them, all on loopback."""

import contextlib
import random

import anyio

from corolla.swarm import Channel, Contact, Endpoint, Identity, RelayConfig, SwarmConfig, TlsTransport
from corolla.swarm.reach.punch import Doorway
from corolla.swarm.reach.reach import dial_through_relays
from corolla.swarm.reach.reachability import observe
from corolla.swarm.reach.relay import Relay
from corolla.swarm.reach.relayed import RelayEar
from corolla.wire import Observe, Ping, Pong, Punch

HOST = "127.0.0.1"


class Relaying:
    """A relay; its handler notes all that passes."""

    def __init__(self, endpoint, config):
        self.endpoint = endpoint
        self.relay = Relay(config, lost_after_s=endpoint.config.lost_after_s)
        self.scope = anyio.CancelScope()
        self.listener = None

    @property
    def contact(self):
        return Contact(self.endpoint.peer_id, self.endpoint.addresses)

    async def run(self):
        with self.scope:
            await self.endpoint.serve(self.answer)

    async def die(self):
        """Close every stream and the port."""
        self.scope.cancel()
        await self.listener.aclose()

    async def answer(self, channel: Channel):
        async for received in channel:
            match received.message:
                case Ping():
                    await channel.send(Pong())
                case Observe():
                    await channel.send(observe(channel))
                case message:
                    await self.relay.handle(channel, message)


def make_endpoint(config=None):
    config = config or SwarmConfig()
    identity = Identity.generate()
    tls = TlsTransport(identity, config)
    return Endpoint(identity, [tls], config), tls


@contextlib.asynccontextmanager
async def relaying(swarm_config=None, **limits):
    """Have a relay."""
    endpoint, _ = make_endpoint(swarm_config)
    async with endpoint, anyio.create_task_group() as tasks:
        here = Relaying(endpoint, RelayConfig(enabled=True, **limits))
        here.listener = await endpoint.listen("tls", HOST, 0)
        tasks.start_soon(here.run)
        yield here
        tasks.cancel_scope.cancel()


async def echo_pings(channel: Channel):
    async for _ in channel:
        await channel.send(Pong())


class Hidden:
    """A peer that is found through relays only."""

    def __init__(self, endpoint, ear, doorway):
        self.endpoint = endpoint
        self.ear = ear
        self.peer = endpoint.peer_id
        self.doorway = doorway

    @property
    def addresses(self):
        return self.ear.addresses

    async def until_found(self, relays=1):
        with anyio.fail_after(20):
            while len(self.ear.addresses) < relays:
                await self.ear.wait()


@contextlib.asynccontextmanager
async def hidden(relays, handler=echo_pings, config=None):
    """Have a peer that is behind some relays: a list that may change."""
    endpoint, tls = make_endpoint(config)
    async with endpoint, anyio.create_task_group() as tasks:
        listener = await tls.listen(HOST, 0)
        listener.addresses = ()
        ear = RelayEar(endpoint, listener, lambda: [one.contact for one in relays], rng=random.Random(0))
        doorway = Doorway(endpoint, listener, ear)

        async def answer(channel):
            async for received in channel:
                if isinstance(received.message, Punch):
                    await doorway.answer(channel, received.message)
                else:
                    await channel.send(Pong())

        endpoint.add_listener(ear)
        tasks.start_soon(endpoint.serve, answer if handler is echo_pings else handler)
        ear.want(True)
        here = Hidden(endpoint, ear, doorway)
        await here.until_found(min(len(relays), endpoint.config.relays))
        yield here
        tasks.cancel_scope.cancel()
        await listener.aclose()


@contextlib.asynccontextmanager
async def client(config=None, *, upgrades=False):
    """Have a peer that does not listen, but can dial those behind relays."""
    endpoint, tls = make_endpoint(config)
    async with endpoint, anyio.create_task_group() as tasks:
        found = dial_through_relays(endpoint, tls)
        if upgrades:
            tasks.start_soon(found.run)
            await anyio.lowlevel.checkpoint()
        else:
            endpoint.on_use = None
        yield endpoint
        tasks.cancel_scope.cancel()


async def ping(endpoint, peer, addresses):
    async with endpoint.channel(peer, addresses) as channel:
        await channel.request(Ping(), expected=Pong, deadline_s=20)
        return channel.path
