"""What is tried again, on whom, and how often, the errors decide."""

import pytest

from corolla.client.retry import try_chains
from corolla.errors import NoChain, PeerBusy, PeerLost, PeerMisbehaved, UsageError
from corolla.terms import Chain, Hop, PeerId, Span

pytestmark = pytest.mark.anyio

PEERS = [PeerId(letter * 52) for letter in "abcd"]


class ScriptedRouter:
    """Offers each peer once, and writes down who was blamed for what."""

    def __init__(self, peers=PEERS):
        self.left = list(peers)
        self.blamed = []

    async def find_chain(self):
        if not self.left:
            raise NoChain("no server for blocks 0:4")
        return Chain((Hop(peer=self.left.pop(0), span=Span(0, 4), addresses=()),))

    def blame(self, peer, error):
        self.blamed.append((peer, type(error)))


def failing(*errors):
    """An attempt that raises one error after another, then succeeds."""
    script = list(errors)

    async def attempt(chain):
        if script and (error := script.pop(0)):
            error.peer = chain.hops[0].peer
            raise error
        return chain.hops[0].peer

    return attempt


async def test_what_succeeds_at_once_blames_nobody():
    router = ScriptedRouter()
    assert await try_chains(router, failing(), attempts=4) == PEERS[0]
    assert router.blamed == []


async def test_a_peer_s_failure_is_tried_on_the_next_chain():
    router = ScriptedRouter()
    assert await try_chains(router, failing(PeerLost("gone"), PeerBusy("full")), attempts=4) == PEERS[2]
    assert router.blamed == [(PEERS[0], PeerLost), (PEERS[1], PeerBusy)]


async def test_the_caller_s_own_mistake_is_not_tried_again():
    router = ScriptedRouter()
    with pytest.raises(UsageError, match="^too long$"):
        await try_chains(router, failing(UsageError("too long")), attempts=4)
    assert router.blamed == []


async def test_failures_are_bounded_and_the_last_error_tells_them_all():
    router = ScriptedRouter()
    errors = PeerLost("gone"), PeerMisbehaved("lied"), PeerLost("gone too"), None
    with pytest.raises(
        PeerLost, match=r"^gone too; gave up after 3 failures, before: aaaaaaaa: gone; bbbbbbbb: lied$"
    ) as caught:
        await try_chains(router, failing(*errors), attempts=3)
    assert caught.value.peer == PEERS[2]
    assert len(router.blamed) == 3


async def test_that_peers_are_busy_is_no_failure_however_many_there_are():
    router = ScriptedRouter()
    errors = PeerBusy("full"), PeerBusy("full"), PeerLost("gone"), None
    assert await try_chains(router, failing(*errors), attempts=2) == PEERS[3]


async def test_when_no_chain_is_left_the_error_says_what_was_tried():
    router = ScriptedRouter(PEERS[:1])
    with pytest.raises(NoChain, match="^no server for blocks 0:4; tried before: aaaaaaaa: gone$"):
        await try_chains(router, failing(PeerLost("gone")), attempts=4)


async def test_without_any_chain_there_is_nothing_to_add():
    with pytest.raises(NoChain, match="^no server for blocks 0:4$"):
        await try_chains(ScriptedRouter([]), failing(), attempts=4)
