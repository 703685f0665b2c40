"""Every way Corolla can fail, on one page, sorted by whose fault it is.

::

    Error
    ├── UsageError          the caller's mistake
    │   ├── ConfigError         a setting that is unknown or impossible
    │   ├── SessionClosed       a session used after its end
    │   ├── ContextTooLong      more tokens than the model or the lease has room for
    │   ├── WrongBase           an adapter that is for other weights
    │   ├── Diverged            a training whose loss or gradient is no number any more
    │   ├── NotAMember          no invite to the private swarm, or one that does not hold or allow it
    │   ├── InvalidRequest      a request of HTTP whose field is wrong; says which
    │   ├── InvalidKey          an API key that is missing, unknown or revoked
    │   ├── RateLimited         more requests a minute than the API key has; says when to come back
    │   ├── QuotaSpent          more tokens a day than the API key has; says when to come back
    │   └── RequestTooLarge     a body over the gateway's limit
    ├── SwarmError          the network's condition
    │   ├── NoChain             some blocks have no server
    │   ├── OutdatedView        whoever asks has not heard what a peer serves now
    │   └── BootstrapFailed     no peer of the swarm could be reached
    ├── PeerError           one peer's failure
    │   ├── PeerUnreachable     could not be dialled
    │   ├── PeerTimeout         did not answer within the deadline
    │   ├── PeerLost            the stream broke in the middle
    │   ├── PeerBusy            has no room now; says when to come back
    │   ├── PeerOutdated        speaks another version of the protocol
    │   ├── PeerFailed          failed by its own account
    │   ├── PeerStranger        is no member of this private swarm
    │   ├── SessionExpired      has given a session up that said nothing for too long
    │   ├── NotFinite           was sent numbers that are none, by the hop before
    │   ├── AdapterMissing      does not have an adapter, or not any more; it can be sent
    │   └── PeerMisbehaved      sent something that an honest peer never sends
    ├── WireError           bytes that break the protocol
    │   ├── LocalProtocolError  we were about to send them (our bug)
    │   ├── RemoteProtocolError a peer sent them
    │   ├── FrameTooLarge       a frame over the limit, from either side
    │   └── CodecError          a payload that does not fit its description
    ├── CapacityError       this server's limits
    │   ├── CacheFull           no free KV pages
    │   ├── SpanTooLarge        the span does not fit into memory
    │   ├── GatewayBusy         the gateway computes as many answers as it may; says when to come back
    │   └── DatabaseFailed      the database of API keys does not answer
    ├── ModelError          the model's files
    │   ├── ModelNotFound       no such model
    │   ├── UnsupportedModel    a model that cannot be split exactly
    │   ├── BadCheckpoint       files that are missing, damaged or unsafe
    │   ├── BadAdapter          an adapter that is none, is damaged, forged or unsafe
    │   └── AdapterNotFound     no such adapter
    └── InternalError       a bug in Corolla

Each class declares ``code`` (its name on the wire), ``http_status`` (for the gateway), ``retry`` (whether the same or
another peer may succeed) and ``ban_s`` (for how long to avoid the peer). Retrying, banning, the gateway and the wire
read these; nothing matches on a message or climbs an ``isinstance`` ladder. Messages say what happened, to whom, the
number, and the remedy.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, Literal

__all__ = [
    "AdapterMissing",
    "AdapterNotFound",
    "BadAdapter",
    "BadCheckpoint",
    "BootstrapFailed",
    "CacheFull",
    "CapacityError",
    "CodecError",
    "ConfigError",
    "ContextTooLong",
    "DatabaseFailed",
    "Diverged",
    "Error",
    "FrameTooLarge",
    "GatewayBusy",
    "InternalError",
    "InvalidKey",
    "InvalidRequest",
    "LocalProtocolError",
    "ModelError",
    "ModelNotFound",
    "NoChain",
    "NotAMember",
    "NotFinite",
    "OutdatedView",
    "PeerBusy",
    "PeerError",
    "PeerFailed",
    "PeerLost",
    "PeerMisbehaved",
    "PeerOutdated",
    "PeerStranger",
    "PeerTimeout",
    "PeerUnreachable",
    "QuotaSpent",
    "RateLimited",
    "RemoteProtocolError",
    "RequestTooLarge",
    "Retry",
    "SessionClosed",
    "SessionExpired",
    "SpanTooLarge",
    "SwarmError",
    "UnsupportedModel",
    "UsageError",
    "WireError",
    "WrongBase",
    "revive",
    "ungrouped",
]

Retry = Literal["never", "same", "other"]  # may the same, or another, peer succeed?


class Error(Exception):
    """Anything that Corolla raises on purpose.

    Args:
        message: What happened, to whom, the number, and the remedy.
        peer: The id of the peer that reported it or that it is about, if any.
        retry_after_s: When the same may succeed, in seconds; ``None`` for what is usual of its class.
    """

    code: ClassVar[str] = "error"
    http_status: ClassVar[int] = 500
    retry: ClassVar[Retry] = "never"
    ban_s: ClassVar[float] = 0.0
    retry_after_s: float | None = None

    def __init__(self, message: str, *, peer: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.peer = peer
        if retry_after_s is not None:
            self.retry_after_s = retry_after_s


class UsageError(Error):
    """The caller asked for something that cannot be: retrying will not help and no peer is to blame."""

    code = "usage"
    http_status = 400


class ConfigError(UsageError):
    """A setting that is unknown, malformed or contradicts another."""

    code = "config"


class SessionClosed(UsageError):
    """A session was used after it was closed or had failed."""

    code = "session_closed"
    http_status = 409


class ContextTooLong(UsageError):
    """More tokens than the model's context or the session's lease can hold."""

    code = "context_too_long"


class WrongBase(UsageError):
    """An adapter was to be added to other weights than those that it was trained on."""

    code = "wrong_base"


class Diverged(UsageError):
    """A training's loss or gradient is nan or infinite; nothing was learned from it."""

    code = "diverged"


class NotAMember(UsageError):
    """A private swarm turned this peer away: its invite is missing, over, or not for what it wants."""

    code = "not_a_member"
    http_status = 403


class InvalidRequest(UsageError):
    """A request of HTTP has a field that is wrong, or that cannot be honoured.

    Args:
        message: What is wrong with it, and what would be right.
        field: Which field, ``messages[0].content`` say.
        peer: Nobody; as in every error.
    """

    code = "invalid_request"

    def __init__(self, message: str, *, peer: str | None = None, field: str | None = None) -> None:
        super().__init__(message, peer=peer)
        self.field = field


class InvalidKey(UsageError):
    """The API key is missing, unknown or revoked."""

    code = "invalid_api_key"
    http_status = 401


class RateLimited(UsageError):
    """The API key has had its requests of this minute."""

    code = "rate_limit_exceeded"
    http_status = 429
    retry_after_s = 60.0


class QuotaSpent(RateLimited):
    """The API key has had its tokens of this day."""

    code = "insufficient_quota"


class RequestTooLarge(UsageError):
    """The body of a request is longer than the gateway reads."""

    code = "request_too_large"
    http_status = 413


class SwarmError(Error):
    """The swarm as a whole cannot do this now; later it may."""

    code = "swarm"
    http_status = 503
    retry = "other"


class NoChain(SwarmError):
    """No servers cover some blocks."""

    code = "no_chain"


class OutdatedView(SwarmError):
    """A server was asked for blocks that it does not have, or not any more; news of a move takes a moment."""

    code = "outdated_view"
    retry_after_s = 1.0


class BootstrapFailed(SwarmError):
    """None of the given peers could be reached, so the swarm cannot be entered."""

    code = "bootstrap"


class PeerError(Error):
    """One peer failed; another may succeed."""

    code = "peer"
    http_status = 502
    retry: ClassVar[Retry] = "other"
    ban_s = 15.0


class PeerUnreachable(PeerError):
    """The peer could not be dialled at any of its addresses."""

    code = "peer_unreachable"


class PeerTimeout(PeerError):
    """The peer did not answer before the deadline."""

    code = "peer_timeout"
    http_status = 504


class PeerLost(PeerError):
    """The stream to the peer broke while something was under way."""

    code = "peer_lost"


class PeerBusy(PeerError):
    """The peer is healthy but has no room now; it says when it expects to have some."""

    code = "peer_busy"
    http_status = 503
    ban_s = 0.0
    retry_after_s = 1.0


class PeerOutdated(PeerError):
    """The peer speaks a version of the protocol that this one does not."""

    code = "peer_outdated"
    ban_s = 600.0


class PeerFailed(PeerError):
    """The peer reported an internal failure of its own."""

    code = "peer_failed"


class PeerStranger(PeerError):
    """The peer has not proved that it is a member of this private swarm."""

    code = "peer_stranger"
    ban_s = 600.0


class SessionExpired(PeerError):
    """The peer has given up a session whose lease had ended, or what a step needs of one; it may take another one."""

    code = "session_expired"
    http_status = 503
    retry = "same"
    ban_s = 0.0


class NotFinite(PeerError):
    """The peer was sent nan or infinite numbers; whoever sent them is to blame."""

    code = "not_finite"
    ban_s = 0.0


class AdapterMissing(PeerError):
    """The peer was asked to use an adapter that it does not have, or not any more; it will take it."""

    code = "adapter_missing"
    retry = "same"
    ban_s = 0.0


class PeerMisbehaved(PeerError):
    """The peer sent something that an honest peer never sends; the message holds the evidence."""

    code = "peer_misbehaved"
    ban_s = 3600.0


class WireError(Error):
    """Bytes that break the protocol."""

    code = "wire"
    http_status = 502


class LocalProtocolError(WireError):
    """We were about to break the protocol ourselves: a bug on this side."""

    code = "local_protocol"
    http_status = 500


class RemoteProtocolError(WireError):
    """The other side sent bytes that mean nothing in the protocol."""

    code = "remote_protocol"
    retry = "other"
    ban_s = 600.0


class FrameTooLarge(WireError):
    """A frame over the limit of this protocol."""

    code = "frame_too_large"
    http_status = 413


class CodecError(WireError):
    """A payload that does not fit its description."""

    code = "codec"


class CapacityError(Error):
    """This server cannot hold what was asked of it."""

    code = "capacity"
    http_status = 503
    retry: ClassVar[Retry] = "other"


class CacheFull(CapacityError):
    """The KV pool has too few free pages."""

    code = "cache_full"


class SpanTooLarge(CapacityError):
    """The span needs more memory than this machine has free."""

    code = "span_too_large"


class GatewayBusy(CapacityError):
    """The gateway computes as many answers as it may."""

    code = "gateway_busy"
    retry = "same"
    retry_after_s = 1.0


class DatabaseFailed(CapacityError):
    """The gateway's database of API keys and usage does not answer."""

    code = "database"
    retry = "same"
    retry_after_s = 5.0


class ModelError(Error):
    """Something is wrong with the model's files."""

    code = "model"
    http_status = 404


class ModelNotFound(ModelError):
    """No model of that name at that place."""

    code = "model_not_found"


class UnsupportedModel(ModelError):
    """A model whose blocks cannot be run apart from each other with exact results."""

    code = "unsupported_model"
    http_status = 400


class BadCheckpoint(ModelError):
    """Weight files that are missing, damaged, or of a kind that could execute code."""

    code = "bad_checkpoint"
    http_status = 400


class BadAdapter(ModelError):
    """An adapter that is none, is damaged or forged, or would run code."""

    code = "bad_adapter"
    http_status = 400


class AdapterNotFound(ModelError):
    """No adapter of that name at that place."""

    code = "adapter_not_found"


class InternalError(Error):
    """A bug in Corolla; please report it."""

    code = "internal"


@contextmanager
def ungrouped() -> Iterator[None]:
    """Raise the first :class:`Error` out of an exception group as itself.

    A task group raises groups; whoever called for one thing should hear of the one thing that went wrong.

    Raises:
        Error: The first in the group, depth first; a group without any is raised as it is.
    """
    try:
        yield
    except BaseExceptionGroup as group:
        rest: list[BaseException] = [group]
        while rest:
            first = rest.pop(0)
            if isinstance(first, Error):
                raise first from first.__cause__
            if isinstance(first, BaseExceptionGroup):
                rest = [*first.exceptions, *rest]
        raise


def _walk(root: type[Error]) -> list[type[Error]]:
    return [root, *(found for child in root.__subclasses__() for found in _walk(child))]


def revive(code: str, message: str, *, peer: str, retry_after_s: float | None = None) -> Error:
    """Make the error that a peer reported, as this side should see it.

    A peer's internal error is that peer's failure; so is a code that this version does not know, so that newer peers
    may add errors.

    Args:
        code: The ``code`` of the error's class.
        message: The peer's own words.
        peer: The id of the peer that reported it.
        retry_after_s: For :class:`PeerBusy`, when to come back.

    Returns:
        The error, ready to be raised; it names the peer.
    """
    known = {cls.code: cls for cls in _walk(Error)}
    cls = known.get(code, PeerFailed)
    if cls in (InternalError, LocalProtocolError, Error):
        cls = PeerFailed
    revived = cls(message, peer=peer)
    if retry_after_s is not None and issubclass(cls, PeerBusy):
        revived.retry_after_s = retry_after_s
    return revived
