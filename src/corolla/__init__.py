"""Corolla runs and fine-tunes language models too large for one machine, by pooling many over the internet.

This is the façade: the names that a library user needs, each loaded when it is first used. It must not know how
anything works, and importing it does nothing else.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from corolla import errors
    from corolla.client import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        Swarm,
    )
    from corolla.server import Server

__all__ = [
    "AutoModelForCausalLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "Server",
    "Swarm",
    "__version__",
    "errors",
]

__version__ = "0.1.0"

# By name, so that the façade is a dependency of no room and has none itself.
_HOMES = {
    "AutoModelForCausalLM": "corolla.client",
    "AutoModelForSequenceClassification": "corolla.client",
    "AutoModelForTokenClassification": "corolla.client",
    "Server": "corolla.server",
    "Swarm": "corolla.client",
    "errors": "corolla.errors",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'corolla' has no attribute {name!r}")
    home = _HOMES[name]
    try:
        module = importlib.import_module(home)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "corolla":
            raise
        raise ImportError(
            f"corolla.{name} needs the package {error.name}, which is not installed; "
            "install what serving and using models needs with: pip install 'corolla[torch]'",
            name=error.name,
        ) from error
    return module if name == "errors" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
