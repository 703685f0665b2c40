"""``corolla config`` and ``corolla version``: what this installation is set to, and what it is."""

import importlib.metadata
import platform

from rich.table import Table
from rich.text import Text

import corolla
from corolla.cli.config import OutputConfig
from corolla.cli.console import Output
from corolla.cli.flags import Flag, command
from corolla.cli.settings import SECTIONS, Settings

__all__ = ["config", "version"]

_PACKAGES = ("torch", "transformers", "safetensors", "anyio", "cryptography", "msgspec")


@command(sections=tuple(SECTIONS), flags=(Flag("output.json"),))
def config(settings: Settings) -> None:
    """Show every setting and where its value comes from.

    A flag counts more than the environment, which counts more than the file, which counts more than the default. A
    setting KEY such as server.port is COROLLA_SERVER_PORT in the environment, and port below [server] in the file.

    Examples:

    corolla config

    corolla config --json
    """
    output = Output(settings.get(OutputConfig))
    rows = [(one.key, one.shown, one.origin) for one in settings.all]
    if output.is_json:
        output.json([{"key": key, "value": value, "origin": origin} for key, value, origin in rows])
        return
    table = Table("setting", "value", "from", box=None, header_style="bold")
    for key, value, origin in rows:
        style = "dim" if origin == "default" else ""
        table.add_row(key, Text(value, overflow="fold"), Text(origin, overflow="fold"), style=style)
    output.result(table)


@command(sections=(), flags=(Flag("output.json"),))
def version(settings: Settings) -> None:
    """Show the versions of Corolla and of what it stands on.

    Examples:

    corolla version --json
    """
    output = Output(settings.get(OutputConfig))
    versions = {
        "corolla": corolla.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: _version(name) for name in _PACKAGES},
    }
    if output.is_json:
        output.json(versions)
        return
    output.result(f"corolla {versions.pop('corolla')}")
    for name, found in versions.items():
        output.result(f"  {name} {found or 'not installed'}", style="dim")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
