"""What a client wants run."""

from dataclasses import dataclass, replace

from corolla.client.adapting import ClientAdapter
from corolla.terms import ModelId, Span

__all__ = ["Target"]


@dataclass(frozen=True, slots=True)
class Target:
    """What a client wants run, and how its tensors should travel.

    Args:
        model: The weights.
        span: The blocks.
        codec: The name of the codec for activations, both ways.
        adapter: What is added to the blocks; ``None`` for nothing.
    """

    model: ModelId
    span: Span
    codec: str
    adapter: ClientAdapter | None = None

    def part(self, span: Span) -> "Target":
        """Want some of the blocks only."""
        return replace(self, span=span, adapter=None if self.adapter is None else self.adapter.part(span))

    def hashes(self, span: Span) -> tuple[bytes, ...]:
        """Name what is added to each of some blocks, as servers are told."""
        return () if self.adapter is None else self.adapter.hashes(span)

    def numbers(self, span: Span) -> int:
        """Say how many numbers are added to some blocks, all together."""
        return 0 if self.adapter is None else sum(tensor.numel() for tensor in self.adapter.tensors(span))

    @property
    def trains(self) -> bool:
        """Whether some of what is added is being trained."""
        return self.adapter is not None and any(tensor.requires_grad for tensor in self.adapter.tensors())
