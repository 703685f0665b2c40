"""A server measures who may follow it: those that go on where it ends, the nearest again and again."""

import random

import anyio
import pytest

from corolla.server.successors import Successors
from corolla.swarm import Contacts, Directory, Gossip
from corolla.terms import MAX_RTTS

pytestmark = pytest.mark.anyio


async def test_the_way_to_those_that_go_on_is_measured_and_so_is_bandwidth(hosts, until):
    async with hosts.host("0:2") as first, hosts.chain("2:4", "1:3") as following, hosts.host("0:2"):
        seen = first.gossip.snapshot
        await until(lambda: len(seen().announcements) == 4)
        successors = Successors(first.endpoint, seen)
        assert (successors.rtts, successors.bytes_per_s) == ((), None)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(successors.run)
            await until(lambda: successors.bytes_per_s is not None)
            tasks.cancel_scope.cancel()
        assert [rtt.peer for rtt in successors.rtts] == sorted(host.peer[:8] for host in following)
        assert all(0 <= rtt.rtt_s < 1 for rtt in successors.rtts)
        assert successors.bytes_per_s > 1e6
        await first.announce(rtts=successors.rtts, bytes_per_s=successors.bytes_per_s)
        await until(lambda: any(one.rtts == successors.rtts for one in seen().announcements))


async def test_one_that_cannot_be_reached_is_left_out_and_no_more_are_told_than_fit(hosts, until):
    spans = ["2:4"] * (MAX_RTTS + 1)
    async with hosts.host("0:2") as first, hosts.chain(*spans) as following:
        seen = first.gossip.snapshot
        await until(lambda: len(seen().announcements) == len(spans) + 1)
        hosts.network.cut(following[0].peer)
        successors = Successors(first.endpoint, seen)
        likely = [one for one in seen().announcements if one.peer != first.peer]
        for _ in range(4):  # some new ones each time
            await successors._measure(likely)
        assert len(successors.rtts) == MAX_RTTS
        assert following[0].peer[:8] not in {rtt.peer for rtt in successors.rtts}


async def test_nothing_is_measured_before_the_server_is_online(hosts, until):
    async with hosts.host("2:4") as other, hosts.endpoint() as endpoint:
        contacts = Contacts([other.address])
        gossip = Gossip(endpoint, Directory(endpoint.config), contacts, rng=random.Random(0))
        await gossip.join()
        successors = Successors(endpoint, gossip.snapshot)
        with anyio.move_on_after(0.1):
            await successors.run()
        assert successors.bytes_per_s is None
