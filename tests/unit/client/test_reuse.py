"""Through a whole chain, a session gets what it would have got, though most of it was computed for another."""

# N packed tokens, D model width

import pytest
import torch

from corolla.client import Session, StepTokens, Target
from corolla.terms import ModelId, Span

pytestmark = pytest.mark.anyio

WIDTH = 64
SPANS = ("0:1", "1:3", "3:4")
COMMON, PROMPT = 192, 200
TOLERANCE = {"raw": 1e-4, "half": 4e-3}
"""As in tests/unit/client/test_survival.py: sums may be rounded otherwise, which a codec can make a step of its own."""


def states(count, seed):
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def prompt(seed):
    return torch.cat((states(COMMON, 0), states(PROMPT - COMMON, seed)))


class Chat:
    """A session of one row through all blocks."""

    def __init__(self, swarm, codec):
        self.session = Session(swarm, Target(ModelId("ab" * 32), Span(0, 4), codec), rows=1, max_tokens=250)

    async def say(self, hidden_ND, start):
        step = StepTokens(hidden_ND, (start,), (len(hidden_ND),))
        return (await self.session.step(step)).hidden_ND

    @property
    def found(self):
        return [timing.found_tokens for timing in self.session.timings]


async def talk(swarm, seed, codec):
    """A prompt and two tokens more, in a session of its own; what came, and what hops had computed before."""
    chat = Chat(swarm, codec)
    await chat.session.open()
    results = [await chat.say(prompt(seed), 0)]
    found = chat.found
    results += [await chat.say(states(1, 50 + place), PROMPT + place) for place in range(2)]
    await chat.session.close()
    return torch.cat(results), found


@pytest.mark.parametrize("codec", ["raw", "half"])
@pytest.mark.parametrize(("piece_tokens", "due"), [(512, 192), (64, 192), (70, 64 + 58 + 52)])
async def test_every_hop_of_a_chain_finds_what_it_has_computed(hosts, codec, piece_tokens, due):
    async with hosts.chain(*SPANS) as chain:
        async with hosts.swarm(piece_tokens=piece_tokens) as swarm:
            first, found = await talk(swarm, 1, codec)
            assert found == [0, 0, 0]
            second, found = await talk(swarm, 2, codec)
            assert found == [due] * 3  # whole pages of what is there when a piece comes
        async with hosts.swarm() as stranger:
            expected, found = await talk(stranger, 2, codec)
            assert found == [0, 0, 0]
        if due == COMMON:
            assert torch.equal(second[:COMMON], first[:COMMON])
        assert torch.allclose(second, expected, rtol=TOLERANCE[codec], atol=TOLERANCE[codec])
        for host in chain:
            host.engine.check_integrity()


@pytest.mark.parametrize("lost", range(3))
async def test_what_was_found_is_replayed_when_a_hop_is_lost(hosts, until, lost):
    async with hosts.chain(*SPANS) as chain, hosts.swarm() as swarm:
        expected, _ = await talk(swarm, 2, "raw")
        chat = Chat(swarm, "raw")
        await chat.session.open()
        results = [await chat.say(prompt(2), 0)]
        assert chat.found == [COMMON] * 3
        async with hosts.host(SPANS[lost]):
            await until(lambda: len(swarm.snapshot().announcements) == 4)
            await chain[lost].handler.drop_sessions()
            hosts.network.cut(chain[lost].peer)
            results += [await chat.say(states(1, 50 + place), PROMPT + place) for place in range(2)]
            assert [replay.tokens for replay in chat.session.replays] == [PROMPT]
            assert torch.allclose(torch.cat(results), expected, rtol=1e-4, atol=1e-4)
            await chat.session.close()
