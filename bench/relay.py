"""What a relay costs: round trips and bytes a second through one, beside the same two peers without it. Loopback.

Relay, the peer behind it, and whoever dials it are processes of their own. What they say is encrypted between the two
ends and passes the relay as it is.
"""

import multiprocessing
import random
import statistics
import time
from collections.abc import Awaitable, Callable
from functools import partial
from multiprocessing.connection import Connection
from typing import Final, NamedTuple

import anyio

from bench.report import Row, write_report
from corolla.swarm import Channel, Contact, Endpoint, Identity, RelayConfig, SwarmConfig, TlsTransport
from corolla.swarm.reach.reach import dial_through_relays
from corolla.swarm.reach.relay import Relay
from corolla.swarm.reach.relayed import RelayEar
from corolla.terms import Address, PeerId
from corolla.wire import Ping, Pong, Publish, Record

__all__ = ["main"]

PINGS: Final = 300
MESSAGES: Final = 100
MESSAGE: Final = Publish(records=(Record(b"", bytes(64), 0.0, bytes(3000)),) * 32)
MESSAGE_BYTES: Final = 32 * 3000
DEADLINE_S: Final = 60.0


class Found(NamedTuple):
    """Where a peer is found."""

    peer: PeerId
    direct: tuple[Address, ...]
    relayed: tuple[Address, ...]


def main() -> None:
    """Measure both ways, print the table, write the report."""
    context = multiprocessing.get_context("fork")
    children = []
    found: Found | None = None
    try:
        for serve in (serve_relay, serve_hidden):
            ours, theirs = context.Pipe()
            child = context.Process(target=anyio.run, args=(partial(serve, theirs, found),), daemon=True)
            child.start()
            children.append(child)
            found = ours.recv()
        if found is None:
            raise RuntimeError("there is nobody to dial")
        rows = anyio.run(measure, found)
    finally:
        for child in children:
            child.kill()
            child.join()
    write_report("relay", rows, "two peers on one machine, directly and through a relay")


async def serve_relay(way: Connection, _: Found | None) -> None:
    """Be the relay."""
    endpoint, _tls = make_endpoint()
    relay = Relay(RelayConfig(enabled=True), lost_after_s=endpoint.config.lost_after_s)

    async def answer(channel: Channel) -> None:
        async for received in channel:
            if isinstance(received.message, Ping):
                await channel.send(Pong())
            else:
                await relay.handle(channel, received.message)  # type: ignore[arg-type]

    async with endpoint:
        await endpoint.listen("tls", "127.0.0.1", 0)
        way.send(Found(endpoint.peer_id, endpoint.addresses, ()))
        await endpoint.serve(answer)


async def serve_hidden(way: Connection, relay: Found | None) -> None:
    """Be the peer behind the relay, which can be dialled as well."""
    endpoint, tls = make_endpoint()
    contacts = [Contact(relay.peer, relay.direct)] if relay else []

    async def answer(channel: Channel) -> None:
        async for received in channel:
            await channel.send(Pong() if isinstance(received.message, Ping) else received.message)

    async with endpoint, anyio.create_task_group() as tasks:
        listener = await tls.listen("127.0.0.1", 0)
        endpoint.add_listener(listener)
        direct = listener.addresses
        ear = RelayEar(endpoint, listener, lambda: contacts, rng=random.Random(0))
        endpoint.add_listener(ear)
        tasks.start_soon(endpoint.serve, answer)
        ear.want(True)
        while not ear.addresses:
            await ear.wait()
        way.send(Found(endpoint.peer_id, direct, ear.addresses))


async def measure(found: Found) -> list[Row]:
    """Speak with a peer directly and through its relay."""
    direct = await measure_way(found.peer, found.direct)
    relayed = await measure_way(found.peer, found.relayed)
    rows = []
    for name, unit, one, other in zip(
        ("a round trip, median", "an echo of 96 kB"), ("ms", "MB/s"), direct, relayed, strict=True
    ):
        rows += [
            Row(f"{name}, directly", one, unit),
            Row(f"{name}, through a relay", other, unit, f"{name}, directly", other / one),
        ]
    return [*rows, Row("a relay adds to a round trip", relayed[0] - direct[0], "ms")]


async def measure_way(peer: PeerId, addresses: tuple[Address, ...]) -> tuple[float, float]:
    """Give the median round trip in milliseconds, and the megabytes a second that come back of long messages."""
    endpoint, tls = make_endpoint()
    async with endpoint, anyio.create_task_group() as tasks:
        dial_through_relays(endpoint, tls)
        endpoint.on_use = None  # it stays relayed
        async with endpoint.channel(peer, addresses) as channel:
            trips_s = [
                await time_of(partial(channel.request, Ping(), expected=Pong, deadline_s=DEADLINE_S))
                for _ in range(PINGS)
            ]
            echo = partial(channel.request, MESSAGE, expected=Publish, deadline_s=DEADLINE_S)
            echoes_s = [await time_of(echo) for _ in range(MESSAGES)]
        tasks.cancel_scope.cancel()
    return 1e3 * statistics.median(trips_s), MESSAGE_BYTES / statistics.median(echoes_s) / 1e6


async def time_of(do: Callable[[], Awaitable[object]]) -> float:
    """Say how long something takes."""
    began_s = time.perf_counter()
    await do()
    return time.perf_counter() - began_s


def make_endpoint() -> tuple[Endpoint, TlsTransport]:
    """Make a peer."""
    config, identity = SwarmConfig(), Identity.generate()
    tls = TlsTransport(identity, config)
    return Endpoint(identity, [tls], config), tls


if __name__ == "__main__":
    main()
