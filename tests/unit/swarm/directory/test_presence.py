"""Peers learn of each other's joining, changing, leaving and dying, and a watcher sees it all, whatever keeps it."""

import contextlib
import logging

import anyio
import msgspec
import pytest

from corolla.errors import BootstrapFailed, SwarmError
from corolla.swarm import Contacts

from ..conftest import Member, claim, watcher
from .conftest import QUICK

pytestmark = pytest.mark.anyio
DEADLINE_S = 15


class Swarm:
    """A few members that run until the test ends."""

    def __init__(self, net, tasks, config):
        self.net = net
        self.tasks = tasks
        self.config = config
        self.members = []

    async def add(self, *, serves=True):
        bootstrap = self.members[0].endpoint.addresses if self.members else ()
        member = Member(self.net.endpoint(self.config), bootstrap, seed=len(self.members), serves=serves)
        self.members.append(member)
        self.tasks.start_soon(member.run, self.net.scheme)
        await member.ready.wait()
        return member

    async def kill(self, member):
        self.net.memory.cut(member.endpoint.peer_id)
        member.scope.cancel()


@contextlib.asynccontextmanager
async def swarm_of(net, config=QUICK):
    with anyio.fail_after(4 * DEADLINE_S):
        async with anyio.create_task_group() as tasks:
            yield Swarm(net, tasks, config)
            tasks.cancel_scope.cancel()


@contextlib.asynccontextmanager
async def watching(net, bootstrap, config=QUICK):
    async with net.endpoint(config) as endpoint, anyio.create_task_group() as tasks:
        found = watcher(endpoint, bootstrap)
        tasks.start_soon(found.run)
        yield found
        tasks.cancel_scope.cancel()


async def until(member, predicate):
    """Wait until a member's view is as it should be, looking whenever its directory changes."""
    with anyio.fail_after(DEADLINE_S):
        while not predicate(member.seen()):
            with anyio.move_on_after(0.05):
                await member.gossip.view.changed.wait()


def peers(*members):
    return {member.endpoint.peer_id for member in members}


async def test_peers_that_know_one_of_the_swarm_get_to_know_all(net, kept):
    async with swarm_of(net, kept) as swarm:
        members = [await swarm.add() for _ in range(3)]
        for member in members:
            await until(member, lambda seen: seen.keys() == peers(*members))


async def test_a_peer_that_serves_nothing_helps_others_to_meet(net, kept):
    async with swarm_of(net, kept) as swarm:
        rendezvous = await swarm.add(serves=False)
        members = [await swarm.add() for _ in range(2)]
        for member in (rendezvous, *members):
            await until(member, lambda seen: seen.keys() == peers(*members))


async def test_a_change_reaches_all(memory_net, kept):
    async with swarm_of(memory_net, kept) as swarm:
        members = [await swarm.add() for _ in range(3)]
        for member in members:
            await until(member, lambda seen: seen.keys() == peers(*members))
        changed = members[2].endpoint
        await members[2].gossip.announce(claim(changed, ttl_s=1.0, free_tokens=77))
        for member in members:
            await until(member, lambda seen: seen[changed.peer_id].free_tokens == 77)


async def test_a_leaver_is_gone_at_once_and_a_dead_one_within_its_ttl(memory_net, kept):
    async with swarm_of(memory_net, kept) as swarm:
        members = [await swarm.add() for _ in range(4)]
        async with watching(swarm.net, members[0].endpoint.addresses, kept) as client:
            await client.wait_for(lambda seen: len(seen.announcements) == 4, DEADLINE_S)
            await members[3].gossip.leave()
            state = {found.peer: found.state for found in members[0].seen().values()}
            assert state[members[3].endpoint.peer_id] == "draining"
            await client.wait_for(lambda seen: len(seen.announcements) == 3, DEADLINE_S)
            await swarm.kill(members[2])
            seen = await client.wait_for(lambda seen: len(seen.announcements) == 2, 20 + DEADLINE_S)
            assert {found.peer for found in seen.announcements} == peers(*members[:2])


async def test_a_watcher_that_loses_its_peer_follows_another(memory_net, kept):
    async with swarm_of(memory_net, kept) as swarm:
        members = [await swarm.add() for _ in range(3)]
        async with watching(swarm.net, members[0].endpoint.addresses, kept) as client:
            await client.wait_for(lambda seen: len(seen.announcements) == 3, DEADLINE_S)
            await swarm.kill(members[0])
            await members[2].gossip.announce(claim(members[2].endpoint, free_tokens=5))
            await client.wait_for(lambda seen: any(found.free_tokens == 5 for found in seen.announcements), DEADLINE_S)
            assert client.age_s < QUICK.lost_after_s


async def test_peers_that_were_apart_reconcile(memory_net, kept):
    async with swarm_of(memory_net, kept) as swarm:
        members = [await swarm.add() for _ in range(2)]
        await until(members[0], lambda seen: seen.keys() == peers(*members))
        swarm.net.memory.cut(members[1].endpoint.peer_id)
        await members[1].gossip.announce(claim(members[1].endpoint, free_tokens=9))
        swarm.net.memory.mend(members[1].endpoint.peer_id)
        await until(members[0], lambda seen: seen[members[1].endpoint.peer_id].free_tokens == 9)


async def test_a_peer_that_is_overtaken_under_its_own_name_speaks_up(memory_net, kept, caplog):
    async with swarm_of(memory_net, kept) as swarm:
        members = [await swarm.add() for _ in range(2)]
        victim = members[1].endpoint
        before = members[1].directory.sequence_of(victim.peer_id)
        old = claim(victim, sequence=before + 10**9, span=(4, 8))
        record = members[1].directory.announce(old, victim.identity, anyio.current_time())
        members[0].directory.merge(record, anyio.current_time())
        members[1].gossip._voice._said = claim(victim, sequence=before)  # it does not know what was said in its name
        with caplog.at_level(logging.WARNING):
            await until(members[0], lambda seen: victim.peer_id in seen and str(seen[victim.peer_id].span) == "0:4")
        assert "identity file" in caplog.text


async def test_joining_a_swarm_that_is_not_there_fails_by_name(net):
    async with net.endpoint(QUICK) as endpoint:
        nowhere = f"{net.scheme}://127.0.0.1:9"
        member = Member(endpoint, [nowhere], seed=0)
        with pytest.raises(BootstrapFailed, match=nowhere):
            await member.gossip.join()


async def test_a_watcher_without_anyone_to_watch_fails_by_name(memory_net):
    async with memory_net.endpoint(QUICK) as endpoint:
        with pytest.raises(BootstrapFailed, match="memory://nowhere:1"):
            await watcher(endpoint, ["memory://nowhere:1"]).run()
        with pytest.raises(BootstrapFailed, match="give the address"):
            await watcher(endpoint, []).run()


async def test_waiting_for_what_does_not_come_ends(memory_net, kept):
    async with swarm_of(memory_net, kept) as swarm:
        member = await swarm.add()
        async with watching(swarm.net, member.endpoint.addresses, kept) as client:
            with pytest.raises(SwarmError, match="1 server"):
                await client.wait_for(lambda seen: len(seen.announcements) > 1, 0.5)


async def test_remembered_peers_open_the_swarm_again(memory_net, tmp_path):
    async with swarm_of(memory_net) as swarm:
        member = await swarm.add()
        path = tmp_path / "peers.json"
        contacts = Contacts(path=path)
        await contacts.remember([claim(member.endpoint)])
        again = Contacts(path=path)
        await again.load()
        assert [contact.peer for contact in again.all()] == [member.endpoint.peer_id]
        async with swarm.net.endpoint(QUICK) as endpoint:
            newcomer = Member(endpoint, (), seed=1)
            newcomer.gossip._contacts = again
            await newcomer.gossip.join()
            assert newcomer.seen().keys() == peers(member)


async def test_a_damaged_file_of_peers_costs_only_itself(tmp_path, caplog):
    for content in (b"{", b'[{"peer": "x", "addresses": []}]', b'[{"peer": null, "addresses": ["nonsense"]}]'):
        path = tmp_path / "peers.json"
        path.write_bytes(content)
        contacts = Contacts(["memory://here:1"], path=path)
        with caplog.at_level(logging.WARNING):
            await contacts.load()
        assert len(contacts.all()) == 1
        assert "peers.json" in caplog.text


async def test_announcements_travel_as_they_were_signed(memory_net, kept):
    async with swarm_of(memory_net, kept) as swarm:
        members = [await swarm.add() for _ in range(2)]
        await until(members[1], lambda seen: seen.keys() == peers(*members))
        here, there = (member.seen()[members[0].endpoint.peer_id] for member in members)
        assert msgspec.structs.replace(here, sequence=0) == msgspec.structs.replace(there, sequence=0)
