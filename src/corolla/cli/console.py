"""Where a command writes: results on standard output, what happens meanwhile on standard error.

Owns both consoles. Text that came from a model or a peer passes through :func:`without_controls` before it is written.
"""

import re

import msgspec
from rich.console import Console, RenderableType
from rich.text import Text

from corolla.cli.config import OutputConfig

__all__ = ["Output", "without_controls"]

# ECMA-48: control sequences (CSI), control strings (OSC, DCS, ...) up to their end, and every control character that is
# left, so that a sequence which is cut in two loses at least what starts it. Tabs and line feeds stay.
_CONTROLS = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)"
    r"|\x1b[ -/]*[0-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f]"
)


def without_controls(text: str) -> str:
    """Take out of a text whatever could command a terminal.

    Args:
        text: From anybody.
    """
    return _CONTROLS.sub("", text)


class Output:
    """What a command has to say, and to whom.

    Args:
        config: Whether to write JSON, and whether to keep quiet.

    Attributes:
        results: Standard output, for people.
        notes: Standard error: stages, progress and errors.
    """

    def __init__(self, config: OutputConfig) -> None:
        self._config = config
        self.results = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
        self.notes = Console(highlight=False, markup=False, emoji=False, soft_wrap=True, stderr=True)

    @property
    def is_silent(self) -> bool:
        """Whether nothing but results is wanted."""
        return self._config.quiet or self._config.json

    @property
    def is_json(self) -> bool:
        """Whether results are for programs."""
        return self._config.json

    def note(self, text: RenderableType, style: str = "") -> None:
        """Tell people what happens, unless they want results only."""
        if not self.is_silent:
            self.notes.print(text, style=style or None)

    def result(self, text: RenderableType, style: str = "") -> None:
        """Write a result for people."""
        self.results.print(text, style=style or None)

    def stream(self, text: str) -> None:
        """Write a piece of a model's text, without a line's end."""
        self.results.print(Text(without_controls(text)), end="")
        self.results.file.flush()

    def json(self, value: object) -> None:
        """Write one result for programs, on one line."""
        print(msgspec.json.encode(value).decode(), file=self.results.file, flush=True)
