"""A session as transformers sees it: a cache that ``generate`` fills, reorders and crops, held by servers.

Owns the bookkeeping between padded batches, which transformers has, and rows without padding, which the swarm has.
"""

# B batch rows, T new tokens, P stored positions, D model width, N packed tokens

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import torch
from transformers import Cache

from corolla.client.adapting import with_prefixes
from corolla.client.session import Session
from corolla.client.steps import HopTiming, Replay, StepTokens
from corolla.client.sync import Swarm
from corolla.client.target import Target
from corolla.client.trace import Trace
from corolla.codec import wire_bytes
from corolla.errors import ContextTooLong, SessionClosed, UsageError
from corolla.terms import Chain

__all__ = ["GenerationSession"]

_UNKNOWN_TOKEN = -1


class GenerationSession(Cache):  # type: ignore[misc]  # transformers has no types
    """One generation, kept over as many calls as you like. Made by ``model.session()``; use it as a context manager.

    Pass it to ``model.generate(..., session=session)`` or as ``past_key_values``. What it has already seen is not sent
    again: before each ``generate`` it is rewound to where the new prompt departs from its own tokens.

    It opens on first use, when the number of rows is known. Not for several threads at once.

    Args:
        swarm: Where the servers are.
        target: Which blocks of which weights.
        context_tokens: The longest row that the model was made for.
        max_tokens: How many tokens each row is expected to reach; if ``None``, the first ``generate`` sets it.

    Attributes:
        max_tokens: What servers are asked to keep room for when the session opens.
        prefix_tokens: How many tokens of an adapter stand before the first token of every row.
    """

    def __init__(self, swarm: Swarm, target: Target, *, context_tokens: int, max_tokens: int | None = None) -> None:
        super().__init__(layers=[])
        self._swarm = swarm
        self._target = target
        self._context_tokens = context_tokens
        self.max_tokens = max_tokens
        self.prefix_tokens = 0
        self._session: Session | None = None
        self._rows = 0
        self._is_closed = False
        self._position = 0
        self._real_BP = torch.empty(0, 0, dtype=torch.bool)  # which of the stored positions are no padding
        self._order: list[int] | None = None
        self._tokens_BP = torch.empty(0, 0, dtype=torch.long)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __bool__(self) -> bool:
        return True  # transformers' caches are false while they have no layers, and this one never has any

    def __repr__(self) -> str:
        state = "closed" if self._is_closed else "open" if self._session else "not opened yet"
        return f"GenerationSession({state}, position {self._position})"

    @property
    def position(self) -> int:
        """How many positions are stored, padding included; set it lower to rewind.

        Raises:
            UsageError: If it is set beyond what is stored, or below zero.
        """
        return self._position

    @position.setter
    def position(self, position: int) -> None:
        if not 0 <= position <= self._position:
            raise UsageError(f"cannot rewind to position {position}: the session is at position {self._position}")
        self._position = position
        self._tokens_BP, self._real_BP = self._tokens_BP[:, :position], self._real_BP[:, :position]

    @property
    def chain(self) -> Chain | None:
        """The servers in use; ``None`` before the first step."""
        return self._session.chain if self._session else None

    @property
    def timings(self) -> tuple[HopTiming, ...]:
        """For each hop, where its share of the last step went."""
        return self._session.timings if self._session else ()

    @property
    def replays(self) -> tuple[Replay, ...]:
        """What servers were given because others had failed."""
        return self._session.replays if self._session else ()

    @property
    def trace(self) -> Trace:
        """What happened so far, in order: steps with their timings, and decisions."""
        return self._session.trace if self._session else Trace()

    @property
    def tokens_BP(self) -> torch.Tensor:
        """The token ids of the stored positions; -1 where only embeddings were given."""
        return self._tokens_BP

    def close(self) -> None:
        """End the session; the servers free its pages. Doing it twice does no harm."""
        self._is_closed = True
        session, self._session = self._session, None
        if session is not None:
            with suppress(SessionClosed):  # the swarm was closed before, and the session with it
                self._swarm.call(session.close)

    def align(self, tokens_BP: torch.Tensor, attention_mask_BP: torch.Tensor | None) -> None:
        """Rewind to the longest prefix that a new prompt shares with the stored tokens, and leave it a token to feed.

        Args:
            tokens_BP: The whole new prompt.
            attention_mask_BP: 0 for its padding on the left.

        Raises:
            UsageError: If the prompt has another number of rows than the session.
        """
        if self._position == 0:
            return
        if len(tokens_BP) != len(self._tokens_BP):
            raise UsageError(f"a prompt of {len(tokens_BP)} rows in a session of {len(self._tokens_BP)}")
        shared = min(self._position, tokens_BP.shape[1] - 1)
        real_BP = _real_positions(attention_mask_BP, *tokens_BP.shape)[:, :shared]
        if not torch.equal(real_BP, self._real_BP[:, :shared]):
            self.position = 0
            return
        differs = (tokens_BP[:, :shared].cpu() != self._tokens_BP[:, :shared]).any(0)
        self.position = int(differs.float().argmax()) if bool(differs.any()) else shared

    def next_positions(self, rows: int, new: int, attention_mask_BP: torch.Tensor | None) -> torch.Tensor:
        """Say where the next tokens of each row stand, padding not counted.

        Args:
            rows: How many rows will be fed.
            new: How many positions of each.
            attention_mask_BP: 0 for padding, over stored and new positions.

        Returns:
            ``[B, T]``; negative where there is padding.

        Raises:
            UsageError: If the mask does not fit the session.
        """
        real_BP = self._with_new(rows, new, attention_mask_BP)
        positions_BP = (real_BP.cumsum(1) - 1).masked_fill(~real_BP, -1)
        return positions_BP[:, self._position :]

    def begin_with(
        self,
        prefixes: Sequence[tuple[torch.Tensor, torch.Tensor]],
        attention_mask_BP: torch.Tensor | None,
        new: int,
    ) -> torch.Tensor | None:
        """Let keys and values stand before the first token of every row.

        Args:
            prefixes: For each block, keys and values ``[heads, tokens, width]``; empty to leave all as it is.
            attention_mask_BP: 0 for padding, over stored and new positions; it may span the prefix as well.
            new: How many positions will be fed.

        Returns:
            The mask without the prefix.

        Raises:
            UsageError: If there are not as many as the model has blocks.
        """
        if prefixes:
            target = replace(self._target, adapter=with_prefixes(self._target.adapter, prefixes, self._target.span))
            if self._session is not None and target.hashes(target.span) != self._target.hashes(target.span):
                self._swarm.call(self._session.close)  # what it holds began otherwise
                self._session = None
            self._target = target
            self.prefix_tokens = prefixes[0][0].shape[1]
        length = self._position + new
        if attention_mask_BP is not None and attention_mask_BP.shape[1] == self.prefix_tokens + length:
            return attention_mask_BP[:, self.prefix_tokens :]
        return attention_mask_BP

    def run(
        self,
        hidden_BTD: torch.Tensor,
        *,
        positions_BT: torch.Tensor,
        tokens_BT: torch.Tensor | None,
        taps: Sequence[int],
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Run new tokens through all blocks and store their keys and values.

        Args:
            hidden_BTD: The first block's input.
            positions_BT: What :meth:`next_positions` gave for these tokens.
            tokens_BT: The ids of the new tokens, if known.
            taps: Absolute indices of blocks whose outputs are wanted as well.

        Returns:
            The last block's output and the taps', shaped like the input; zeros where there is padding.

        Raises:
            SessionClosed: If the session was closed.
            ContextTooLong: If the model was not made for so many tokens.
            NoChain: If some blocks have no server with room for the session.
            PeerError: If servers kept failing.
        """
        rows, new = hidden_BTD.shape[:2]
        token_bytes = wire_bytes(hidden_BTD, self._target.codec) / (rows * new)
        session = self._opened(rows, self._position + new, token_bytes)
        real_BT = positions_BT >= 0
        stored_BP = self._stored(rows)
        starts = stored_BP.sum(1).tolist()
        is_padded = not bool(real_BT.all())
        sent_BTD = hidden_BTD.detach().cpu()
        hidden_ND = sent_BTD[real_BT] if is_padded else sent_BTD.reshape(rows * new, -1)
        order = None if self._order is None else tuple(self._order)
        step = StepTokens(hidden_ND, tuple(starts), tuple(real_BT.sum(1).tolist()), order)
        result = self._swarm.call(_step, session, step, tuple(taps))
        self._order = None
        self._position += new
        self._real_BP = torch.cat([stored_BP, real_BT], dim=1)
        seen_BT = torch.full((rows, new), _UNKNOWN_TOKEN) if tokens_BT is None else tokens_BT.cpu()
        self._tokens_BP = torch.cat([self._tokens_BP, seen_BT], dim=1)

        def unpack(packed_ND: torch.Tensor) -> torch.Tensor:
            packed_ND = packed_ND.to(hidden_BTD.device, hidden_BTD.dtype)
            if not is_padded:
                return packed_ND.view(rows, new, -1)
            return torch.zeros_like(hidden_BTD).masked_scatter_(real_BT[..., None].to(hidden_BTD.device), packed_ND)

        return unpack(result.hidden_ND), {block: unpack(tensor_ND) for block, tensor_ND in result.taps.items()}

    def _opened(self, rows: int, length: int, token_bytes: float) -> Session:
        if self._is_closed:
            raise SessionClosed("the session was closed; make another with model.session()")
        room_tokens = self._context_tokens - self.prefix_tokens
        if length > room_tokens:
            raise ContextTooLong(
                f"{self.prefix_tokens + length} tokens are more than the {self._context_tokens} that this model was "
                "made for; shorten the prompt"
            )
        if self._session is not None and self._position == 0 and rows != self._rows:
            self._swarm.call(self._session.close)  # nothing is stored, so it may as well have other rows
            self._session = None
        if self._session is None:
            expected = max(self.max_tokens or self._swarm.config.max_tokens, length)
            session = Session(
                self._swarm.core,
                self._target,
                rows=rows,
                max_tokens=min(expected, room_tokens),
                prompt_tokens=rows * length,
                token_bytes=token_bytes,
            )
            self._swarm.call(session.open)
            self._session, self._rows = session, rows
        if self._position == 0:
            self._tokens_BP = torch.empty(rows, 0, dtype=torch.long)
        return self._session

    def _with_new(self, rows: int, new: int, attention_mask_BP: torch.Tensor | None) -> torch.Tensor:
        """Say which of the stored and new positions are no padding, as the mask has it."""
        if self._position and rows != self._rows:
            raise UsageError(f"{rows} rows were fed to a session of {self._rows}")
        stored_BP = self._stored(rows)
        if attention_mask_BP is None:
            return torch.cat([stored_BP, torch.ones(rows, new, dtype=torch.bool)], dim=1)
        real_BP = _real_positions(attention_mask_BP, rows, self._position + new)
        if not torch.equal(real_BP[:, : self._position], stored_BP):
            raise UsageError("the padding of a session cannot change on its way; rewind to position 0 first")
        return real_BP

    def _stored(self, rows: int) -> torch.Tensor:
        return self._real_BP if self._position else torch.empty(rows, 0, dtype=torch.bool)

    # What transformers asks of a cache.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many positions are stored."""
        return self._position

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """How many positions a mask spans, and where it begins."""
        return self._position + query_length, 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Let each row continue another one; sent along with the next step."""
        order = beam_idx.tolist()
        self._order = order if self._order is None else [self._order[row] for row in order]
        self._tokens_BP, self._real_BP = self._tokens_BP[order], self._real_BP[order]

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last tokens away: so many if negative; down to so many if positive, as older releases have it."""
        self.position = self._position + tokens_to_remove if tokens_to_remove <= 0 else tokens_to_remove

    def reset(self) -> None:
        """Begin again."""
        self.position = 0

    def activate_past_recording(self) -> None:
        """Nothing to do: servers can always rewind."""

    @property
    def is_croppable(self) -> bool:
        """Whether tokens can be taken away again."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether a compiled model could use it."""
        return False

    @property
    def max_cache_len(self) -> int:
        """No bound; PEFT asks before it puts a prefix before the first token."""
        return -1

    @property
    def is_initialized(self) -> bool:
        """Whether anything is stored."""
        return self._position > 0

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Multiply the rows: cannot be done on servers.

        Raises:
            UsageError: Always.
        """
        raise UsageError("the rows of a session cannot be multiplied once it has begun; repeat the prompt instead")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some of the rows: cannot be done on servers.

        Raises:
            UsageError: Always.
        """
        raise UsageError("rows of a session cannot be dropped once it has begun; generate without that strategy")


async def _step(session: Session, tokens: StepTokens, taps: tuple[int, ...]) -> Any:
    return await session.step(tokens, taps=taps)


def _real_positions(attention_mask_BP: torch.Tensor | None, rows: int, length: int) -> torch.Tensor:
    """Say which positions are no padding.

    Raises:
        UsageError: If a row ends with padding, or the mask does not span the stored and the new positions.
    """
    if attention_mask_BP is None:
        return torch.ones(rows, length, dtype=torch.bool)
    if attention_mask_BP.dim() != 2 or tuple(attention_mask_BP.shape) != (rows, length):
        raise UsageError(
            f"the attention mask has shape {list(attention_mask_BP.shape)}; {rows} rows of {length} stored and new "
            "positions need one of that shape"
        )
    real_BP = attention_mask_BP.bool().cpu()
    if not bool(real_BP.any(1).all()):
        raise UsageError("a row of the batch holds nothing but padding")
    if not bool(real_BP[:, -1].all()):
        raise UsageError("a session takes no padding at the end of a row; set tokenizer.padding_side = 'left'")
    return real_BP
