"""How a long task tells its caller how far it is.

Knows no terminal: the command line draws bars with it, a library's user may ignore it.
"""

from typing import Literal, Protocol

__all__ = ["Progress", "Unit", "stay_silent"]

Unit = Literal["bytes", "files", "tensors"]
"""What is being counted."""


class Progress(Protocol):
    """Called now and then during a long task, always from the thread that runs the task."""

    def __call__(self, label: str, done: int, total: int | None, unit: Unit) -> None:
        """Take note.

        Args:
            label: What is being done, and the key by which calls belong to the same task.
            done: How many units are done.
            total: How many there are; ``None`` while that is unknown. ``done == total`` ends the task, as does
                a call with another label.
            unit: What is being counted.
        """


def stay_silent(label: str, done: int, total: int | None, unit: Unit) -> None:
    """Be the :class:`Progress` of someone who does not care."""
