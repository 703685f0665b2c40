"""What has happened between two snapshots of a swarm. Pure."""

from collections.abc import Mapping
from typing import Final, Literal

import msgspec

from corolla.monitor.picture import model_title, printable
from corolla.terms import Announcement, ModelId, PeerId, Span

__all__ = ["Change", "Happening", "compare"]

Happening = Literal["joined", "online", "moving", "moved", "draining", "drained", "died", "blind", "sighted"]
"""A server came; takes sessions; is about to serve other blocks; serves them; is leaving; has left; is gone without a
word. Or the monitor sees nothing of the swarm; sees it again."""

MAX_CHANGES: Final = 256
"""In one comparison; a swarm that changes more is told by its sums."""


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened.

    Args:
        at_s: When it was seen, in seconds since 1970.
        what: What.
        peer: To whom; empty if to the monitor.
        name: What its owner calls it.
        model: Its model.
        model_name: What it calls that.
        span: Its blocks, after the change.
    """

    at_s: float
    what: Happening
    peer: str = ""
    name: str = ""
    model: ModelId = ModelId("")
    model_name: str = ""
    span: Span | None = None


def compare(before: Mapping[PeerId, Announcement], after: Mapping[PeerId, Announcement], at_s: float) -> list[Change]:
    """Find out what happened.

    Args:
        before: Who was seen.
        after: Who is seen.
        at_s: The time of the second look, in seconds since 1970.

    Returns:
        At most ``MAX_CHANGES``; those who are gone come first.
    """
    found: list[tuple[Happening, Announcement]] = [
        ("drained" if known.state == "draining" else "died", known)
        for peer, known in before.items()
        if peer not in after
    ]
    for peer, server in after.items():
        what = _happened(before.get(peer), server)
        if what is not None:
            found.append((what, server))
    return [_change(what, server, at_s) for what, server in found[:MAX_CHANGES]]


def _happened(before: Announcement | None, now: Announcement) -> Happening | None:
    if before is None:
        return "online" if now.state == "online" else "joined"
    if now.state == "online" and now.span != before.span:
        return "moved"
    if now.next_span is not None and now.next_span != before.next_span:
        return "moving"
    if now.state != before.state:
        if now.state == "online":
            return "online"
        if now.state == "draining" and now.next_span is None:
            return "draining"
    return None


def _change(what: Happening, server: Announcement, at_s: float) -> Change:
    return Change(
        at_s=at_s,
        what=what,
        peer=server.peer,
        name=printable(server.name),
        model=server.model,
        model_name=model_title(server.model_name),
        span=server.next_span or server.span,
    )
