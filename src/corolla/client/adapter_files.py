"""Adapters that somebody has trained: found by name, bound to their weights, and put on a model of a swarm."""

import re
from typing import Any

from corolla.client.shelves import SwarmStore
from corolla.errors import AdapterNotFound, UsageError
from corolla.hub import HubConfig
from corolla.sharing import Shelf, bring_files

__all__ = ["load_adapter"]


def load_adapter(model: Any, adapter: str, hub: HubConfig) -> Any:
    """Put an adapter on a model.

    Args:
        model: The model.
        adapter: What :func:`corolla.sharing.bring_files` knows: a directory, an id or name, or ``owner/name``; or the
            first letters of the id of one that servers of the model's swarm hold.
        hub: Where models and adapters are kept.

    Returns:
        The model inside PEFT's class for it, which passes on whatever it does not know.

    Raises:
        UsageError: If PEFT is not installed, or the adapter does not fit the model, or is for another one.
        BadAdapter: If it is no adapter, or damaged, forged or unsafe.
        AdapterNotFound: If nothing goes by that name.
    """
    try:
        files = bring_files(adapter, hub)
    except AdapterNotFound:
        if not re.fullmatch("[0-9a-f]{8,64}", adapter):
            raise
        files = SwarmStore(model.swarm).pull(adapter, Shelf(hub.adapters))
    files.check_base(model.model_id, model.name_or_path, hub)
    try:
        from peft import PeftModel
    except ImportError as error:
        raise UsageError("adapters need PEFT, which is not installed: pip install 'corolla[tuning]'") from error
    try:
        return PeftModel.from_pretrained(model, str(files.directory)).eval()
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(
            f"the adapter in {files.directory} does not fit {model.name_or_path}: {error}; was it made for another "
            "model?"
        ) from error
