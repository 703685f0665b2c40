"""Which models the gateway offers, by the names that requests say."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from corolla.client import AutoModelForCausalLM, Swarm, only_model
from corolla.errors import ModelNotFound, UsageError, WrongBase
from corolla.gateway.grammar import Grammars
from corolla.gateway.sampling import Sampling
from corolla.hub import HubConfig, Progress, load_tokenizer, open_repository
from corolla.sharing import AdapterFiles, bring_files

__all__ = ["Catalog", "Offer"]


@dataclass(frozen=True, slots=True)
class Offer:
    """A model, or a model with an adapter, under the name that requests say.

    Args:
        name: What requests say.
        model: The model of the swarm: a :class:`corolla.client.RemoteModel`.
        tokenizer: Its tokenizer.
        grammars: What its tokens can be held to.
        defaults: How it chooses tokens where a request says nothing.
        end_tokens: With which it ends an answer.
        made_s: Since when it is offered, in seconds since 1970.
        adapter: The name of the adapter that its servers use; ``None`` for none.
    """

    name: str
    model: Any
    tokenizer: PreTrainedTokenizerBase
    grammars: Grammars
    defaults: Sampling
    end_tokens: frozenset[int]
    made_s: int
    adapter: str | None = None

    @property
    def context_tokens(self) -> int:
        """The longest sequence that it was made for."""
        return int(self.model.context_tokens)

    @property
    def vocabulary(self) -> int:
        """How many tokens its head has a number for."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    def decode(self, tokens: Sequence[int], *, skip_special: bool = True) -> str:
        """Spell tokens."""
        text = self.tokenizer.decode(list(tokens), skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)
        return str(text)


class Catalog:
    """All that a gateway offers.

    Args:
        offers: The models, each under a name of its own.
    """

    def __init__(self, offers: Sequence[Offer]) -> None:
        self._offers = {offer.name: offer for offer in offers}

    def find(self, name: str) -> Offer:
        """Find what a request names.

        Raises:
            ModelNotFound: If it is not offered.
        """
        offer = self._offers.get(name)
        if offer is None:
            raise ModelNotFound(f"the model {name!r} is not offered here; there are: {', '.join(self._offers)}")
        return offer

    def all(self) -> list[Offer]:
        """List what is offered."""
        return list(self._offers.values())

    @classmethod
    def load(
        cls, names: Sequence[str], swarm: Swarm, *, adapters: Sequence[str] = (), hub: HubConfig, report: Progress
    ) -> "Catalog":
        """Load what a gateway keeps of some models: embeddings, norm, head and tokenizer.

        Args:
            names: The models; none for the only one that the swarm has.
            swarm: Where their blocks are.
            adapters: Adapters of these models, each of which is offered as ``MODEL:ADAPTER`` as well.
            hub: Where models are kept.
            report: Hears of downloads.

        Raises:
            UsageError: If no name is given and the swarm has several models, or two adapters have the same name.
            WrongBase: If an adapter is for none of the models.
            Error: What loading a model or an adapter raises.
        """
        chosen = dict.fromkeys(names or [only_model(swarm.snapshot())])
        plain = [_offer(name, swarm, hub, report) for name in chosen]
        adapted = [_adapted(bring_files(adapter, hub), plain, swarm, hub) for adapter in adapters]
        if len({offer.name for offer in adapted}) < len(adapted):
            raise UsageError(f"two adapters would have the same name: {', '.join(offer.name for offer in adapted)}")
        return cls([*plain, *adapted])


def _offer(name: str, swarm: Swarm, hub: HubConfig, report: Progress) -> Offer:
    model = AutoModelForCausalLM.from_pretrained(name, swarm=swarm, hub=hub, report=report)
    tokenizer = load_tokenizer(open_repository(name, config=hub))
    own: GenerationConfig = model.generation_config
    ends = own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id
    end_tokens = frozenset([] if ends is None else [ends] if isinstance(ends, int) else ends)
    # What the model's author recommends is part of the defaults below; transformers must not apply it once more.
    pad = own.pad_token_id if own.pad_token_id is not None else next(iter(end_tokens), 0)
    model.generation_config = GenerationConfig(eos_token_id=sorted(end_tokens) or None, pad_token_id=pad)
    model.requires_grad_(False)
    vocabulary = int(model.get_output_embeddings().weight.shape[0])
    return Offer(name, model, tokenizer, Grammars(tokenizer, vocabulary), _defaults(own), end_tokens, int(time.time()))


def _adapted(files: AdapterFiles, plain: Sequence[Offer], swarm: Swarm, hub: HubConfig) -> Offer:
    """Offer an adapter of one of the models, which go on as they are."""
    if files.method != "lora":
        raise UsageError(f"{files.label} is {files.method}; a gateway offers LoRA alone, corolla chat any adapter")
    refusals = []
    for offer in plain:
        try:
            files.check_base(offer.model.model_id, offer.name, hub)
        except WrongBase as error:
            refusals.append(error.message)
            continue
        adapter = str(files.directory)
        model = AutoModelForCausalLM.from_pretrained(offer.name, swarm=swarm, adapter=adapter, hub=hub)
        model.generation_config = offer.model.generation_config
        model.requires_grad_(False)
        for edge in ("get_input_embeddings", "get_output_embeddings"):  # one copy serves all
            own, shared = getattr(model, edge)(), getattr(offer.model, edge)()
            if type(own) is type(shared):
                own.weight = shared.weight
        name = files.directory.name if files.card is None else files.card.name
        return replace(offer, name=f"{offer.name}:{name}", model=model, made_s=int(time.time()), adapter=files.label)
    raise WrongBase("; ".join(refusals))


def _defaults(config: GenerationConfig) -> Sampling:
    """Read how the model's author has it choose tokens; where nothing is said, as OpenAI's API does."""

    def said(name: str, otherwise: float) -> float:
        value = getattr(config, name, None)
        return otherwise if value is None or isinstance(value, torch.Tensor) else float(value)

    return Sampling(
        temperature=said("temperature", 1.0),
        top_p=said("top_p", 1.0),
        top_k=int(said("top_k", 0)) or None if config.do_sample else None,
        min_p=said("min_p", 0.0),
        repetition_penalty=said("repetition_penalty", 1.0),
    )
