"""A Redis that keeps a directory may be away, start again with nothing, or hold anything, and is believed nothing."""

from contextlib import asynccontextmanager
from dataclasses import replace

import anyio
import msgspec
import pytest

from corolla.errors import BootstrapFailed, ConfigError, UsageError
from corolla.swarm import Identity, SwarmConfig
from corolla.swarm.directory.redis_store import RedisStore
from corolla.swarm.directory.stamps import accuse, sign

from ..conftest import Member, claim, watcher
from .conftest import QUICK

pytestmark = pytest.mark.anyio
DEADLINE_S = 20


@asynccontextmanager
async def members(net, config, count):
    """Have some servers in a swarm."""
    found = [Member(net.endpoint(config), (), seed=number) for number in range(count)]
    with anyio.fail_after(4 * DEADLINE_S):
        async with anyio.create_task_group() as tasks:
            for member in found:
                tasks.start_soon(member.run, net.scheme)
                await member.ready.wait()
            yield found
            tasks.cancel_scope.cancel()


async def until_all_see(found, peers=None):
    """Wait until each member sees these peers; ``None`` for only itself."""
    with anyio.fail_after(DEADLINE_S):
        for member in found:
            while member.seen().keys() != (peers or {member.endpoint.peer_id}):
                with anyio.move_on_after(0.05):
                    await member.gossip.view.changed.wait()


def ids(found):
    return {member.endpoint.peer_id for member in found}


async def test_a_store_that_is_not_there_is_named_without_its_password(memory_net):
    config = replace(QUICK, directory="redis://zoe:secret@127.0.0.1:9/0")
    async with memory_net.endpoint(config) as endpoint:
        for attempt in (Member(endpoint, (), seed=0).gossip.join, watcher(endpoint, ()).run):
            with pytest.raises(BootstrapFailed, match=r"127\.0\.0\.1:9") as failure:
                await attempt()
            assert "secret" not in str(failure.value)


@pytest.mark.parametrize("url", ["redis:", "http://here:1", "127.0.0.1:6379"])
def test_what_is_no_store_is_refused(url):
    with pytest.raises(ConfigError, match="redis://host:port"):
        RedisStore(url, "public", SwarmConfig())


async def test_a_swarm_comes_together_again_when_its_store_starts_with_nothing(memory_net, own_redis, caplog):
    async with members(memory_net, replace(QUICK, directory=own_redis.url()), 3) as found:
        await until_all_see(found, ids(found))
        own_redis.stop()
        await until_all_see(found)
        own_redis.start()
        await until_all_see(found, ids(found))
    assert "trying again" in caplog.text


async def test_swarms_in_one_store_do_not_see_each_other(memory_net, redis):
    config = replace(QUICK, directory=redis.url())
    async with members(memory_net, config, 1) as found:
        private = RedisStore(config.directory, Identity.generate().peer_id, config)
        assert list((await private.read()).records) == []
        await private.aclose()
        await until_all_see(found, ids(found))


async def test_whatever_is_in_a_store_is_judged_like_what_peers_say(memory_net, redis):
    config = replace(QUICK, directory=redis.url())
    async with members(memory_net, config, 2) as found:
        await until_all_see(found, ids(found))
        store = RedisStore(config.directory, "public", config)
        client = store._redis
        victim, thief = found[0].endpoint, Identity.generate()
        newer = claim(victim, sequence=found[0].directory.sequence_of(victim.peer_id) + 10**5, free_tokens=666)
        forged = msgspec.structs.replace(sign(newer, victim.identity, None), signature=bytes(64))
        other = msgspec.structs.replace(newer, peer=thief.peer_id)
        await store.put(victim.peer_id, forged)
        await store.put(victim.peer_id, msgspec.structs.replace(sign(other, thief, None), body=bytes(4096)))
        await store.accuse(accuse(victim.peer_id, 7, thief))
        for value in (b"", b"\xc1", bytes(1 << 20)):
            await client.set("corolla:{public}:" + thief.peer_id, value)
            await client.zadd("corolla:{public}:peers", {thief.peer_id: 10**15})
            await client.xadd("corolla:{public}:news", {b"record": value, b"suspicion": value})
        async with memory_net.endpoint(config) as endpoint, anyio.create_task_group() as tasks:
            late = watcher(endpoint, ())
            tasks.start_soon(late.run)
            seen = await late.wait_for(lambda seen: len(seen.announcements) == 2, DEADLINE_S)
            assert all(server.free_tokens != 666 for server in seen.announcements)
            tasks.cancel_scope.cancel()
        await until_all_see(found, ids(found))
        assert found[1].directory.dropped.keys() >= {"forged", "malformed"}
        assert found[1].directory.doubts["groundless"] >= 1
        await store.aclose()


async def test_a_server_whose_peers_gossip_is_told_of_the_store(tls_net, redis):
    kept = replace(QUICK, directory=redis.url())
    async with members(tls_net, kept, 1) as found, tls_net.endpoint(QUICK) as endpoint:
        with pytest.raises(UsageError, match="--directory"):
            await Member(endpoint, found[0].endpoint.addresses, seed=1).gossip.join()
