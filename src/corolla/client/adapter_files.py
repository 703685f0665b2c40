"""Adapters that somebody has trained, from a directory in PEFT's format onto a model whose blocks are elsewhere."""

from pathlib import Path
from typing import Any

from corolla.errors import UsageError

__all__ = ["load_adapter"]


def load_adapter(model: Any, adapter: str | Path) -> Any:
    """Put an adapter on a model.

    Args:
        model: The model.
        adapter: A directory with ``adapter_config.json`` and ``adapter_model.safetensors``; a pickle is never read.

    Returns:
        The model inside PEFT's class for it, which passes on whatever it does not know.

    Raises:
        UsageError: If PEFT is not installed, the directory holds no such adapter, or it was made for another model.
    """
    directory = Path(adapter).expanduser()
    if missing := [
        name for name in ("adapter_config.json", "adapter_model.safetensors") if not (directory / name).is_file()
    ]:
        raise UsageError(f"{directory} is no adapter in PEFT's format: it has no {missing[0]}")
    try:
        from peft import PeftModel
    except ImportError as error:
        raise UsageError("adapters need PEFT, which is not installed: pip install 'corolla[tuning]'") from error
    try:
        return PeftModel.from_pretrained(model, str(directory)).eval()
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(
            f"the adapter in {directory} does not fit {model.name_or_path}: {error}; was it made for another model?"
        ) from error
