"""Asking a model of a swarm, without a terminal: what a question costs and what comes back.

Owns the client's side of a chat: the swarm, the model, one session over all turns. Knows nothing of how it is shown.
"""

# B batch (always 1), T tokens

import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

from corolla.blocks import compute_dtype, context_tokens, weight_format
from corolla.cli.answers import Answer, Cost
from corolla.cli.config import ChatConfig
from corolla.cli.settings import Settings
from corolla.cli.state import with_state
from corolla.client import AutoModelForCausalLM, ClientConfig, GenerationSession, Swarm, Trace, only_model
from corolla.errors import ContextTooLong, Error, UsageError
from corolla.hub import HubConfig, Progress, load_tokenizer, open_repository
from corolla.swarm import SwarmConfig
from corolla.terms import Chain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Conversation"]


class Conversation:
    """Turns of questions and answers with one model. Use it as a context manager; one call at a time.

    Args:
        settings: Whom to ask, and how.
        report: Hears of downloads.
        peers: Addresses of peers to start from, instead of those in the settings.

    Attributes:
        name: How the model is called.
        chain: The servers of the present session; ``None`` before the first answer.

    Raises:
        UsageError: If the swarm has several models and none is named.
        Error: What joining the swarm or loading the model raises.
    """

    def __init__(self, settings: Settings, report: Progress, peers: Sequence[str] = ()) -> None:
        self._config = settings.get(ChatConfig)
        if self._config.threads:
            torch.set_num_threads(self._config.threads)
        client, hub = settings.get(ClientConfig), settings.get(HubConfig)
        swarm = with_state(settings.get(SwarmConfig))
        self._swarm = Swarm(peers or self._config.peers, config=client, swarm_config=swarm)
        try:
            self.name = self._config.model or only_model(self._swarm.snapshot())
            self._model = AutoModelForCausalLM.from_pretrained(
                self.name,
                swarm=self._swarm,
                dtype=compute_dtype(weight_format(client.precision)) if client.precision else None,
                hub=hub,
                report=report,
            )
            self._tokenizer: PreTrainedTokenizerBase = load_tokenizer(open_repository(self.name, config=hub))
        except BaseException:
            self._swarm.close()
            raise
        self._context_tokens = context_tokens(self._model.config)
        self._session: GenerationSession | None = None
        self._messages: list[dict[str, str]] = []
        self._is_stopped = False
        self.forget()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_session()
        self._swarm.close()

    @property
    def chain(self) -> Chain | None:
        """The servers of the present session."""
        return None if self._session is None else self._session.chain

    @property
    def trace(self) -> Trace:
        """What happened in the present session, in order."""
        return Trace() if self._session is None else self._session.trace

    @property
    def system(self) -> str | None:
        """What the model was told before the first question."""
        return self._messages[0]["content"] if self._messages and self._messages[0]["role"] == "system" else None

    def forget(self, system: str | None = None) -> None:
        """Begin again.

        Args:
            system: What to tell the model first; ``None`` for what the settings say.
        """
        system = system or self._config.system
        self._messages = [{"role": "system", "content": system}] if system else []

    @property
    def messages(self) -> list[dict[str, str]]:
        """What was said so far: for each message its ``role`` and ``content``."""
        return [dict(message) for message in self._messages]

    def restore(self, messages: Sequence[Mapping[str, str]]) -> None:
        """Go on from another chat.

        Args:
            messages: What was said in it.
        """
        self._messages = [dict(message) for message in messages]

    def rewind(self, turns: int) -> str:
        """Forget the last questions and what was answered.

        Args:
            turns: How many.

        Returns:
            The first question that was forgotten.

        Raises:
            UsageError: If there are not so many.
        """
        asked = [place for place, message in enumerate(self._messages) if message["role"] == "user"]
        if turns > len(asked):
            raise UsageError(f"{len(asked)} questions were asked, so {turns} cannot be taken back")
        place = asked[-turns]
        question = self._messages[place]["content"]
        del self._messages[place:]
        return question

    @property
    def is_stopped(self) -> bool:
        """Whether the answer under way was told to end."""
        return self._is_stopped

    def stop(self) -> None:
        """End the answer under way after its next token. Any thread may ask for it."""
        self._is_stopped = True

    def ask(self, question: str, show: Callable[[str], None]) -> Answer:
        """Ask as the next turn of the chat; what is already known to the servers is not sent again.

        Args:
            question: In words.
            show: Gets the answer piece by piece.

        Raises:
            UsageError: If the model's tokenizer has no chat template.
            ContextTooLong: If the chat no longer fits the model.
            Error: What the swarm raises; the chat is then as it was before the question.
        """
        if self._tokenizer.chat_template is None:
            raise UsageError(f"{self.name} has no chat template, so it was not made to chat; use: corolla generate")
        messages = [*self._messages, {"role": "user", "content": question}]
        tokens_BT = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        answer = self._generate(tokens_BT, show)
        self._messages = [*messages, {"role": "assistant", "content": answer.text}]
        return answer

    def complete(self, prompt: str, show: Callable[[str], None]) -> Answer:
        """Continue a text as it is.

        Args:
            prompt: The text.
            show: Gets the continuation piece by piece.

        Raises:
            UsageError: If the text has no tokens.
            ContextTooLong: If it does not fit the model.
            Error: What the swarm raises.
        """
        tokens_BT = self._tokenizer(prompt, return_tensors="pt").input_ids
        if tokens_BT.shape[1] == 0:
            raise UsageError("there is nothing to continue; give a prompt")
        return self._generate(tokens_BT, show)

    def _generate(self, tokens_BT: torch.Tensor, show: Callable[[str], None]) -> Answer:
        self._is_stopped = False
        started_at_s = time.perf_counter()
        prompt = tokens_BT.shape[1]
        room = (self._context_tokens or prompt + self._config.max_new_tokens) - prompt
        if room < 1:
            raise ContextTooLong(
                f"{prompt} tokens leave no room for an answer: {self.name} takes {self._context_tokens} in all; "
                "shorten the text, or begin a new chat"
            )
        limit = min(self._config.max_new_tokens, room)
        session = self._session_for(prompt + limit)
        earlier = len(session.replays)
        streamer = _Streamer(self._tokenizer, show)
        if self._config.seed is not None:
            torch.manual_seed(self._config.seed)
        try:
            output_BT = self._model.generate(
                tokens_BT,
                attention_mask=torch.ones_like(tokens_BT),
                session=session,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([_Stop(self)]),
                max_new_tokens=limit,
                **_sampling(self._config),
            )
        except Error:
            self._end_session()
            raise
        tokens = output_BT.shape[1] - prompt
        decode_s = streamer.last_at_s - streamer.first_at_s
        cost = Cost(
            tokens=tokens,
            ttft_s=streamer.first_at_s - started_at_s,
            tokens_per_s=(tokens - 1) / decode_s if tokens > 1 else None,
            chain=session.chain,
            timings=session.timings,
            replays=session.replays[earlier:],
        )
        return Answer(self._tokenizer.decode(output_BT[0, prompt:], skip_special_tokens=True), cost)

    def _session_for(self, tokens: int) -> GenerationSession:
        """Give the session of this chat, or a roomier one: its servers are then sent everything once more."""
        if self._session is None or (self._session.max_tokens or 0) < tokens:
            self._end_session()
            expected = max(2 * tokens, self._swarm.config.max_tokens)
            self._session = self._model.session(max_tokens=min(expected, self._context_tokens or expected))
        return self._session

    def _end_session(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()


class _Streamer(TextStreamer):  # type: ignore[misc]  # transformers has no types
    """Shows the new text and notes when tokens come."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._show = show
        self._puts = 0
        self.first_at_s = self.last_at_s = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        self._puts += 1  # the prompt is the first
        self.last_at_s = time.perf_counter()
        if self._puts == 2:
            self.first_at_s = self.last_at_s
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._show(text)


class _Stop(StoppingCriteria):  # type: ignore[misc]  # transformers has no types
    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        return torch.full((len(input_ids),), self._conversation.is_stopped)


def _sampling(config: ChatConfig) -> dict[str, object]:
    """Say how to choose tokens, as ``generate`` takes it; nothing if the model's own way is wanted."""
    if config.greedy:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    given = {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}
    chosen: dict[str, object] = {name: value for name, value in given.items() if value is not None}
    return {"do_sample": True, **chosen} if chosen else {}
