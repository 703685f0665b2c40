"""A light peer for the tests on emulated networks: announces itself, and pings whom it is told to. No torch.

Told by lines of standard input, ``ping PEER`` or ``hold PEER`` (a ping, then a wait for the stream to break); it says
what happens, one JSON object a line. Its only argument is where to join.
"""

import json
import random
import sys

import anyio

from corolla.errors import Error
from corolla.swarm import (
    Contacts,
    Directory,
    Endpoint,
    Gossip,
    Identity,
    Reach,
    RelayConfig,
    SwarmConfig,
    TlsTransport,
)
from corolla.terms import Announcement, ModelId, Span
from corolla.wire import Ping, Pong, ReachMessage

LIMIT_S = 4.0


def say(**fields):
    print(json.dumps(fields), flush=True)


class Peer:
    def __init__(self, contact):
        config = SwarmConfig()
        identity = Identity.generate()
        tls = TlsTransport(identity, config)
        self.endpoint = Endpoint(identity, [tls], config)
        contacts, rng = Contacts([contact]), random.Random()
        self.gossip = Gossip(self.endpoint, Directory(config), contacts, rng=rng)
        self.reach = Reach(self.endpoint, tls, RelayConfig(), snapshot=self.gossip.snapshot, contacts=contacts, rng=rng)

    async def run(self):
        async with self.endpoint, anyio.create_task_group() as tasks:
            self.reach.watch(await self.endpoint.listen("tls", "0.0.0.0", 0), "0.0.0.0")
            tasks.start_soon(self.endpoint.serve, self.answer)
            await self.gossip.join()
            await self.gossip.announce(
                Announcement(
                    peer=self.endpoint.peer_id,
                    sequence=0,
                    ttl_s=self.endpoint.config.ttl_s,
                    model=ModelId("ab" * 32),
                    model_name="none",
                    num_blocks=1,
                    span=Span(0, 1),
                    state="online",
                    precision="float32",
                    addresses=self.endpoint.addresses,
                )
            )
            tasks.start_soon(self.gossip.run)
            tasks.start_soon(self.reach.run, self.gossip.move)
            tasks.start_soon(self.tell_state)
            async for line in anyio.wrap_file(sys.stdin):
                verb, peer = line.split()
                tasks.start_soon(self.hold if verb == "hold" else self.ping, peer)
            tasks.cancel_scope.cancel()

    async def tell_state(self):
        told = None
        while True:
            state = {"addresses": self.endpoint.addresses, "verdict": self.reach.verdict}
            if state != told:
                told = state
                say(peer=self.endpoint.peer_id, **state)
            await anyio.sleep(0.1)

    async def answer(self, channel):
        async for received in channel:
            if isinstance(received.message, ReachMessage):
                await self.reach.handle(channel, received.message)
            else:
                await self.gossip.handle(channel, received.message)

    def addresses_of(self, peer):
        servers = {server.peer: server.addresses for server in self.gossip.snapshot().announcements}
        return servers.get(peer, ())

    async def ping(self, peer):
        begin_s = anyio.current_time()
        try:
            with anyio.fail_after(LIMIT_S):
                async with self.endpoint.channel(peer, self.addresses_of(peer)) as channel:
                    opened_s = anyio.current_time()
                    await channel.request(Ping(), expected=Pong, deadline_s=LIMIT_S)
                    pinged_s = anyio.current_time()
                    say(pinged=peer, path=channel.path, open_s=opened_s - begin_s, rtt_s=pinged_s - opened_s)
        except (Error, TimeoutError) as error:
            say(pinged=peer, path=None, error=f"{type(error).__name__}: {error}")

    async def hold(self, peer):
        address = self.addresses_of(peer)[0]
        channel = await self.endpoint._open(peer, [address])
        try:
            await channel.request(Ping(), expected=Pong, deadline_s=LIMIT_S)
            say(held=peer, path=channel.path, address=address)
            await channel.receive()
        except Error as error:
            say(lost=peer, error=f"{type(error).__name__}: {error}")
        finally:
            await self.endpoint._close(channel)


if __name__ == "__main__":
    anyio.run(Peer(sys.argv[1]).run)
