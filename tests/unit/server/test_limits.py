"""What one peer may have of a server: everything while it is alone, its share in company."""

# N packed tokens

from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

import pytest
import torch

from corolla.codec import encode
from corolla.errors import PeerBusy
from corolla.server.limits import PeerLimits
from corolla.terms import Span
from corolla.wire import OpenSession, Output, SessionOpened, Step

pytestmark = pytest.mark.anyio


def opening(max_tokens):
    return OpenSession(model="ab" * 32, span=Span(0, 4), rows=1, max_tokens=max_tokens, codec="raw")


def step(tokens=3, start=0, number=1):
    encoded = encode(torch.ones(tokens, 64), "raw")
    return Step(starts=(start,), counts=(tokens,), hidden=encoded.meta, number=number), encoded.buffers


async def ask(channel, message, payload=(), expected=Output):
    return await channel.request(message, payload, expected=expected, deadline_s=10.0)


@asynccontextmanager
async def guests(host, hosts):
    """Have peers that open sessions, each of which stands until the end or until :meth:`leave`."""
    async with hosts.endpoint() as first, hosts.endpoint() as second, AsyncExitStack() as stack:

        async def another(endpoint, **changes):
            channel = await stack.enter_async_context(endpoint.channel(host.peer, host.endpoint.addresses))
            stack.push_async_callback(channel.aclose)
            await ask(channel, opening(**changes), expected=SessionOpened)
            return channel

        yield partial(another, first), partial(another, second)


async def test_in_company_a_peer_has_so_many_sessions_and_no_more(hosts):
    async with hosts.host(pages=8) as host, guests(host, hosts) as (mine, theirs):
        host.handler._limits = PeerLimits(sessions=2, kv_share=0.5)
        await theirs(max_tokens=64)
        await mine(max_tokens=64 * 3)
        with pytest.raises(PeerBusy, match="hold 192 KV tokens here, and 128 more would be over 50% of the 512"):
            await mine(max_tokens=128)
        await mine(max_tokens=64)
        with pytest.raises(PeerBusy, match="2 sessions of yours are open here, which is the limit for one peer while"):
            await mine(max_tokens=64)
        await theirs(max_tokens=128)  # others have room


async def test_a_peer_that_is_alone_has_everything_and_yields_to_who_comes(hosts, until, monkeypatch):
    """A gateway is one peer for many people; its session that was silent for longest is replayed when it goes on."""
    async with hosts.host(pages=8) as host, guests(host, hosts) as (mine, theirs):
        host.handler._limits = PeerLimits(sessions=9, kv_share=0.5)
        monkeypatch.setattr("corolla.server.limits._SILENT_S", 3600.0)
        channels = [await mine(max_tokens=64 * 2) for _ in range(4)]
        with pytest.raises(PeerBusy):  # they spoke just now
            await theirs(max_tokens=64)
        monkeypatch.setattr("corolla.server.limits._SILENT_S", 0.0)
        await ask(channels[0], *step(), expected=Output)
        await theirs(max_tokens=64)
        said = (await channels[1].receive(deadline_s=5)).message
        assert said.code == "session_expired"
        assert "s of silence, the session's room was needed by another peer" in said.message
        await until(lambda: host.engine.load.sessions == 4)
        await theirs(max_tokens=64)  # fits beside it
        with pytest.raises(PeerBusy):
            await mine(max_tokens=64)
        await theirs(max_tokens=64)
        assert (await channels[2].receive(deadline_s=5)).message.code == "session_expired"
        await theirs(max_tokens=64)
        with pytest.raises(PeerBusy):  # what is left is the first one's share
            await theirs(max_tokens=64)
        await ask(channels[0], *step(start=2, number=2), expected=Output)
        host.engine.check_integrity()


async def test_a_single_session_may_have_all_there_is(hosts):
    async with hosts.host(pages=4) as host, hosts.channel(host) as channel:
        await ask(channel, opening(max_tokens=256), expected=SessionOpened)
        await channel.aclose()
