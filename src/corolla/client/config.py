"""A client's settings."""

from dataclasses import dataclass, field

from corolla.terms import DType

__all__ = ["ClientConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientConfig:
    """How a client talks to servers."""

    codec: str = field(
        default="half", metadata={"help": "how activations travel: raw, half, fp16, bf16 or int8; see docs/codecs.md"}
    )
    dtype: DType | None = field(default=None, metadata={"help": "precision that servers must compute in; default: any"})
    max_tokens: int = field(
        default=2048,
        metadata={"help": "tokens that a session is opened for when nothing else is known", "unit": "tokens"},
    )
    open_s: float = field(default=15.0, metadata={"help": "limit for opening a session", "unit": "seconds"})
    step_s: float = field(default=120.0, metadata={"help": "limit for one step at one server", "unit": "seconds"})
    request_s: float = field(
        default=300.0, metadata={"help": "limit for one forward or backward request at one server", "unit": "seconds"}
    )
    attempts: int = field(default=4, metadata={"help": "chains to try before giving up"})
    batch_tokens: int = field(
        default=4096, metadata={"help": "tokens of a training batch in one request", "unit": "tokens"}
    )
    chain_s: float = field(
        default=10.0, metadata={"help": "how long to wait for missing blocks before giving up", "unit": "seconds"}
    )
