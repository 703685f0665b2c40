"""Choosing the next token: penalties, biases, a form, the dice; and the log probabilities of what was chosen.

It runs as the last logits processor of transformers' ``generate``, which then takes what is likeliest: the one that was
chosen here. So each answer has dice of its own, and a seed means the same whatever else runs in other threads.
"""

# B batch (always 1), P prompt and answer so far, V vocabulary

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from corolla.gateway.grammar import Matcher

__all__ = ["Chooser", "Sampling", "TokenLog", "log_tokens"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen.

    Args:
        temperature: 0 for always the likeliest.
        top_p: Only from the likeliest that together have this probability.
        top_k: Only from so many; ``None`` for any.
        min_p: Only from those with this share of the likeliest one's probability.
        frequency_penalty: Taken off a token's logit each time that the answer has it.
        presence_penalty: Taken off once.
        repetition_penalty: Divides the logits of tokens that prompt or answer have.
        bias: Added to logits, by token.
        seed: Of the dice; ``None`` for another one each time.
        logprobs: How many of the likeliest tokens to tell with each one that was chosen; ``None`` to tell nothing.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None
    logprobs: int | None = None


class TokenLog(NamedTuple):
    """A token and how likely the model thought it.

    Args:
        token: Its id.
        logprob: The natural logarithm of its probability; ``None`` for the first of a text.
        top: The likeliest tokens at its place, with theirs.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


class Chooser(LogitsProcessor):  # type: ignore[misc]  # transformers has no types
    """Chooses the tokens of one answer.

    Args:
        sampling: How.
        prompt_tokens: Where the answer begins.
        matcher: The form that it must have.

    Attributes:
        logs: What was chosen, if it is to be told.
    """

    def __init__(self, sampling: Sampling, prompt_tokens: int, matcher: Matcher | None) -> None:
        self._sampling = sampling
        self._prompt_tokens = prompt_tokens
        self._matcher = matcher
        self._counts: Counter[int] = Counter()
        self._seen = prompt_tokens
        self._dice = torch.Generator()
        if sampling.seed is None:
            self._dice.seed()
        else:
            self._dice.manual_seed(sampling.seed % 2**63)
        self._penalty = (
            RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty) if sampling.repetition_penalty != 1 else None
        )
        self._warpers = _warpers(sampling)
        penalties = sampling.frequency_penalty, sampling.presence_penalty
        self._adjusts = any(penalties) or bool(sampling.bias) or self._penalty is not None or matcher is not None
        self.logs: list[TokenLog] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Choose the next token.

        Args:
            input_ids: ``[1, P]``.
            scores: ``[1, V]``, the model's logits.

        Returns:
            The given tensor, now zeros, and one at the token.
        """
        logits_V = scores[0].float().cpu()
        adjusted_V = self._adjusted(input_ids, logits_V)
        if self._sampling.temperature == 0:
            token = int(adjusted_V.argmax())
        else:
            warped_BV = adjusted_V[None]
            for warper in self._warpers:
                warped_BV = warper(input_ids, warped_BV)
            token = int(torch.multinomial(warped_BV[0].softmax(0), 1, generator=self._dice))
        if self._matcher is not None:
            self._matcher.take(token)
        if self._sampling.logprobs is not None:
            self.logs += log_tokens(logits_V[None], [token], self._sampling.logprobs)
        scores.zero_()[0, token] = 1
        return scores

    def _adjusted(self, input_ids: torch.Tensor, logits_V: torch.Tensor) -> torch.Tensor:
        if not self._adjusts:
            return logits_V
        sampling, adjusted_V = self._sampling, logits_V.clone()
        if self._penalty is not None:
            adjusted_V = self._penalty(input_ids.cpu(), adjusted_V[None])[0]
        if sampling.frequency_penalty or sampling.presence_penalty:
            self._counts.update(input_ids[0, self._seen :].tolist())
            self._seen = input_ids.shape[1]
            tokens = torch.tensor(list(self._counts), dtype=torch.long)
            counts = torch.tensor(list(self._counts.values()), dtype=torch.float32)
            adjusted_V[tokens] -= sampling.frequency_penalty * counts + sampling.presence_penalty
        for token, bias in sampling.bias.items():
            adjusted_V[token] += bias
        if self._matcher is not None:
            adjusted_V.masked_fill_(~self._matcher.allowed()[: len(adjusted_V)], -torch.inf)
        return adjusted_V


def log_tokens(logits_TV: torch.Tensor, tokens: Sequence[int], top: int) -> list[TokenLog]:
    """Say how likely tokens were.

    Args:
        logits_TV: The model's logits at their places.
        tokens: The tokens.
        top: How many of the likeliest tokens to tell with each.
    """
    logprobs_TV = logits_TV.float().log_softmax(-1)
    own_T = logprobs_TV.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()
    values_TK, ids_TK = logprobs_TV.topk(min(top, logprobs_TV.shape[1]), dim=-1)
    tops = zip(ids_TK.tolist(), values_TK.tolist(), strict=True)
    return [
        TokenLog(token, own, tuple(zip(ids, values, strict=True)))
        for token, own, (ids, values) in zip(tokens, own_T, tops, strict=True)
    ]


def _warpers(sampling: Sampling) -> list[LogitsProcessor]:
    warpers: list[LogitsProcessor] = []
    if sampling.temperature == 0:
        return warpers
    if sampling.temperature != 1:
        warpers.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    return warpers
