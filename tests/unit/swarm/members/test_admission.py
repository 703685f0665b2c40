"""In a private swarm both sides of a stream check each other before a message is handled, whatever the transport."""

import contextlib
import random
from functools import partial

import anyio
import pytest

from corolla.errors import FrameTooLarge, NotAMember, PeerLost, PeerStranger, PeerTimeout, RemoteProtocolError
from corolla.swarm import (
    Channel,
    Contacts,
    Directory,
    Gossip,
    Identity,
    Invite,
    Membership,
    Revocations,
    SwarmConfig,
    spread_revocations,
)
from corolla.swarm.members.admission import MAX_GREETING_BYTES
from corolla.terms import Snapshot
from corolla.wire import Greeting, Ping, Pong, Subscribe

from ..conftest import claim

pytestmark = pytest.mark.anyio
DEADLINE_S = 20
KEY = Identity.generate()
INVITE = Invite.issue(KEY)


def private(invite=INVITE, **settings):
    return SwarmConfig(invite=invite.line, **settings)


class Answering:
    """A handler that answers pings and counts what it was asked."""

    def __init__(self):
        self.asked = 0
        self.grants = []

    async def __call__(self, channel):
        self.grants.append(channel.grant)
        async for _ in channel:
            self.asked += 1
            await channel.send(Pong())


async def ping(client, server):
    async with client.channel(server.peer_id, server.addresses) as channel:
        await channel.request(Ping(), expected=Pong, deadline_s=DEADLINE_S)
        return channel.grant


@contextlib.asynccontextmanager
async def stranger(net, server):
    """Have a channel whose opener does not greet."""
    channel = Channel(await net.dial(server.peer_id, server.addresses[0]))
    try:
        yield channel
    finally:
        await channel.aclose()


@contextlib.asynccontextmanager
async def standing(net):
    """Have a private server, which in the end serves its members as if nothing was."""
    async with net.serving(Answering(), private()) as server:
        yield server
        async with net.endpoint(private()) as client:  # whatever happened, members are served
            await ping(client, server)


async def test_members_are_answered_and_each_side_knows_what_the_other_may_do(net):
    guest = Invite.issue(KEY, allows="use")
    async with net.serving(handler := Answering(), private()) as server, net.endpoint(private(guest)) as client:
        for _ in range(2):
            assert await ping(client, server) == INVITE.grant
        assert handler.grants == [guest.grant]  # greeted once, and kept for the next time
        assert handler.asked == 2


async def test_a_stranger_is_turned_away_before_it_is_heard(net):
    async with net.serving(handler := Answering(), private()) as server, net.endpoint() as client:
        with pytest.raises(NotAMember, match="of a private swarm.*--invite") as caught:
            await ping(client, server)
        assert caught.value.peer == server.peer_id
        assert handler.grants == []


async def test_a_guest_of_another_swarm_is_turned_away(net):
    async with standing(net) as server, net.endpoint(private(Invite.issue(Identity.generate()))) as client:
        with pytest.raises(NotAMember, match="its invite is for another swarm; ask the swarm's owner"):
            await ping(client, server)


async def test_an_expired_invite_is_turned_away_by_whose_clock_is_right(net):
    async with standing(net) as server, net.endpoint(private()) as client:
        client.membership = Membership(Invite.issue(KEY, expires_s=1_700_000_000), client.peer_id, now=lambda: 0.0)
        with pytest.raises(NotAMember, match="expired on 2023-11-14"):
            await ping(client, server)


async def test_a_member_leaves_whoever_is_none(net):
    async def pretend(channel):
        async for _ in channel:
            await channel.send(Greeting(proof=Membership(INVITE, Identity.generate().peer_id).proof))

    async with net.serving(pretend) as server, net.endpoint(private()) as client:
        with pytest.raises(PeerStranger, match="its proof of membership is forged"):
            await ping(client, server)


async def test_a_member_is_told_that_a_swarm_is_public(net):
    async with net.endpoint() as outside, net.endpoint(private()) as client, anyio.create_task_group() as tasks:
        gossip = Gossip(outside, Directory(), Contacts(), rng=None)

        async def answer(channel):
            async for received in channel:
                await gossip.handle(channel, received.message)

        await outside.listen(net.scheme, "127.0.0.1", 0)
        tasks.start_soon(outside.serve, answer)
        with pytest.raises(NotAMember, match="is of a public swarm; to join it, leave your invite out"):
            await ping(client, outside)
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize("proof", [b"", b"\xff" * 512, b"\x92\xc0\xc0"])
async def test_a_malformed_proof_is_turned_away(net, proof):
    async with standing(net) as server, stranger(net, server) as channel:
        with pytest.raises(NotAMember, match="showed"):
            await channel.request(Greeting(proof=proof), expected=Greeting, deadline_s=DEADLINE_S)


@pytest.mark.parametrize(
    ("greeting", "payload"),
    [(Subscribe(), [bytes(MAX_GREETING_BYTES)]), (Greeting(proof=b"", revoked=b"x" * (1 << 17)), [bytes(1024)])],
)
async def test_a_stranger_may_not_say_much(net, greeting, payload):
    async with standing(net) as server, stranger(net, server) as channel:
        with pytest.raises(FrameTooLarge, match="a stranger announced"):
            await channel.request(greeting, payload, expected=Greeting, deadline_s=DEADLINE_S)


async def test_a_forged_list_of_revoked_invites_costs_its_bearer_the_stream(net):
    async with standing(net) as server, stranger(net, server) as channel:
        forged = Revocations.issue(Identity.generate(), 9, {INVITE.grant.invite: None}).encode()
        with pytest.raises(RemoteProtocolError, match="not signed"):
            await channel.request(Greeting(proof=b"", number=9, revoked=forged), expected=Greeting)
        assert server.membership.number == -1


async def test_a_silent_stranger_is_left(net):
    async with net.serving(Answering(), private(handshake_s=0.3)) as server, stranger(net, server) as channel:
        with pytest.raises(PeerTimeout):
            raise (await channel.receive(deadline_s=DEADLINE_S)).message.error(server.peer_id)


async def test_the_newer_list_of_revoked_invites_passes_either_way(net):
    other = Invite.issue(KEY)
    lists = [Revocations.issue(KEY, number, {other.grant.invite: None}).encode() for number in (1, 2)]
    async with net.serving(Answering(), private()) as server, net.endpoint(private()) as client:
        server.membership.hear(lists[0])
        await ping(client, server)
        assert client.membership.number == 1
        client.membership.hear(lists[1])
        await client.greet(server.peer_id, server.addresses)
        assert server.membership.number == 2


async def test_a_revoked_guest_hears_so_from_whoever_turns_it_away_and_ends(net):
    revoked = Revocations.issue(KEY, 1, {(guest := Invite.issue(KEY)).grant.invite: None}).encode()
    async with standing(net) as server, net.endpoint(private(guest)) as client:
        server.membership.hear(revoked)
        with pytest.raises(NotAMember, match="not a member of swarm .* any more: invite .* was revoked"):
            await ping(client, server)
        assert client.membership.number == 1
        with pytest.raises(NotAMember, match="was revoked"):
            await spread_revocations(client, lambda: Snapshot(announcements=()), rng=random.Random(0))


async def test_news_of_a_revoked_invite_goes_round(net):
    async with contextlib.AsyncExitStack() as stack:
        peers = [await stack.enter_async_context(net.serving(Answering(), private(greet_s=0.2))) for _ in range(6)]
        snapshot = Snapshot(announcements=tuple(claim(peer) for peer in peers))
        tasks = await stack.enter_async_context(anyio.create_task_group())
        for seed, peer in enumerate(peers):
            tasks.start_soon(partial(spread_revocations, peer, lambda: snapshot, rng=random.Random(seed)))
        peers[0].membership.hear(Revocations.issue(KEY, 1, {}).encode())
        with anyio.fail_after(DEADLINE_S):
            for peer in peers:
                while peer.membership.number < 1:
                    await peer.membership.changed.wait()
        tasks.cancel_scope.cancel()


async def test_a_revoked_guest_is_turned_away_by_a_server_that_hears_of_it_from_the_same_stream(net):
    revoked = Revocations.issue(KEY, 1, {(guest := Invite.issue(KEY)).grant.invite: None}).encode()
    async with standing(net) as server, net.endpoint(private(guest)) as client:
        await ping(client, server)
        client.membership.hear(revoked)
        with pytest.raises(NotAMember, match="was revoked"):
            await client.greet(server.peer_id, server.addresses)


@pytest.mark.parametrize("side", ["server", "client"])
async def test_streams_that_are_open_end_when_the_invite_of_either_side_is_revoked(net, side):
    guest = Invite.issue(KEY)
    invites = (guest, INVITE) if side == "client" else (INVITE, guest)
    async with net.serving(Answering(), private(invites[0])) as server, net.endpoint(private(invites[1])) as client:
        async with client.channel(server.peer_id, server.addresses) as channel:
            await channel.request(Ping(), expected=Pong, deadline_s=DEADLINE_S)
            judge = client if side == "client" else server
            judge.membership.hear(Revocations.issue(KEY, 1, {guest.grant.invite: None}).encode())
            if side == "client":
                with pytest.raises(PeerLost):
                    await channel.receive(deadline_s=DEADLINE_S)
            else:
                last = (await channel.receive(deadline_s=DEADLINE_S)).message.error(server.peer_id)
                assert isinstance(last, NotAMember)
                assert "ended the stream: invite" in last.message
        with pytest.raises((NotAMember, PeerStranger), match="revoked"):
            await ping(client, server)
