"""Whom a client's calls go to: constraints, bans and probes, busy servers, and who gets measured."""

import time

import anyio
import pytest
import torch

from corolla.client import ClientConfig, Session, StepTokens, Target
from corolla.client.directory import ModelRouter
from corolla.errors import ConfigError, NoChain, PeerBusy, PeerLost
from corolla.routing import Demand
from corolla.terms import ModelId, Span
from corolla.wire import Failure, OpenSession

pytestmark = pytest.mark.anyio

MODEL = ModelId("ab" * 32)
DEMAND = Demand(model=MODEL, span=Span(0, 4))


def peers(chain):
    return [hop.peer for hop in chain.hops]


# Constraints


@pytest.mark.parametrize(
    ("config", "is_used"),
    [
        ({"allow_peers": "first"}, True),
        ({"allow_peers": "second"}, False),
        ({"avoid_peers": "first"}, False),
        ({"precision": "float32"}, True),
        ({"precision": "bfloat16"}, False),
        ({"trust": "all", "trusted_peers": "first"}, True),
        ({"trust": "all", "trusted_peers": "second"}, False),
        ({"trust": "ends", "trusted_peers": "first"}, True),
        ({"trust": "ends", "trusted_peers": "second"}, False),
    ],
)
async def test_only_servers_that_meet_all_constraints_are_used(hosts, until, config, is_used):
    async with hosts.host("0:4") as first, hosts.host("1:3") as second:
        by_name = {"first": (first.peer,), "second": (second.peer,)}
        config = {key: by_name.get(value, value) for key, value in config.items()}
        async with hosts.swarm(**config) as swarm:
            await until(lambda: first.peer in {one.peer for one in swarm.snapshot().announcements})
            if is_used:
                assert first.peer in peers(await swarm.find_chain(DEMAND))
            else:
                with pytest.raises(NoChain):
                    await swarm.find_chain(DEMAND, wait_s=0.05)


async def test_where_only_the_ends_need_trust_others_may_have_the_middle(hosts):
    async with hosts.host("0:1") as first, hosts.host("0:4") as stranger, hosts.host("3:4") as last:
        trusted = {"trust": "ends", "trusted_peers": (first.peer, last.peer)}
        async with hosts.swarm(**trusted) as swarm:
            chain = await swarm.find_chain(DEMAND)
            assert peers(chain) == [first.peer, stranger.peer, last.peer]
            assert [str(hop.span) for hop in chain.hops] == ["0:1", "1:3", "3:4"]
            with pytest.raises(NoChain, match="trust for ends"):
                await swarm.find_chain(Demand(model=MODEL, span=Span(0, 4), avoid=[first.peer]), wait_s=0.05)


def test_trust_needs_somebody_to_be_trusted():
    with pytest.raises(ConfigError, match="trusted_peers names nobody"):
        ClientConfig(trust="ends")
    with pytest.raises(ConfigError, match="must be one of any, ends, all"):
        ClientConfig(trust="everybody")
    with pytest.raises(ConfigError, match="trusted_peers has 'me'"):
        ClientConfig(trusted_peers=("me",))


# Bans and probes


async def test_after_a_ban_one_call_tries_the_server_and_the_others_wait_how_that_goes(hosts):
    async with hosts.chain("0:4", "0:2", "2:4") as (fast, left, right), hosts.swarm() as swarm:
        swarm._bans.ban(fast.peer, 1000.0, now_s=time.monotonic() - 1001.0)
        swarm._rng = None  # no dice: the best chain itself
        assert peers(await swarm.find_chain(DEMAND)) == [fast.peer]
        assert peers(await swarm.find_chain(DEMAND)) == [left.peer, right.peer]
        swarm.praise(fast.peer)
        assert peers(await swarm.find_chain(DEMAND)) == [fast.peer]


async def test_a_banned_server_is_used_if_there_is_no_other(hosts):
    async with hosts.host("0:4") as only, hosts.swarm() as swarm:
        swarm.blame(only.peer, PeerLost("gone"))
        assert peers(await swarm.find_chain(DEMAND)) == [only.peer]


# Busy servers


def busy_times(times, retry_after_s=0.1):
    """Answer so many times that there is no room."""
    left = [times]

    async def answer(channel, message):
        if isinstance(message, OpenSession):
            left[0] -= 1
            await channel.send(Failure.of(PeerBusy("no room", retry_after_s=retry_after_s)))

    return answer, left


async def test_a_busy_server_is_passed_over_for_another_and_not_banned(hosts):
    answer, left = busy_times(1, retry_after_s=60.0)
    async with hosts.host("0:4", answer=answer) as busy, hosts.host("0:4") as free, hosts.swarm() as swarm:
        router = ModelRouter(swarm, DEMAND)
        router.blame(busy.peer, PeerBusy("no room", retry_after_s=60.0))
        assert peers(await router.find_chain()) == [free.peer]
        assert swarm._bans.banned(0.0) == frozenset()


async def test_the_only_server_is_waited_for_until_it_has_room(hosts):
    """Petals defect F: the time to wait for room was never passed on, so that the option had no effect."""
    async with hosts.host("0:4", pages=2) as host, hosts.swarm(chain_s=5.0, attempts=1) as swarm:
        first, second = (Session(swarm, Target(MODEL, Span(0, 4), "raw"), rows=1, max_tokens=120) for _ in range(2))
        await first.open()
        async with anyio.create_task_group() as tasks:
            with anyio.fail_after(10):
                tasks.start_soon(second.open)
                await anyio.wait_all_tasks_blocked()
                assert second.chain is None
                await first.close()
                while second.chain is None:  # noqa: ASYNC110 - the session has no event for it
                    await anyio.sleep(0.01)
        assert swarm._bans.banned(0.0) == frozenset()
        assert host.engine.load.sessions == 1
        await second.close()


async def test_a_server_that_is_always_busy_is_given_up_in_time(hosts):
    answer, left = busy_times(0)
    async with hosts.host("0:4", answer=answer), hosts.swarm(chain_s=0.5, attempts=1) as swarm:
        session = Session(swarm, Target(MODEL, Span(0, 4), "raw"), rows=1, max_tokens=64)
        with anyio.fail_after(5), pytest.raises(NoChain, match="tried before: .*no room"):
            await session.open()
        assert 2 <= -left[0] <= 6  # asked again when it had said, until the time was over


async def test_a_server_that_says_to_come_back_at_once_is_not_asked_without_end(hosts):
    answer, left = busy_times(0, retry_after_s=0.0)
    async with hosts.host("0:4", answer=answer), hosts.swarm(chain_s=0.5, attempts=1) as swarm:
        session = Session(swarm, Target(MODEL, Span(0, 4), "raw"), rows=1, max_tokens=64)
        with anyio.fail_after(5), pytest.raises(NoChain, match="no room"):
            await session.open()
        assert -left[0] <= 11


# Measuring


async def test_every_candidate_for_the_first_hop_is_measured_and_new_ones_soon(hosts, until):
    """Petals defect D: it measured none of them."""
    async with hosts.chain("0:2", "0:4", "0:2", "2:4") as chain, hosts.swarm() as swarm:
        everybody = {host.peer for host in chain}
        await until(lambda: everybody <= set(swarm._pings.rtts_s))
        async with hosts.host("0:4") as newcomer:
            await until(lambda: newcomer.peer in swarm._pings.rtts_s)


async def test_what_a_session_takes_is_learned(hosts):
    async with hosts.chain("0:2", "2:4") as chain, hosts.swarm() as swarm:
        session = Session(swarm, Target(MODEL, Span(0, 4), "raw"), rows=1, max_tokens=64)
        await session.open()
        await session.step(StepTokens(torch.zeros(8, 64), (0,), (8,)))
        await session.step(StepTokens(torch.zeros(1, 64), (8,), (1,)))
        known = swarm._known()
        for host in chain:
            found = known[host.peer]
            assert found.prefill_block_s > 0
            assert found.decode_block_s > 0
            assert found.rtt_s > 0
        await session.close()
