"""Arguments to settings to a run: the command line.

Each command lies in a module of its own, imported when it is named, so that help costs no torch.
"""

import importlib
from typing import Any

import typer
from typer.core import TyperGroup

__all__ = ["app", "main"]

_COMMANDS = {
    "demo": ("corolla.cli.demo", "Start a private swarm on this machine and chat with it."),
    "serve": ("corolla.cli.serve", "Serve a span of a model's blocks to a swarm."),
    "relay": ("corolla.cli.relay", "Help a swarm's peers to meet, and to be reached behind their routers."),
    "chat": ("corolla.cli.chat", "Chat with a model that a swarm serves."),
    "generate": ("corolla.cli.generate", "Continue a text with a model that a swarm serves."),
    "trace": (
        "corolla.cli.trace",
        "Continue a text with a model of a swarm, and show where the time of each step went and what was decided.",
    ),
    "gateway": ("corolla.cli.gateway", "Offer models of a swarm by an API like OpenAI's, and by a chat page."),
    "hub": ("corolla.cli.hub", "Publish adapters, find those of others, and bring them here."),
    "info": ("corolla.cli.info", "Show what a model is, and who serves it."),
    "swarm": ("corolla.cli.swarm", "Look at a swarm; make a private one, and invites to it."),
    "monitor": (
        "corolla.cli.monitor",
        "Show a swarm on a page: its servers, the bottleneck, what happened.",
    ),
    "top": ("corolla.cli.top", "Watch a swarm in the terminal."),
    "bench": ("corolla.cli.bench", "Measure what this machine would give to a swarm."),
    "doctor": ("corolla.cli.doctor", "Say what works on this machine, what does not, and what to do about it."),
    "config": ("corolla.cli.about", "Show every setting and where its value comes from."),
    "version": ("corolla.cli.about", "Show the versions of Corolla and of what it stands on."),
}


class _Commands(TyperGroup):
    """Commands that are stubs with a line of help until one of them is named."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:  # noqa: ANN401 - of typer's own copy of click, or click
        if args and args[0] in _COMMANDS:
            home, _ = _COMMANDS[args[0]]
            try:
                module = importlib.import_module(home)
            except ModuleNotFoundError as error:
                from corolla.cli.failures import report_failure

                raise typer.Exit(report_failure(error, debug=False)) from error
            found = typer.main.get_command(getattr(module, args[0]))
            self.add_command(found, args[0])
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=_Commands,
    help="Run and fine-tune language models too large for one machine, together.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
"""The whole command line."""

for _name, (_, _summary) in _COMMANDS.items():
    app.command(name=_name, help=_summary)(lambda: None)


def main() -> None:
    """Run the command line of this process."""
    app(prog_name="corolla")
