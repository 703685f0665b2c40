"""What a change does to a model's predictions: perplexity, divergence and agreement with the unchanged model."""

# T tokens, V vocabulary

import statistics
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Quality"]


@dataclass
class Quality:
    """What was found of some windows of text."""

    losses: list[float] = field(default_factory=list)
    divergences: list[float] = field(default_factory=list)
    agreements: list[float] = field(default_factory=list)

    def note(self, scores_TV: Tensor, reference_TV: Tensor, tokens_T: Tensor) -> None:
        """Add a window.

        Args:
            scores_TV: Logarithms of the probabilities of each next token.
            reference_TV: Those of the unchanged model.
            tokens_T: The text.
        """
        self.losses.append(F.nll_loss(scores_TV[:-1], tokens_T[1:]).item())
        self.divergences.append((reference_TV.exp() * (reference_TV - scores_TV)).sum(-1).mean().item())
        self.agreements.append((reference_TV.argmax(-1) == scores_TV.argmax(-1)).float().mean().item())

    @property
    def perplexity(self) -> float:
        """Of the text so far."""
        return float(torch.tensor(self.losses).mean().exp())

    @property
    def divergence(self) -> float:
        """Of the next token, from that of the unchanged model, in nats."""
        return statistics.mean(self.divergences)

    @property
    def agreement(self) -> float:
        """How often the best next token is the same."""
        return statistics.mean(self.agreements)
