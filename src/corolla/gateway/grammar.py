"""Answers that must have a form: JSON, JSON of a schema, or calls of tools; enforced token by token by llguidance."""

# V vocabulary

import json
import threading
from collections.abc import Mapping
from typing import Any

import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer

from corolla.errors import InternalError, InvalidRequest

__all__ = ["Form", "Grammars", "Matcher", "json_form"]

Form = str
"""A grammar, as llguidance takes it."""

_OPTIONS = {"whitespace_flexible": True, "whitespace_pattern": "[ \\n\\t]{0,8}"}  # a model can get lost in spaces


def json_form(schema: Mapping[str, Any]) -> Form:
    """Give the form of JSON that a schema describes.

    Args:
        schema: A JSON schema.
    """
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=_OPTIONS)  # type: ignore[arg-type]


class Grammars:
    """What a tokenizer's tokens can be held to. Any number of threads may use it.

    Args:
        tokenizer: The model's own.
        vocabulary: How many tokens the head has a number for.
    """

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:  # noqa: ANN401 - transformers has no types
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._lock = threading.Lock()
        self._made: LLTokenizer | None = None

    def check(self, form: Form, field: str) -> None:
        """Find out whether a form can be enforced.

        Args:
            form: What an answer should be.
            field: Where the form comes from.

        Raises:
            InvalidRequest: If it cannot be, and why.
        """
        is_wrong, why = LLMatcher.validate_grammar_with_warnings(form, self._tokens(field))
        if is_wrong:
            raise InvalidRequest(f"{field} cannot be enforced: {why[0]}", field=field)

    def start(self, form: Form) -> "Matcher":
        """Begin an answer of a form that was checked."""
        return Matcher(LLMatcher(self._tokens("response_format"), form))

    def _tokens(self, field: str) -> LLTokenizer:
        with self._lock:
            if self._made is None:
                try:
                    self._made = from_tokenizer(self._tokenizer, n_vocab=self._vocabulary)
                except ValueError as error:
                    raise InvalidRequest(
                        f"{field} cannot be enforced with the tokenizer of this model: {error}", field=field
                    ) from error
            return self._made


class Matcher:
    """How far an answer has come in its form."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def allowed(self) -> torch.Tensor:
        """Say of each token whether it can be next: ``[V]``, true or false.

        Raises:
            InternalError: If none can.
        """
        if self._matcher.is_error():
            raise InternalError(f"the form of an answer was lost: {self._matcher.get_error()}")
        return torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8) > 0

    def take(self, token: int) -> None:
        """Note the next token."""
        self._matcher.consume_token(token)
