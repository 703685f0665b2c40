"""How this machine looks to others, found out once by asking them: for a person who wants to know what is wrong.

Asks the questions that servers ask all the time, and one more: whether the router shows every peer the same port, which
decides whether peers behind two routers can meet.
"""

import ipaddress
import random
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from statistics import median
from typing import Final, Literal, NamedTuple

import anyio

from corolla.errors import ConfigError, Error
from corolla.swarm.address import split_address
from corolla.swarm.channel import Channel
from corolla.swarm.endpoint import Endpoint
from corolla.swarm.finding.contacts import Contact
from corolla.swarm.reach.reachability import Answer, Verdict, ask, find_askable, judge
from corolla.swarm.transports.tcp import connect_spot
from corolla.swarm.transports.tls import TlsTransport
from corolla.swarm.transports.transport import Spot
from corolla.wire import Observe, Observed

__all__ = ["Outlook", "Router", "look_out", "tell_router"]

_ASKED: Final = 3

Router = Literal["unknown", "none", "some", "friendly", "symmetric"]
"""What is between this machine and others: nobody could be asked; nothing; a router of which no more is known; one that
shows all peers the same port; one that shows each another port, so that peers behind two of them cannot meet."""


class Outlook(NamedTuple):
    """What others said.

    Args:
        asked: How many peers answered.
        hosts: At which IP addresses they see this machine.
        router: What is between.
        verdict: Whether they can dial this machine; unknown also if it does not listen.
        problem: Why not, in the words of one of them.
        ahead_s: By how much this machine's clock is ahead of theirs; ``None`` if nobody said.
    """

    asked: int
    hosts: tuple[str, ...]
    router: Router
    verdict: Verdict
    problem: str
    ahead_s: float | None


class _Seen(NamedTuple):
    """How one peer sees a connection."""

    here: Spot
    there: Spot
    ahead_s: float


async def look_out(endpoint: Endpoint, contacts: Sequence[Contact], port: int | None) -> Outlook:
    """Ask a few peers how this machine looks.

    Args:
        endpoint: How to reach them.
        contacts: Whom to ask.
        port: Where this endpoint listens and is served; ``None`` if it does not.
    """
    askable = find_askable(list(contacts), endpoint.addresses)
    chosen = random.sample(askable, min(_ASKED, len(askable)))
    seen = await _compare_ports(endpoint, chosen)
    answers: list[Answer] = []

    async def ask_one(contact: Contact) -> None:
        try:
            answers.append(await ask(endpoint, contact, port or 0))
        except Error:
            return

    if port is not None:
        async with anyio.create_task_group() as tasks:
            for contact in chosen:
                tasks.start_soon(ask_one, contact)
    verdict, _ = judge(answers)
    hosts = dict.fromkeys([one.there.host for one in seen] + [answer.host for answer in answers])
    return Outlook(
        asked=max(len(seen), len(answers)),
        hosts=tuple(hosts),
        router=tell_router(seen),
        verdict=verdict,
        problem=next((answer.problem for answer in answers if answer.problem), ""),
        ahead_s=median(one.ahead_s for one in seen) if seen else None,
    )


def tell_router(seen: Sequence[_Seen]) -> Router:
    """Make of how peers see connections from one port what is between this machine and them.

    Peers far away count before neighbours, who see this machine as it is whatever the router does.

    Args:
        seen: What each of them sees.
    """
    far = [one for one in seen if ipaddress.ip_address(one.there.host).is_global]
    seen = far or seen
    if not seen:
        return "unknown"
    if all(one.there.host == one.here.host for one in seen):
        return "none"
    same_port = [one for one in seen if one.here == seen[0].here]
    if len(same_port) < 2:
        return "some"
    return "friendly" if len({one.there for one in same_port}) == 1 else "symmetric"


async def _compare_ports(endpoint: Endpoint, contacts: Sequence[Contact]) -> list[_Seen]:
    """Ask each of some peers on connections that come from the same port of this machine, where that is possible."""
    tls = TlsTransport(endpoint.identity, endpoint.config)
    seen: list[_Seen] = []
    here: Spot | None = None
    async with AsyncExitStack() as stack:
        for contact in contacts:
            try:
                if here is not None:
                    await _dial_from(endpoint, tls, contact, here)
                channel = await stack.enter_async_context(endpoint.channel(contact.peer, contact.addresses))
                if channel.ends is None:
                    continue
                here = here or channel.ends.here
                seen.append(await _observe(channel, channel.ends.here, endpoint.config.request_s))
            except (Error, OSError, ValueError):
                continue
    return seen


async def _dial_from(endpoint: Endpoint, tls: TlsTransport, contact: Contact, here: Spot) -> None:
    """Have a connection to a peer at hand that comes from a port of this machine; without one, any other does."""
    for address in contact.addresses:
        try:
            place = split_address(address)
            with anyio.fail_after(endpoint.config.request_s):
                pipe = await connect_spot(Spot(place.host, place.port), endpoint.config, here=here)
                await endpoint.adopt(await tls.dial_over(pipe, contact.peer, address))
        except (ConfigError, OSError, TimeoutError):
            continue
        return


async def _observe(channel: Channel, here: Spot, limit_s: float) -> _Seen:
    began_s = time.time()
    said = (await channel.request(Observe(), expected=Observed, deadline_s=limit_s)).message
    ahead_s = (began_s + time.time()) / 2 - said.unix_s
    return _Seen(here, Spot(str(ipaddress.ip_address(said.host)), said.port), ahead_s)
