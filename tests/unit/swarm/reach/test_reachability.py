"""A peer learns from others where it can be dialled, and others cannot be misused for it."""

import anyio
import pytest

from corolla.errors import PeerBusy, PeerFailed, PeerUnreachable
from corolla.swarm import Contact, LightConfig, LightPeer, RelayConfig, SwarmConfig
from corolla.swarm.reach.reachability import Answer, ask, judge
from corolla.wire import DialBack, DialedBack, Observe, Observed, Reserve, Reserved

from .reachable import client, hidden, relaying

pytestmark = pytest.mark.anyio
DEADLINE_S = 20


class Light:
    """A light peer at work."""

    def __init__(self, *peers, relay=False):
        config = LightConfig(host="127.0.0.1", port=0, peers=peers)
        self.peer = LightPeer(config, swarm=SwarmConfig(), relay=RelayConfig(enabled=relay), version="1")

    async def __aenter__(self):
        self.tasks = await anyio.create_task_group().__aenter__()
        joined = anyio.Event()

        async def watch(stage):
            if stage == "joined":
                joined.set()

        self.tasks.start_soon(self.peer.run, watch)
        with anyio.fail_after(DEADLINE_S):
            await joined.wait()
        return self.peer

    async def __aexit__(self, *_):
        self.peer.stop()
        await self.tasks.__aexit__(None, None, None)


def at(peer):
    return f"{peer.addresses[0]}/{peer.peer_id}"


async def test_two_peers_tell_each_other_that_they_can_be_dialled(until):
    async with Light() as first, Light(at(first)) as second:
        await until(lambda: (first.verdict, second.verdict) == ("unknown", "direct"))
        assert second.addresses[0].startswith("tls://127.0.0.1:")


async def test_a_relay_is_known_to_all_and_forgotten_when_it_leaves(until):
    async with Light() as first:
        async with Light(at(first), relay=True) as relay:
            await until(lambda: [offer.peer for offer in first.snapshot().relay_offers] == [relay.peer_id])
            assert first.snapshot().announcements == ()
            assert relay.relay_load == (0, 0, 0, 0, 0)
        await until(lambda: not first.snapshot().relay_offers)


async def test_a_peer_says_how_it_sees_another_and_dials_only_there():
    async with Light() as peer, client() as endpoint, endpoint.channel(peer.peer_id, peer.addresses) as channel:
        seen = (await channel.request(Observe(), expected=Observed, deadline_s=DEADLINE_S)).message
        assert (seen.host, seen.port) == channel.ends.here
        answer = (await channel.request(DialBack(port=1), expected=DialedBack, deadline_s=DEADLINE_S)).message
        assert answer.address == "tls://127.0.0.1:1"
        assert not answer.is_reached
        assert "failed" in answer.problem


async def test_another_peer_at_the_port_does_not_count():
    async with (
        Light() as asked,
        Light() as other,
        client() as endpoint,
        endpoint.channel(asked.peer_id, asked.addresses) as channel,
    ):
        port = int(other.addresses[0].rpartition(":")[2])
        answer = (await channel.request(DialBack(port=port), expected=DialedBack, deadline_s=DEADLINE_S)).message
        assert not answer.is_reached
        assert "found peer" in answer.problem


async def test_dialling_back_is_limited_per_host():
    async with Light() as asked, client() as endpoint:

        async def ask_once():
            async with endpoint.channel(asked.peer_id, asked.addresses) as channel:
                await channel.request(DialBack(port=1), expected=DialedBack, deadline_s=DEADLINE_S)

        for _ in range(30):
            await ask_once()
        with pytest.raises(PeerBusy, match="30 times in a minute"):
            await ask_once()


async def test_who_asks_through_a_relay_is_seen_nowhere():
    async with relaying() as relay, client() as endpoint, Light() as asked:

        async def answer(channel):
            async for received in channel:
                await asked._reach.handle(channel, received.message)

        async with (
            hidden([relay], answer) as server,
            endpoint.channel(server.peer, server.addresses) as channel,
        ):
            seen = (await channel.request(Observe(), expected=Observed, deadline_s=DEADLINE_S)).message
            assert (seen.host, seen.port) == ("", 0)
            with pytest.raises(PeerUnreachable, match="ask without one"):
                await channel.request(DialBack(port=1), expected=DialedBack, deadline_s=DEADLINE_S)


async def test_a_peer_that_is_no_relay_says_so():
    async with Light() as peer, client() as endpoint, endpoint.channel(peer.peer_id, peer.addresses) as channel:
        with pytest.raises(PeerFailed, match="no relay"):
            await channel.request(Reserve(), expected=Reserved, deadline_s=DEADLINE_S)


async def test_asking_takes_what_the_other_side_found():
    async with Light() as asked, Light() as asker:
        port = int(asker.addresses[0].rpartition(":")[2])
        answer = await ask(asker._endpoint, Contact(asked.peer_id, asked.addresses), port)
        assert answer == Answer("127.0.0.1", True, "")


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([], ("unknown", [])),
        ([("8.8.8.8", True)], ("direct", ["8.8.8.8"])),
        ([("8.8.8.8", False)], ("hidden", [])),
        ([("192.168.1.2", True)], ("direct", ["192.168.1.2"])),
        ([("192.168.1.2", True), ("8.8.8.8", False)], ("hidden", ["192.168.1.2"])),
        ([("192.168.1.2", False), ("8.8.8.8", True)], ("direct", ["8.8.8.8"])),
        ([("8.8.8.8", True), ("8.8.8.8", False), ("8.8.8.8", False)], ("hidden", [])),
        ([("8.8.8.8", True), ("8.8.8.8", True), ("8.8.8.8", False)], ("direct", ["8.8.8.8"])),
        ([("192.168.1.2", True), ("8.8.8.8", True)], ("direct", ["8.8.8.8", "192.168.1.2"])),
    ],
)
def test_most_answers_count_and_those_from_afar_before_neighbours(answers, expected):
    assert judge([Answer(host, is_reached, "") for host, is_reached in answers]) == expected
