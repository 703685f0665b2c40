"""Where a transformers model meets the swarm: its base model's ``forward``, and the one call for all blocks.

Whoever calls the base model (a head, ``generate``, a PEFT wrapper, the user) passes a mask, positions, a cache and
wishes for hidden states. These are for the blocks, which are elsewhere, so they are taken out of the call here and
sent along with the hidden states; the base model itself then has only embeddings and a norm to compute.
"""

# B batch, T new tokens, P stored and new positions, D model width

import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from corolla.client.blocks import RemoteBlocks
from corolla.client.generation import GenerationSession
from corolla.errors import UsageError

__all__ = ["BlocksCall", "attach", "generating"]


@dataclass(slots=True)
class _Wishes:
    """What a call of the base model asked of the blocks."""

    attention_mask_BP: torch.Tensor | None
    position_ids_BT: torch.Tensor | None
    tokens_BT: torch.Tensor | None
    session: GenerationSession | None
    taps: tuple[int, ...]
    prefixes: Sequence[tuple[torch.Tensor, torch.Tensor]]


_WISHES: ContextVar[_Wishes] = ContextVar("corolla_wishes")
_GENERATING: ContextVar[GenerationSession | None] = ContextVar("corolla_generating", default=None)


@contextmanager
def generating(session: GenerationSession) -> Iterator[GenerationSession]:
    """Let a session be the cache of a generation, also when the model drops its cache on the way to begin another."""
    token = _GENERATING.set(session)
    try:
        yield session
    finally:
        _GENERATING.reset(token)


class BlocksCall(nn.Module):
    """Stands in the place of all blocks: runs them in the swarm, in a session if the call came with one."""

    def __init__(self, blocks: RemoteBlocks) -> None:
        super().__init__()
        self._blocks = blocks

    def forward(self, hidden_BTD: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Run the blocks; whatever else transformers passes to a block was prepared for blocks that are not here."""
        wishes = _WISHES.get()
        if wishes.session is not None and wishes.position_ids_BT is not None:  # a session has always said
            return wishes.session.run(
                hidden_BTD, positions_BT=wishes.position_ids_BT, tokens_BT=wishes.tokens_BT, taps=wishes.taps
            )
        return self._blocks.tap(
            hidden_BTD, wishes.taps, wishes.attention_mask_BP, wishes.position_ids_BT, wishes.prefixes
        )


def attach(decoder: nn.Module, num_blocks: int) -> None:
    """Make a base model take what is meant for the blocks out of every call.

    Args:
        decoder: The base model, whose blocks were replaced by a :class:`BlocksCall`.
        num_blocks: How many blocks the whole model has.
    """
    inner: Callable[..., Any] = decoder.forward
    names = list(inspect.signature(inner).parameters)

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        wanted = _wanted_states(given.pop("output_hidden_states", None), decoder, num_blocks)
        wants_dict = given.pop("return_dict", None)
        wishes = _take_wishes(given, "position_ids" in names, wanted, num_blocks)
        token = _WISHES.set(wishes)
        try:
            outputs = inner(**given, use_cache=False, output_hidden_states=bool(wanted), return_dict=True)
        finally:
            _WISHES.reset(token)
        outputs["past_key_values"] = wishes.session
        if wanted and outputs.get("hidden_states") is not None:
            states = enumerate(outputs["hidden_states"])
            outputs["hidden_states"] = tuple(state if index in wanted else None for index, state in states)
        wants_dict = getattr(decoder.config, "return_dict", True) if wants_dict is None else wants_dict
        return outputs if wants_dict else outputs.to_tuple()

    decoder.forward = forward


def _wanted_states(wish: bool | Collection[int] | None, decoder: nn.Module, num_blocks: int) -> frozenset[int]:
    """Read ``output_hidden_states``: all, none, or some places in transformers' tuple of ``num_blocks + 1``."""
    if wish is None:
        wish = bool(getattr(decoder.config, "output_hidden_states", False))
    if isinstance(wish, bool):
        return frozenset(range(num_blocks + 1)) if wish else frozenset()
    if outside := [index for index in wish if not 0 <= index <= num_blocks]:
        raise UsageError(f"hidden states {outside} were asked for; there are 0 (the embeddings) to {num_blocks}")
    return frozenset(wish)


def _take_wishes(given: dict[str, Any], takes_positions: bool, wanted: frozenset[int], num_blocks: int) -> _Wishes:
    """Take what is meant for the blocks out of a call, and leave what the embeddings need."""
    session, prefixes = _take_past(given)
    mask_BP = given.get("attention_mask")
    if mask_BP is not None and (not isinstance(mask_BP, torch.Tensor) or mask_BP.dim() != 2):
        raise UsageError("an attention mask must be [batch, tokens], 0 for padding; others cannot be sent to servers")
    if given.get("output_attentions"):
        raise UsageError("attention weights stay on the servers; output_attentions cannot be honoured")
    tokens_BT, embeddings_BTD = given.get("input_ids"), given.get("inputs_embeds")
    fed: torch.Tensor | None = tokens_BT if tokens_BT is not None else embeddings_BTD
    if fed is None:
        raise UsageError("the model was called with neither input_ids nor inputs_embeds")
    rows, new = fed.shape[:2]
    position_ids_BT = given.get("position_ids")
    if session is not None:
        mask_BP = session.begin_with(prefixes, mask_BP, new)
        # The base model knows nothing of stored tokens: it is told where the new ones stand, and no mask over all.
        given.pop("attention_mask", None)
        positions_BT = session.next_positions(rows, new, mask_BP)
        if position_ids_BT is not None and not _agree(position_ids_BT.cpu() - session.prefix_tokens, positions_BT):
            raise UsageError(
                "a session counts positions by itself; position_ids that skip or repeat cannot be honoured in it"
            )
        if takes_positions:
            given["position_ids"] = (session.prefix_tokens + positions_BT).clamp(min=0).to(fed.device)
        position_ids_BT = positions_BT
    elif prefixes:
        prefix_tokens = prefixes[0][0].shape[1]
        if mask_BP is not None and mask_BP.shape[1] == prefix_tokens + new:
            mask_BP = given["attention_mask"] = mask_BP[:, prefix_tokens:]
        if takes_positions and position_ids_BT is None:
            given["position_ids"] = torch.arange(prefix_tokens, prefix_tokens + new, device=fed.device)[None]
    taps = tuple(sorted(index - 1 for index in wanted if 1 <= index < num_blocks))
    return _Wishes(mask_BP, position_ids_BT, tokens_BT, session, taps, prefixes)


def _take_past(given: dict[str, Any]) -> tuple[GenerationSession | None, Sequence[tuple[torch.Tensor, torch.Tensor]]]:
    """Take the past out of a call: a session; keys and values that stand before the first token; or both."""
    past = given.pop("past_key_values", None)
    uses_cache = given.pop("use_cache", None)
    if isinstance(past, GenerationSession):
        return past, ()
    generated = _GENERATING.get()
    if generated is not None and (uses_cache or past is not None):
        if past is None or generated.position:  # as when Phi3 changes to its rotary table for long sequences
            generated.reset()
        return generated, _read_prefixes(past)
    return None, _read_prefixes(past)


def _read_prefixes(past: Any) -> Sequence[tuple[torch.Tensor, torch.Tensor]]:
    """Read a cache that does not hold what servers have stored, but what is to stand before the first token."""
    if past is None:
        return ()
    stored: list[tuple[Any, Any]] = [
        (getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in getattr(past, "layers", ())
    ]
    if not stored or not all(isinstance(part, torch.Tensor) and part.dim() == 4 for pair in stored for part in pair):
        raise UsageError(f"a {type(past).__name__} cannot hold what servers hold; use model.session()")
    if any(not torch.equal(part, part[:1].expand_as(part)) for pair in stored for part in pair):
        raise UsageError(
            f"a {type(past).__name__} whose rows differ cannot stand before a batch; use model.session() to go on with "
            "stored tokens"
        )
    return [(keys_BKPW[0], values_BKPW[0]) for keys_BKPW, values_BKPW in stored]


def _agree(position_ids_BT: torch.Tensor, positions_BT: torch.Tensor) -> bool:
    """Say whether two kinds of positions agree wherever there is no padding, which has negative ones."""
    return bool(((position_ids_BT == positions_BT) | (positions_BT < 0)).all())
