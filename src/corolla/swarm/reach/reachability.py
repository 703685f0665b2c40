"""Finding out whether this peer can be dialled, by asking others to do so; and doing it for others.

Each of a few peers says how it sees this one, and dials it there. Where most of them got through, that is this peer's
address. Where none did, it is behind a router, and is found through relays instead. A peer that is asked dials the host
that the question came from and no other, so nobody can be made to knock at a third one's door.
"""

import ipaddress
import logging
import random
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Literal, NamedTuple

import anyio
from anyio import to_thread

from corolla.errors import Error, PeerBusy, PeerUnreachable, RemoteProtocolError
from corolla.swarm.address import RELAY, format_address
from corolla.swarm.channel import Channel
from corolla.swarm.endpoint import Endpoint
from corolla.swarm.finding.contacts import Contact
from corolla.swarm.reach.relayed import RelayEar
from corolla.swarm.transports.tcp import find_local_hosts
from corolla.swarm.transports.tls import TlsListener, TlsTransport
from corolla.telemetry import event, logger
from corolla.terms import Address
from corolla.wire import DialBack, DialedBack, Observe, Observed

__all__ = ["Answer", "DialBacks", "Reachability", "Verdict", "ask", "find_askable", "judge", "observe"]

_LOG = logger(__name__)
_ASKED_AT_ONCE: Final = 3
_LOOK_S: Final = 5.0  # how often this machine's own addresses are looked at
_DIAL_S: Final = 4.0  # for dialling somebody back
_MAX_DIALS: Final = 8  # at once
_MAX_DIALS_PER_MINUTE: Final = 30  # of one host

Verdict = Literal["unknown", "direct", "hidden"]
"""Whether this peer can be dialled: nobody could be asked yet; yes; no."""


class Answer(NamedTuple):
    """What one peer found.

    Args:
        host: How it sees this peer.
        is_reached: Whether it could dial it there.
        problem: What went wrong if not.
    """

    host: str
    is_reached: bool
    problem: str


def observe(channel: Channel) -> Observed:
    """Say how the other side of a channel looks from here."""
    there = None if channel.ends is None else channel.ends.there
    now_s = time.time()
    return Observed(unix_s=now_s) if there is None else Observed(host=there.host, port=there.port, unix_s=now_s)


class DialBacks:
    """Dials peers that want to know whether they can be dialled.

    Args:
        tls: How.
    """

    def __init__(self, tls: TlsTransport) -> None:
        self._tls = tls
        self._dialling = 0
        self._dialled: deque[tuple[float, str]] = deque()  # in the last minute: when, and which host

    async def answer(self, channel: Channel, message: DialBack) -> None:
        """Dial the other side of a channel where the channel comes from, and say whether that went well.

        Raises:
            PeerBusy: If others are being dialled, or it was dialled often.
            PeerUnreachable: If the channel goes through a relay, so that it comes from nowhere.
            Error: If the answer cannot be sent.
        """
        if channel.ends is None:
            raise PeerUnreachable("who asks through a relay cannot be dialled back; ask without one")
        host = channel.ends.there.host
        self._check_room(host)
        address = format_address(self._tls.scheme, host, message.port)
        problem = f"{address}: no answer within {_DIAL_S:g} s"
        is_reached = False
        self._dialling += 1
        try:
            with anyio.move_on_after(_DIAL_S):
                stream = await self._tls.dial(channel.peer, address)
                await stream.aclose()
                is_reached, problem = True, ""
        except PeerUnreachable as error:
            problem = error.message
        finally:
            self._dialling -= 1
        await channel.send(DialedBack(address=address, is_reached=is_reached, problem=problem[:4096]))

    def _check_room(self, host: str) -> None:
        now_s = anyio.current_time()
        while self._dialled and self._dialled[0][0] < now_s - 60:
            self._dialled.popleft()
        count = sum(dialled == host for _, dialled in self._dialled)
        if self._dialling >= _MAX_DIALS or count >= _MAX_DIALS_PER_MINUTE:
            raise PeerBusy(
                f"{self._dialling} peers are being dialled, and {host} was {count} times in a minute",
                retry_after_s=30.0,
            )
        self._dialled.append((now_s, host))


async def ask(endpoint: Endpoint, contact: Contact, port: int) -> Answer:
    """Ask a peer to dial this one back.

    Args:
        endpoint: How to reach it.
        contact: Whom.
        port: Where this peer listens.

    Raises:
        RemoteProtocolError: If it answers with something that is no IP address.
        Error: If it cannot be asked.
    """
    limit_s = endpoint.config.request_s
    async with endpoint.channel(contact.peer, contact.addresses) as channel:
        seen = (await channel.request(Observe(), expected=Observed, deadline_s=limit_s)).message
        answer = (await channel.request(DialBack(port=port), expected=DialedBack, deadline_s=_DIAL_S + limit_s)).message
    try:
        ipaddress.ip_address(seen.host)
    except ValueError as error:
        raise RemoteProtocolError(f"peer {channel.peer[:8]} sees this one at {seen.host!r}") from error
    return Answer(seen.host, answer.is_reached, answer.problem)


def judge(answers: Sequence[Answer]) -> tuple[Verdict, list[str]]:
    """Make of the answers whether this peer can be dialled, and at which hosts.

    For each host that this peer was seen at, most count. Neighbours see it at an address of its home; what counts for
    the verdict is how those see it who are farther away, if there are any.

    Args:
        answers: Of different peers.

    Returns:
        The verdict, and the hosts, public ones first.
    """
    votes = Counter[str]()
    for answer in answers:
        votes[answer.host] += 1 if answer.is_reached else -1
    public = {host for host in votes if ipaddress.ip_address(host).is_global}
    reached = sorted((host for host, vote in votes.items() if vote > 0), key=lambda host: host not in public)
    if not votes:
        return "unknown", []
    return ("direct" if set(reached) & (public or set(votes)) else "hidden"), reached


class Reachability:
    """Keeps this peer's addresses as others can use them.

    Args:
        endpoint: How to reach those who are asked.
        listener: Whose addresses they are.
        host: Where it listens on this machine.
        ear: Where this peer is found if it cannot be dialled.
        find: Gives peers that can be asked.
        rng: The dice that choose among them.

    Attributes:
        verdict: What is known.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        listener: TlsListener,
        host: str,
        *,
        ear: RelayEar,
        find: Callable[[], Sequence[Contact]],
        rng: random.Random,
    ) -> None:
        self._endpoint = endpoint
        self._config = endpoint.config
        self._listener = listener
        self._host = host
        self._ear = ear
        self._find = find
        self._rng = rng
        self._reached: list[str] = []
        self._local: tuple[str, ...] = ()
        self._doubts = 0
        self.verdict: Verdict = "unknown"

    async def run(self, tell: Callable[[tuple[Address, ...]], Awaitable[None]]) -> None:
        """Ask, and ask again when something changes or long was nothing asked, until cancelled.

        Args:
            tell: Hears of this peer's addresses when they change.
        """
        asked_s = -self._config.reach_check_s
        told: tuple[Address, ...] = self._endpoint.addresses
        while True:
            local = await to_thread.run_sync(find_local_hosts, self._host)
            period_s = _LOOK_S if self.verdict == "unknown" or self._doubts else self._config.reach_check_s
            if local != self._local or anyio.current_time() - asked_s >= period_s:
                self._local = local
                asked_s = anyio.current_time()
                self._conclude(await self._ask_some())
            self._listener.addresses = self._choose_addresses()
            if self._endpoint.addresses != told:
                told = self._endpoint.addresses
                event(_LOG, "reached elsewhere", verdict=self.verdict, addresses=" ".join(told))
                await tell(told)
            with anyio.move_on_after(_LOOK_S):
                await self._ear.wait()

    async def _ask_some(self) -> list[Answer]:
        known = list(self._find())
        answers: list[Answer] = []
        async with anyio.create_task_group() as tasks:
            for contact in self._rng.sample(known, min(_ASKED_AT_ONCE, len(known))):
                tasks.start_soon(self._ask, contact, answers)
        return answers

    async def _ask(self, contact: Contact, answers: list[Answer]) -> None:
        try:
            answers.append(await ask(self._endpoint, contact, self._listener.port))
        except Error as error:
            event(_LOG, "could not be dialled back", level=logging.DEBUG, reason=error.message)

    def _conclude(self, answers: Sequence[Answer]) -> None:
        """Take the answers for the truth; only that a peer is hidden which was not so far is asked a second time."""
        verdict, reached = judge(answers)
        if verdict == "unknown":
            return
        if verdict == "hidden" and self.verdict == "direct" and not self._doubts:
            self._doubts = 1
            return
        self._doubts = 0
        if verdict != self.verdict:
            problem = next((answer.problem for answer in answers if answer.problem), "")
            event(_LOG, "asked others to dial back", verdict=verdict, reached=" ".join(reached), problem=problem)
        self.verdict, self._reached = verdict, reached
        self._ear.want(verdict == "hidden")

    def _choose_addresses(self) -> tuple[Address, ...]:
        """Give where others got through; where none did, nothing, unless no relay helps either."""
        is_hidden = self.verdict == "hidden" and bool(self._ear.addresses)
        hosts = self._reached if is_hidden else [*self._reached, *self._local]
        unique = dict.fromkeys(hosts)
        return tuple(format_address("tls", host, self._listener.port) for host in unique)


def find_askable(contacts: Sequence[Contact], own: Sequence[Address]) -> list[Contact]:
    """Keep of some contacts those that can be asked: the ones that need no relay and are not this peer itself."""
    found = []
    for contact in contacts:
        direct = tuple(address for address in contact.addresses if not address.startswith(f"{RELAY}:"))
        if direct and not set(direct) & set(own):
            found.append(Contact(contact.peer, direct))
    return found
