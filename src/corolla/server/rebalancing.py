"""Whether this server should serve other blocks: it looks at the swarm now and then, and decides by ``routing``.

Owns the looking and the mistrust: whom it has caught serving nothing, and who was to move and did not. It moves nobody,
not even its own server, which is told of the decision.
"""

import random
from collections.abc import Awaitable, Callable

import anyio
import torch

from corolla.codec import encode
from corolla.errors import Error, PeerBusy, PeerMisbehaved, UsageError
from corolla.routing import Move, PlacementConfig, confirm_move, plan_moves
from corolla.server.loading import Model
from corolla.swarm import Endpoint, Presence
from corolla.telemetry import event, logger
from corolla.terms import Announcement, PeerId, Snapshot, Span
from corolla.wire import Forward, Output

__all__ = ["Rebalancer"]

_LOG = logger(__name__)
_MISTRUST_S = 600.0
_STRIKES = 2
"""A server that fails so many audits in a row counts as serving nothing."""
_PATIENCE = 6.0
"""A server that should move has so many times the usual time between two looks to begin."""
_AUDIT_S = 10.0


class Rebalancer:
    """Decides, now and then, whether its server should move.

    Args:
        endpoint: How to reach the others.
        gossip: Who the others are.
        model: What all of them serve.
        config: What a move must be worth.
        look_s: How often to look, give or take half.
    """

    def __init__(
        self, endpoint: Endpoint, gossip: Presence, model: Model, config: PlacementConfig, *, look_s: float
    ) -> None:
        self._endpoint = endpoint
        self._gossip = gossip
        self._model = model
        self._config = config
        self._look_s = look_s
        self._rng = random.Random()
        self._strikes: dict[PeerId, tuple[int, float]] = {}
        self._expected: dict[PeerId, float] = {}

    async def run(self, move: Callable[[Span], Awaitable[None]]) -> None:
        """Look until cancelled.

        Args:
            move: Called with the span that the server should serve instead; returns when it does, or has given up.
        """
        while True:
            await anyio.sleep(self._look_s * self._rng.uniform(0.5, 1.5))
            await self._audit()
            span = await self._decide()
            if span is not None:
                await move(span)

    async def confirm(self, here: Span, span: Span) -> bool:
        """Say whether the server may set out, some time after it has announced that it will.

        Args:
            here: The blocks that it leaves to others; those have to show that they serve them.
            span: Where to.
        """
        move, model = Move(self._endpoint.peer_id, span), self._model
        arguments = model.repository.model_id, model.block_bytes, move
        if not await anyio.to_thread.run_sync(confirm_move, self._trusted(), *arguments):
            return False
        block = here.start
        while block < here.stop:
            others = [claim for claim in self._others(self._trusted()) if block in claim.span and not claim.next_span]
            if not others:
                return False
            claim = max(others, key=lambda other: other.span.stop)
            if await self._passes(claim, strikes=_STRIKES):
                block = claim.span.stop
        return True

    async def _decide(self) -> Span | None:
        now_s, patience_s = anyio.current_time(), self._look_s * _PATIENCE
        passed_over = {peer for peer, since_s in self._expected.items() if now_s - since_s > patience_s}
        moves = await anyio.to_thread.run_sync(self._plan, self._trusted(), passed_over)
        planned = {move.peer: move.span for move in moves}
        self._expected = {
            peer: since_s
            for peer, since_s in self._expected.items()
            if peer in planned or now_s - since_s < _MISTRUST_S
        }
        for peer in planned:
            self._expected.setdefault(peer, now_s)
        return planned.get(self._endpoint.peer_id)

    def _plan(self, snapshot: Snapshot, passed_over: set[PeerId]) -> list[Move]:
        return plan_moves(
            snapshot,
            self._model.repository.model_id,
            self._model.block_bytes,
            self._config,
            passed_over=passed_over - {self._endpoint.peer_id},
        )

    def _trusted(self) -> Snapshot:
        """View the swarm without those who were caught."""
        now_s = anyio.current_time()
        self._strikes = {peer: found for peer, found in self._strikes.items() if now_s - found[1] < _MISTRUST_S}
        snapshot = self._gossip.snapshot(self._model.repository.model_id)
        kept = tuple(claim for claim in snapshot.announcements if self._strikes.get(claim.peer, (0, 0.0))[0] < _STRIKES)
        return Snapshot(announcements=kept, age_s=snapshot.age_s)

    def _others(self, snapshot: Snapshot) -> list[Announcement]:
        own = self._endpoint.peer_id
        return [claim for claim in snapshot.announcements if claim.state == "online" and claim.peer != own]

    async def _audit(self) -> None:
        """Have one of the others show that it serves what it claims."""
        others = self._others(self._gossip.snapshot(self._model.repository.model_id))
        if others:
            await self._passes(self._rng.choice(others), strikes=1)

    async def _passes(self, claim: Announcement, *, strikes: int) -> bool:
        """Ask a server for one token through all its blocks; a failure counts as so many strikes."""
        try:
            await self._ask(claim)
        except (PeerBusy, UsageError):
            return True  # it serves, but not this, or not now
        except Error as error:
            strikes += self._strikes.get(claim.peer, (0, 0.0))[0]
            self._strikes[claim.peer] = strikes, anyio.current_time()
            event(_LOG, "a server failed an audit", peer=claim.peer[:8], span=claim.span, strikes=strikes, error=error)
            return False
        self._strikes.pop(claim.peer, None)
        return True

    async def _ask(self, claim: Announcement) -> None:
        hidden_BTD = torch.zeros(1, 1, self._model.hidden_size)
        encoded = encode(hidden_BTD, "half")
        asked = Forward(model=claim.model, span=claim.span, hidden=encoded.meta, codec="half")
        async with self._endpoint.channel(claim.peer, claim.addresses) as channel:
            answer = await channel.request(asked, encoded.buffers, expected=Output, deadline_s=_AUDIT_S)
        if answer.message.tensors[0].shape != encoded.meta.shape:
            raise PeerMisbehaved(f"asked for one token, it sent {answer.message.tensors[0].shape}", peer=claim.peer)
