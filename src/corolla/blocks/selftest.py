"""Whether a family's blocks run exactly when they are cut into spans: asked of a tiny model of the same architecture.

A server asks before it serves a model. Knows how to compare, not what to do about the answer.
"""

# B batch, T tokens, D model width, N packed tokens

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from corolla.blocks.architecture import BUILDING, blocks_of, hidden_size, model_class, num_blocks, text_config
from corolla.blocks.kv import GrowingKV, PackedRow
from corolla.blocks.shell import prune
from corolla.blocks.span import BlockSpan
from corolla.blocks.zoo import shrink_config
from corolla.errors import UnsupportedModel
from corolla.terms import Span

__all__ = ["FamilyReport", "build_tiny", "check_family", "split_model"]

_SEED = 20
_PROMPT_TOKENS = 11
_DECODE_TOKENS = 3
_PADDED_TOKENS = 3

PACKED_TOLERANCE = 1e-5
"""How far the packed path may be from the exact one, in float32, relative to the largest number of the output.

Other kernels add the same products in another order, which moves a result by some 1e-7 in each tiny block."""

_FOREIGN_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True, slots=True)
class FamilyReport:
    """What the self-test found.

    Args:
        is_supported: Whether the spans gave exactly what the whole model gives.
        is_packable: Whether the packed path agrees with the exact one.
        is_lean: Whether lean blocks agree with it as well (``blocks/lean.py``).
        can_rewind: Whether a session can be taken back to an earlier position.
        reason: Why it is not supported or else not packable; empty if it is both.
    """

    is_supported: bool
    is_packable: bool
    is_lean: bool
    can_rewind: bool
    reason: str

    @classmethod
    def unsupported(cls, reason: str) -> "FamilyReport":
        """Report a family whose blocks cannot be cut apart."""
        return cls(is_supported=False, is_packable=False, is_lean=False, can_rewind=False, reason=reason)


def check_family(config: PreTrainedConfig) -> FamilyReport:
    """Compare three spans of a tiny model of this architecture with the whole; takes a second or two on one core.

    Args:
        config: The configuration of the model that is to be served, of any size.
    """
    if obstacle := _find_obstacle(text_config(config)):
        return FamilyReport.unsupported(obstacle)
    # The caller's dice, and whether it wants gradients, are its own.
    with torch.random.fork_rng(devices=[]), torch.inference_mode(mode=False), torch.enable_grad():
        try:
            model = build_tiny(config)
            spans = split_model(model)
            failed = [name for name, is_equal in _compare_exact(model, spans) if not is_equal]
        except UnsupportedModel as error:
            return FamilyReport.unsupported(error.message)
        except _FOREIGN_ERRORS as error:
            return FamilyReport.unsupported(f"{type(error).__name__}: {error}")
        if failed:
            return FamilyReport.unsupported(f"the spans differ from the whole model in {', '.join(failed)}")
        can_rewind = all(span.can_rewind for span in spans)
        reason = _why_not_packable(spans) if can_rewind else "it keeps a running state, which has no rows"
        is_lean = not reason and _is_lean(spans)
    return FamilyReport(True, not reason, is_lean, can_rewind, reason)


def _find_obstacle(config: PreTrainedConfig) -> str:
    # Known from the configuration; the comparison would find it as well, but could not put it into words.
    if getattr(config, "hidden_size_per_layer_input", None):
        return "its blocks also take the embeddings of the tokens, which do not travel from server to server"
    if getattr(config, "num_kv_shared_layers", None):
        return "some of its blocks use the keys and values of others, which may be on another server"
    return ""


def build_tiny(config: PreTrainedConfig) -> PreTrainedModel:
    """A whole tiny model of this architecture, with random weights, always the same; it seeds torch.

    Raises:
        UnsupportedModel: If transformers cannot build it.
    """
    tiny = shrink_config(config)
    torch.manual_seed(_SEED)
    try:
        with BUILDING:
            model = model_class(tiny)(tiny)
    except _FOREIGN_ERRORS as error:
        raise UnsupportedModel(f"a small {config.model_type} cannot be built: {error}") from error
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases start out as ones and zeros, which would hide mistakes
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


def split_model(
    model: PreTrainedModel,
    spans: Sequence[Span] | None = None,
    *,
    is_packable: bool = False,
    is_lean: bool = False,
) -> list[BlockSpan]:
    """Cut a model into spans that share its weights; the model stays as it is.

    Args:
        model: A whole model.
        spans: Where to cut; ``None`` for the first block, those in the middle, and the last.
        is_packable: What the spans are to say of themselves.
        is_lean: Whether their packed tokens go through lean blocks.
    """
    count = num_blocks(model.config)
    parts = []
    cuts = sorted({0, min(1, count), max(1, count - 1), count})
    for span in spans or [Span(start, stop) for start, stop in pairwise(cuts)]:
        twin = _twin(model)
        prune(twin, span)
        parts.append(BlockSpan(twin, span, is_packable=is_packable, is_lean=is_lean))
    return parts


def _twin(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with the same weights: for what keeps a state of its own, such as rotary tables that grow."""
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})


class _Whole:
    """The whole model, watched: what enters its first block and what leaves its last."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._decoder, name = blocks_of(model)
        blocks: Any = getattr(self._decoder, name)
        blocks[0].register_forward_pre_hook(self._enter, with_kwargs=True)
        blocks[-1].register_forward_hook(self._leave)
        self._first: Tensor | None = None
        self._last: Tensor | None = None
        self.past: Any = None

    def run(self, ids_BT: Tensor, *, use_cache: bool = False, **inputs: Any) -> tuple[Tensor, Tensor]:
        output = self._decoder(input_ids=ids_BT, past_key_values=self.past, use_cache=use_cache, **inputs)
        self.past = output.past_key_values if use_cache else None
        assert self._first is not None
        assert self._last is not None
        return self._first, self._last

    def _enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._first = (args[0] if args else kwargs["hidden_states"]).detach().requires_grad_(torch.is_grad_enabled())
        return ((self._first, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": self._first})

    def _leave(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._last = output if isinstance(output, Tensor) else output[0]


def _compare_exact(model: PreTrainedModel, spans: list[BlockSpan]) -> Iterator[tuple[str, bool]]:
    ids_BT = torch.randint(3, 128, (2, _PROMPT_TOKENS + _DECODE_TOKENS))
    yield from _compare_gradient(_Whole(_twin(model)), spans, ids_BT)
    mask_BT = torch.ones_like(ids_BT)
    with torch.inference_mode():
        yield from _compare_session(_Whole(_twin(model)), spans, ids_BT, None)
        mask_BT[0, :_PADDED_TOKENS] = 0
        yield from _compare_session(_Whole(_twin(model)), spans, ids_BT, mask_BT)


def _compare_gradient(whole: _Whole, spans: list[BlockSpan], ids_BT: Tensor) -> Iterator[tuple[str, bool]]:
    first_BTD, last_BTD = whole.run(ids_BT)
    upstream_BTD = torch.randn_like(last_BTD)
    (expected_BTD,) = torch.autograd.grad(last_BTD, first_BTD, upstream_BTD)
    hidden_BTD = first_BTD.detach().requires_grad_()
    output_BTD = hidden_BTD
    for span in spans:
        output_BTD, _ = span.forward(output_BTD)
    yield "a forward pass", torch.equal(output_BTD, last_BTD)
    yield "its gradient", torch.equal(torch.autograd.grad(output_BTD, hidden_BTD, upstream_BTD)[0], expected_BTD)


def _compare_session(
    whole: _Whole, spans: list[BlockSpan], ids_BT: Tensor, mask_BT: Tensor | None
) -> Iterator[tuple[str, bool]]:
    caches = [span.new_cache() for span in spans]
    steps = [slice(0, _PROMPT_TOKENS), *(slice(t, t + 1) for t in range(_PROMPT_TOKENS, ids_BT.shape[1]))]
    for step in steps:
        inputs: dict[str, Any] = {} if mask_BT is None else {"attention_mask": mask_BT[:, : step.stop]}
        positions_BT = None if mask_BT is None else (mask_BT.cumsum(1) - 1).clamp(min=0)[:, step]
        if spans[0].takes_positions:
            inputs["position_ids"] = positions_BT
        first_BTD, last_BTD = whole.run(ids_BT[:, step], use_cache=True, **inputs)
        hidden_BTD = first_BTD
        for span, cache in zip(spans, caches, strict=True):
            hidden_BTD, _ = span.forward(
                hidden_BTD, attention_mask_BT=inputs.get("attention_mask"), position_ids_BT=positions_BT, cache=cache
            )
        shown_BT = slice(None) if mask_BT is None else mask_BT[:, step].bool()
        name = f"{'a padded' if mask_BT is not None else 'a'} {'prompt' if step.start == 0 else 'decoded token'}"
        yield name, torch.equal(hidden_BTD[shown_BT], last_BTD[shown_BT])


def _is_lean(spans: list[BlockSpan]) -> bool:
    if not all(span.can_be_lean for span in spans):
        return False
    for span in spans:
        span.make_lean()
    return not _why_not_packable(spans)


def _why_not_packable(spans: list[BlockSpan]) -> str:
    """Compare the packed path with the exact one, on rows that begin, go on and decode side by side."""
    counts = ((9, 5, 12), (1, 7, 1), (6, 1, 1))  # new tokens of each row in each run; some prompts exceed a tiny window
    hidden = torch.randn(len(counts[0]), sum(map(max, counts)), hidden_size(spans[0].config), dtype=spans[0].dtype)
    starts = [0] * len(counts[0])
    stores = [[GrowingKV() for _ in starts] for _ in spans]
    caches = [[span.new_cache() for _ in starts] for span in spans]
    try:
        with torch.inference_mode():
            for run in counts:
                pieces = [
                    hidden[row, start : start + count]
                    for row, (start, count) in enumerate(zip(starts, run, strict=True))
                ]
                packed_ND = torch.cat(pieces)
                for span, kvs, rows in zip(spans, stores, caches, strict=True):
                    packed = [PackedRow(start, count, kv) for start, count, kv in zip(starts, run, kvs, strict=True)]
                    packed_ND, _ = span.forward_packed(packed_ND, packed)
                    pieces = [
                        span.forward(piece[None], cache=cache)[0][0] for piece, cache in zip(pieces, rows, strict=True)
                    ]
                exact_ND = torch.cat(pieces)
                error = float((packed_ND - exact_ND).abs().max() / exact_ND.abs().max())
                if not error <= PACKED_TOLERANCE:
                    return f"packed rows differ from single ones by {error:.1e} of the largest number"
                starts = [start + count for start, count in zip(starts, run, strict=True)]
    except UnsupportedModel as error:
        return error.message
    except _FOREIGN_ERRORS as error:
        return f"its attention needs a mask or a cache of the family's own ({type(error).__name__}: {error})"
    return ""
