"""Letting each other in: how the two sides of a new stream in a private swarm show and check their membership.

The one place where that is done, whatever the transport. The opener shows its proof first, so that a stranger who only
knocks learns nothing but that the swarm is private; no message of either side is handled before both are checked.
"""

from typing import Final

from corolla.errors import NotAMember
from corolla.swarm.channel import Channel
from corolla.swarm.members.invite import Grant
from corolla.swarm.members.membership import Membership
from corolla.terms import PeerId
from corolla.wire import Greeting
from corolla.wire.limits import MAX_PROOF_BYTES, MAX_REVOKED_BYTES

__all__ = ["MAX_GREETING_BYTES", "admit", "check_may_use", "enter"]

MAX_GREETING_BYTES: Final = MAX_PROOF_BYTES + MAX_REVOKED_BYTES + 128
"""All that is read of a frame before its sender has proved to be a member."""


async def enter(channel: Channel, membership: Membership, *, deadline_s: float) -> None:
    """Show membership on a stream that this side has opened, and check the other side's.

    Args:
        channel: A new one.
        membership: This side's.
        deadline_s: How long each answer may take, in seconds.

    Raises:
        NotAMember: If the other side turns this one away; says why.
        PeerStranger: If the other side is no member.
        PeerError: If it does not answer.
        WireError: If its answer is none.
    """
    channel.expect_at_most(MAX_GREETING_BYTES)
    answer = (await channel.request(_greeting(membership), expected=Greeting, deadline_s=deadline_s)).message
    if answer.revoked is not None:
        membership.hear(answer.revoked)
        membership.check_own()
    elif answer.number < membership.number:
        news = _greeting(membership, to=answer)
        await channel.request(news, expected=Greeting, deadline_s=deadline_s)
    channel.admit(membership.require(channel.peer, answer.proof))


async def admit(channel: Channel, membership: Membership, own: PeerId, *, deadline_s: float) -> None:
    """Check the membership of whoever opened a stream, and show this side's.

    Args:
        channel: A new one.
        membership: This side's.
        own: This side's peer id.
        deadline_s: How long each of the other side's messages may take, in seconds.

    Raises:
        NotAMember: If it is no member; for the other side to hear.
        PeerError: If it does not say anything.
        WireError: If what it says is none of the protocol.
    """
    channel.expect_at_most(MAX_GREETING_BYTES)
    greeting, grant = await _hear(channel, membership, own, deadline_s)
    has_news = greeting.number > membership.number
    await channel.send(_greeting(membership, to=greeting), deadline_s=deadline_s)
    if has_news:
        greeting, grant = await _hear(channel, membership, own, deadline_s)
        await channel.send(_greeting(membership, to=greeting), deadline_s=deadline_s)
    channel.admit(grant)


def check_may_use(channel: Channel) -> None:
    """Check that whoever opened a stream may have this server compute.

    Raises:
        NotAMember: If the swarm is private and its invite is for serving only.
    """
    if channel.grant is not None and not channel.grant.allows_use:
        raise NotAMember(
            f"invite {channel.grant.invite[:8]} allows serving and not using; ask the swarm's owner for one for both"
        )


def _greeting(membership: Membership, to: Greeting | None = None) -> Greeting:
    """Make this side's greeting, with the list of revoked invites if the other's greeting was older."""
    is_newer = to is not None and to.number < membership.number
    return Greeting(proof=membership.proof, number=membership.number, revoked=membership.revoked if is_newer else None)


async def _hear(channel: Channel, membership: Membership, own: PeerId, deadline_s: float) -> tuple[Greeting, Grant]:
    """Wait for the opener's greeting and judge it."""
    greeting = (await channel.receive(deadline_s=deadline_s)).message
    if not isinstance(greeting, Greeting):
        raise NotAMember(
            f"peer {own[:8]} is of a private swarm, which lets in only who has an invite of its owner; "
            "give yours with --invite"
        )
    if greeting.revoked is not None:
        membership.hear(greeting.revoked)
    grant = membership.judge(channel.peer, greeting.proof)
    if isinstance(grant, str):
        if membership.has_invited(channel.peer, greeting.proof) and greeting.number < membership.number:
            await channel.send(_greeting(membership, to=greeting), deadline_s=deadline_s)  # so that it hears why
        raise NotAMember(
            f"peer {own[:8]} is of a private swarm and turned peer {channel.peer[:8]} away: {grant}; "
            "ask the swarm's owner for another invite"
        )
    return greeting, grant
