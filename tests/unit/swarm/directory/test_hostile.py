"""Whoever floods, repeats itself, lies or never reads loses its connection; the swarm goes on as if nothing was."""

import itertools
import random
from contextlib import asynccontextmanager

import anyio
import msgspec
import pytest
from anyio import lowlevel

from corolla.errors import Error, ungrouped
from corolla.swarm import Identity
from corolla.swarm.directory.stamps import accuse, sign
from corolla.wire import News, Ping, Record, Subscribe
from corolla.wire.limits import MAX_BUCKETS, MAX_IDS, RECORD_ID_BYTES

from ..conftest import Member, claim, watcher
from .conftest import QUICK

pytestmark = pytest.mark.anyio
DEADLINE_S = 30
DICE = random.Random(5)


@asynccontextmanager
async def swarm_of_two(net):
    """Have two honest servers; afterwards both see what either says, and so does whoever comes."""
    with anyio.fail_after(3 * DEADLINE_S):
        async with anyio.create_task_group() as tasks:
            first = Member(net.endpoint(QUICK), (), seed=1)
            tasks.start_soon(first.run, net.scheme)
            await first.ready.wait()
            second = Member(net.endpoint(QUICK), first.endpoint.addresses, seed=2)
            tasks.start_soon(second.run, net.scheme)
            await second.ready.wait()
            yield first, second
            for number, (speaker, hearer) in enumerate(itertools.permutations([first, second]), start=7):
                peer = speaker.endpoint.peer_id
                await speaker.gossip.announce(claim(speaker.endpoint, free_tokens=number))
                while peer not in hearer.seen() or hearer.seen()[peer].free_tokens != number:
                    await hearer.gossip.view.changed.wait()
            async with net.endpoint(QUICK) as endpoint:
                late = watcher(endpoint, first.endpoint.addresses)
                async with anyio.create_task_group() as watching:
                    watching.start_soon(late.run)
                    await late.wait_for(lambda seen: len(seen.announcements) == 2, DEADLINE_S)
                    watching.cancel_scope.cancel()
            tasks.cancel_scope.cancel()


async def read_to_the_end(channel):
    while True:
        await channel.receive()


async def attack(endpoint, victim, messages):
    """Say one message after the other on one link, reading what comes, until it is over."""
    with ungrouped():
        async with endpoint.channel(victim.peer_id, victim.addresses) as channel, anyio.create_task_group() as tasks:
            tasks.start_soon(read_to_the_end, channel)
            for message in messages:
                await channel.send(message)
                await lowlevel.checkpoint()


def forged(victim):
    newer = claim(victim, sequence=2**50, free_tokens=666)
    return msgspec.structs.replace(sign(newer, victim.identity, None), signature=bytes(64))


ATTACKS = {
    "names without end": lambda victim: (
        News(ids=DICE.randbytes(MAX_IDS * RECORD_ID_BYTES)) for _ in itertools.count()
    ),
    "the same wish again and again": lambda victim: itertools.repeat(News(wanted=bytes(MAX_IDS * RECORD_ID_BYTES))),
    "digests without end": lambda victim: itertools.repeat(News(sums=bytes(MAX_BUCKETS * RECORD_ID_BYTES))),
    "a list that nobody asked for": lambda victim: itertools.repeat(News(listing={0: bytes(RECORD_ID_BYTES)})),
    "a forged announcement": lambda victim: itertools.repeat(News(records=(forged(victim),))),
    "damaged announcements": lambda victim: itertools.repeat(
        News(records=(Record(b"\xc1", bytes(64), 0.0, b""),) * 64)
    ),
    "accusations of a stranger": lambda victim: itertools.repeat(
        News(suspicions=(accuse(victim.peer_id, 0, Identity.generate()),) * 1000)
    ),
    "another message": lambda victim: itertools.chain([News()], itertools.repeat(Ping())),
}


@pytest.mark.parametrize("kind", ATTACKS)
async def test_who_abuses_a_link_loses_it(memory_net, kind):
    async with swarm_of_two(memory_net) as (first, _), memory_net.endpoint(QUICK) as stranger:
        with anyio.fail_after(DEADLINE_S), pytest.raises(Error) as ended:
            await attack(stranger, first.endpoint, ATTACKS[kind](first.endpoint))
        assert ended.value.code in ("misbehaved", "peer_lost", "remote_protocol")
        assert first.seen()[first.endpoint.peer_id].free_tokens != 666


async def test_who_subscribes_and_never_reads_is_left(memory_net):
    async with swarm_of_two(memory_net) as (first, _), memory_net.endpoint(QUICK) as hoarder:
        victim = first.endpoint
        async with hoarder.channel(victim.peer_id, victim.addresses) as channel:
            await channel.send(Subscribe())
            until_s = anyio.current_time() + 4 * QUICK.request_s
            for number in itertools.count():
                await first.gossip.announce(claim(victim, addresses=(f"tls://{number:0180}:1",) * 8))
                await anyio.sleep(0.002)
                if number > 500 and anyio.current_time() > until_s:  # enough, however busy the machine
                    break
            with anyio.fail_after(DEADLINE_S), pytest.raises(Error):
                await read_to_the_end(channel)
