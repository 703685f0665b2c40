"""Commands made of settings: each flag is a field of a frozen dataclass, whose help it shows.

Owns the way from a command line to merged settings to a function, and from what that raises to an exit code.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from rich.markup import escape

from corolla.cli.failures import report_failure
from corolla.cli.settings import Given, Settings, field_of, hint_of, load_settings, shown_type

__all__ = ["FINDING_FLAGS", "Flag", "command"]

_CONFIG_HELP = "a TOML file with settings; default: corolla.toml in the configuration directory of this account"


@dataclass(frozen=True, slots=True)
class Flag:
    """A setting that a command line can give.

    Args:
        key: ``section.name``.
        name: What to type; ``None`` for ``--name``, or ``MODEL`` without dashes for an argument.
        is_hidden: Whether the help leaves it out.
    """

    key: str
    name: str | None = None
    is_hidden: bool = False

    @property
    def shown(self) -> str:
        """What to type."""
        return self.name or "--" + self.key.partition(".")[2].replace("_", "-")


FINDING_FLAGS = (
    Flag("chat.peers", "--peer"),
    Flag("swarm.invite"),
    Flag("swarm.directory"),
    Flag("swarm.lan", "--lan/--no-lan"),
    Flag("swarm.dht"),
)
"""How a command is told which swarm to use, or where to look for one."""


def command(
    *, sections: Sequence[str], flags: Sequence[Flag]
) -> Callable[[Callable[[Settings], int | None]], typer.Typer]:
    """Make a function of settings a command.

    Args:
        sections: Which settings the function looks at; ``output`` is always among them.
        flags: Which of them can be given on the command line.

    Returns:
        A decorator; what it returns is an application of one command, named like the function.
    """
    chosen = (*flags, Flag("output.debug"))

    def decorate(function: Callable[[Settings], int | None]) -> typer.Typer:
        def run(config: str | None, **values: object) -> None:
            given = [
                Given(flag.key, value, f"flag {flag.shown}", is_text=True)
                for flag in chosen
                if (value := values[_parameter_name(flag)]) is not None
            ]
            debug = any(one.key == "output.debug" for one in given)
            try:
                settings = load_settings(
                    (*sections, "output"), flags=given, file=Path(config).expanduser() if config else None
                )
                code = function(settings)
            except (Exception, KeyboardInterrupt) as error:
                raise typer.Exit(report_failure(error, debug=debug)) from error
            raise typer.Exit(code or 0)

        own = Annotated[str | None, typer.Option("--config", metavar="FILE", help=_CONFIG_HELP)]
        parameters = [*map(_parameter, chosen), _keyword("config", own)]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {}
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command(name=function.__name__.rstrip("_"), help=_paragraphs(inspect.getdoc(function) or ""))(run)
        return app

    return decorate


def _paragraphs(text: str) -> str:
    """Undo the line breaks within paragraphs, and keep brackets from being read as markup."""
    return "\n\n".join(" ".join(part.split("\n")) for part in escape(text).split("\n\n"))


def _parameter_name(flag: Flag) -> str:
    return flag.key.replace(".", "_")


def _parameter(flag: Flag) -> inspect.Parameter:
    """Describe a flag to typer, which reads signatures. What it takes is text: the settings convert it."""
    field, hint = field_of(flag.key), hint_of(flag.key)
    shape: dict[str, Any] = {
        "help": escape(field.metadata["help"]),
        "hidden": flag.is_hidden,
        "metavar": _metavar(flag, hint, field.metadata.get("unit")),
    }
    kind = list[str] if get_origin(hint) is tuple else str
    if not flag.shown.startswith("-"):
        return _keyword(_parameter_name(flag), Annotated[kind | None, typer.Argument(**shape, show_default=False)])
    shape["show_default"] = _shown_default(field.default)
    if hint is bool:
        return _keyword(_parameter_name(flag), Annotated[bool | None, typer.Option(flag.shown, **shape)])
    return _keyword(_parameter_name(flag), Annotated[kind | None, typer.Option(flag.shown, **shape)])


def _keyword(name: str, annotation: object) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _metavar(flag: Flag, hint: object, unit: str | None) -> str | None:
    if not flag.shown.startswith("-"):
        return flag.shown
    if hint is bool:
        return None
    if get_origin(hint) is Literal:
        return "|".join(get_args(hint))
    return "TEXT" if get_origin(hint) is tuple else (unit or shown_type(flag.key)).upper()


def _shown_default(default: object) -> str | bool:
    return False if default in {MISSING, None, False, "", ()} else str(default)
