"""The model classes: transformers' own, with blocks that run in a swarm.

Embeddings, final norm, head, sampling and whatever trains stay here; hidden states go to the servers and come back.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers

from corolla.blocks import (
    context_tokens,
    decoder_of,
    load_config,
    load_edges,
    needed_edge_keys,
    num_blocks,
    stand_ins_of,
)
from corolla.client.adapter_files import load_adapter
from corolla.client.blocks import RemoteBlocks
from corolla.client.decoder import BlocksCall, attach, generating
from corolla.client.generation import GenerationSession
from corolla.client.sync import Swarm
from corolla.client.target import Target
from corolla.codec import check_preference
from corolla.errors import NoChain, UsageError
from corolla.hub import HubConfig, Progress, Repository, open_repository, stay_silent
from corolla.terms import ModelId, Snapshot, Span
from corolla.wire.limits import MAX_STEP_TOKENS

__all__ = [
    "AutoModelForCausalLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "RemoteModel",
    "only_model",
]


class RemoteModel:
    """What a model of the swarm has on top of its transformers class.

    Attributes:
        swarm: The client's place in the swarm.
        blocks: All blocks as one differentiable module; slice it for a part.
        model_id: Which weights these are.
        context_tokens: The longest sequence that the model was made for.
    """

    swarm: Swarm
    blocks: RemoteBlocks
    model_id: ModelId
    context_tokens: int
    _owns_swarm: bool

    def session(self, max_tokens: int | None = None) -> GenerationSession:
        """Begin a generation that is kept over several calls.

        Args:
            max_tokens: How many tokens each row is expected to reach; servers keep room for them. If ``None``, the
                first ``generate`` says.

        Returns:
            The session; close it, or use it as a context manager.
        """
        return GenerationSession(
            self.swarm, self.blocks.target, context_tokens=self.context_tokens, max_tokens=max_tokens
        )

    def generate(self, *args: Any, session: GenerationSession | None = None, **kwargs: Any) -> Any:
        """Generate tokens as transformers does; see ``GenerationMixin.generate`` for all that it can do.

        Args:
            *args: What transformers takes.
            session: A session to go on with; the prompt is then all tokens so far, and only what is new is sent.
            **kwargs: What transformers takes.

        Raises:
            UsageError: If a cache was passed that is not a session.
            ContextTooLong: If the tokens are more than the model's context.
            NoChain: If some blocks have no server with room for the session.
            PeerError: If a server failed.
        """
        given = session if session is not None else kwargs.pop("past_key_values", None)
        if given is not None and not isinstance(given, GenerationSession):
            raise UsageError(f"a {type(given).__name__} cannot hold what servers hold; use model.session()")
        generate = super().generate  # type: ignore[misc]
        if kwargs.pop("use_cache", True) is False:
            if given is not None:
                raise UsageError("a session was given together with use_cache=False; choose one")
            return generate(*args, use_cache=False, **kwargs)
        if given is None:
            with self.session() as own, generating(own):
                return generate(*args, past_key_values=own, use_cache=True, **kwargs)
        tokens = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        if isinstance(tokens, torch.Tensor):
            given.align(tokens, kwargs.get("attention_mask"))
        with generating(given):
            return generate(*args, past_key_values=given, use_cache=True, **kwargs)

    def close(self) -> None:
        """Leave the swarm, if the model entered it by itself."""
        if self._owns_swarm:
            self.swarm.close()

    def _prepare_cache_for_generation(
        self, generation_config: transformers.GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        # Here transformers knows how long a row can become, so that servers need not keep room for more.
        session = model_kwargs.get("past_key_values")
        if isinstance(session, GenerationSession) and session.max_tokens is None:
            session.max_tokens = generation_config.max_length
        prepare = super()._prepare_cache_for_generation  # type: ignore[misc]
        return prepare(generation_config, model_kwargs, *args, **kwargs)


class _AutoModel:
    """How a model is made; the subclasses say with which head."""

    _auto_class: ClassVar[type]

    @classmethod
    def from_pretrained(  # noqa: PLR0913 - the face of the library
        cls,
        name: str,
        *,
        swarm: Swarm | str | Sequence[str],
        dtype: torch.dtype | None = None,
        adapter: str | Path | None = None,
        codec: str | None = None,
        hub: HubConfig | None = None,
        report: Progress = stay_silent,
    ) -> Any:
        """Load a model's embeddings, norm and head, and use a swarm for its blocks.

        Args:
            name: A Hugging Face model, ``owner/name`` or ``owner/name@revision``; a directory; or ``smollm2``.
            swarm: The swarm, or addresses of its peers: ``tls://host:port``.
            dtype: The number format on this side; ``None`` for the model's own.
            adapter: An adapter to put on it: a directory in PEFT's format, or a published one by its id or name;
                ``None`` for that of the swarm's settings, if there is one.
            codec: How activations travel: ``raw``, ``half``, ``fp16``, ``bf16`` or ``int8``; ``None`` for the swarm's
                own setting.
            hub: Where models are kept.
            report: Hears of downloads.

        Returns:
            An instance of transformers' own class for the model, ``LlamaForCausalLM`` say, that is a
            :class:`RemoteModel` as well; inside PEFT's class if there is an adapter.

        Raises:
            UsageError: If the adapter does not fit, or is for another model.
            ModelError: If the model cannot be found, read or split.
            CodecError: If there is no such codec.
            ConfigError: If an address cannot be read.
            BootstrapFailed: If none of the peers answers.
        """
        hub = hub or HubConfig()
        repository = open_repository(name, config=hub, report=report)
        joined = swarm if isinstance(swarm, Swarm) else Swarm(swarm)
        try:
            model = cls._load(repository, joined, dtype, codec)
            model.name_or_path = model.config.name_or_path = name.partition("@")[0] if repository.revision else name
            model._owns_swarm = joined is not swarm
            chosen = adapter or joined.config.adapter
            return model if chosen is None else load_adapter(model, str(chosen), hub)
        except BaseException:
            if joined is not swarm:
                joined.close()
            raise

    @classmethod
    def _load(cls, repository: Repository, swarm: Swarm, dtype: torch.dtype | None, codec: str | None) -> Any:
        config = load_config(repository.metadata_directory())
        keys = needed_edge_keys(config, repository.weight_map, cls._auto_class)
        directory = repository.fetch({repository.weight_map[key] for key in keys})
        dtype = dtype or getattr(config, "dtype", None) or torch.float32
        check_preference(codec or "raw")
        count = num_blocks(config)
        target = Target(repository.model_id, Span(0, count), codec or swarm.config.codec)
        blocks = RemoteBlocks(swarm, target, dtype)
        model = load_edges(
            directory,
            auto_class=cls._auto_class,
            remote=lambda _: BlocksCall(blocks),
            mixin=RemoteModel,
            dtype=dtype,
        )
        attach(decoder_of(model), count)
        blocks.adapt(stand_ins_of(model))
        model.swarm, model.blocks, model.model_id = swarm, blocks, repository.model_id
        model.context_tokens = context_tokens(config) or MAX_STEP_TOKENS
        return model


class AutoModelForCausalLM(_AutoModel):
    """Makes models that continue text."""

    _auto_class = transformers.AutoModelForCausalLM


class AutoModelForTokenClassification(_AutoModel):
    """Makes models that classify the tokens of texts; the classification head is trained on this side."""

    _auto_class = transformers.AutoModelForTokenClassification


class AutoModelForSequenceClassification(_AutoModel):
    """Makes models that classify texts; the classification head is trained on this side."""

    _auto_class = transformers.AutoModelForSequenceClassification


def only_model(snapshot: Snapshot) -> str:
    """Name the one model that a swarm serves.

    Args:
        snapshot: What is seen of the swarm.

    Raises:
        NoChain: If it serves none.
        UsageError: If it serves several.
    """
    names = {server.model: server.model_name for server in snapshot.announcements}
    if not names:
        raise NoChain("the swarm has no server yet, so there is no model to use; try again when one has joined")
    if len(names) > 1:
        raise UsageError(f"the swarm serves {len(names)} models; name one of them: {', '.join(sorted(names.values()))}")
    return next(iter(names.values()))
