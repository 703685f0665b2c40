"""What a session asks of the servers that are to hold it."""

import secrets
from collections.abc import Collection
from dataclasses import dataclass

from corolla.client.target import Target
from corolla.routing import Demand
from corolla.terms import Hop, PeerId
from corolla.wire import OpenSession, Successor

__all__ = ["Need"]


@dataclass(frozen=True, slots=True)
class Need:
    """What a session asks for.

    Args:
        target: Which blocks of which weights to run.
        rows: How many rows the session has.
        max_tokens: How many tokens each row is expected to reach.
        prompt_tokens: How many tokens, over all rows, the first step is expected to have.
        token_bytes: How many bytes the hidden state of a token takes on its way.
    """

    target: Target
    rows: int
    max_tokens: int
    prompt_tokens: int
    token_bytes: float

    def opening(
        self, hop: Hop, longest: int, token: bytes | None, successor: Successor | None, trace: bytes | None
    ) -> OpenSession:
        """Say what to ask of a hop.

        Args:
            hop: Which.
            longest: How many tokens the longest row has already.
            token: What the hop before it will know.
            successor: Where its outputs go.
            trace: Where it adds its part, if it records traces.
        """
        return OpenSession(
            model=self.target.model,
            span=hop.span,
            rows=self.rows,
            max_tokens=max(self.max_tokens, longest),
            codec=self.target.codec,
            token=token,
            successor=successor,
            key=secrets.token_bytes(16),
            adapters=self.target.hashes(hop.span),
            trace=trace,
        )

    def demand(self, longest: int, tokens: int, *, is_pushed: bool, avoid: Collection[PeerId] = ()) -> Demand:
        """Say what a chain must offer.

        Args:
            longest: How many tokens the longest row has already.
            tokens: How many all rows have.
            is_pushed: Whether outputs go from server to server.
            avoid: Whom not to use.
        """
        prompt_tokens = max(self.prompt_tokens, tokens)
        return Demand(
            model=self.target.model,
            span=self.target.span,
            tokens=self.rows * max(self.max_tokens, longest),
            prompt_tokens=prompt_tokens,
            decode_steps=max(1, self.max_tokens - prompt_tokens // self.rows),
            rows=self.rows,
            token_bytes=self.token_bytes,
            avoid=avoid,
            is_pushed=is_pushed,
        )
