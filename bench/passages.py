"""Real text for what is measured on language: the documentation of Python's own standard library."""

# W windows, T tokens

import importlib
import inspect
from typing import Any

from torch import Tensor

__all__ = ["token_windows"]

_MODULES = (
    "argparse", "logging", "heapq", "pickle", "random", "decimal", "statistics", "threading", "typing", "functools",
    "datetime", "bisect", "textwrap", "inspect", "dis", "ast", "tarfile", "shlex",
)  # fmt: skip


def token_windows(tokenizer: Any, windows: int, window_tokens: int) -> Tensor:
    """Cut the text into windows of tokens, ``[W, T]``.

    Args:
        tokenizer: The model's.
        windows: How many.
        window_tokens: How long each of them is.
    """
    text = "\n".join(inspect.getdoc(importlib.import_module(name)) or "" for name in _MODULES)
    tokens_T: Tensor = tokenizer(text, return_tensors="pt").input_ids[0, : windows * window_tokens]
    return tokens_T.view(windows, window_tokens)
