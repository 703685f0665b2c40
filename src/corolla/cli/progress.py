"""How far downloads and loading are: bars on a terminal, now and then a line elsewhere.

Implements :class:`corolla.hub.Progress`, which is called from the threads that do the work.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from corolla.cli.console import Output
from corolla.hub import Progress as Report
from corolla.hub import Unit, stay_silent

__all__ = ["show_progress"]

_LINE_EVERY_S = 5.0


@contextmanager
def show_progress(output: Output) -> Iterator[Report]:
    """Show progress while the body runs.

    Args:
        output: Where to; nothing is shown if it is silent.

    Yields:
        What the workers call.
    """
    if output.is_silent:
        yield stay_silent
    elif output.notes.is_terminal:
        with Progress(
            TextColumn("{task.description}"), BarColumn(), _Amount(), TimeRemainingColumn(), console=output.notes
        ) as bars:
            yield _Bars(bars)
    else:
        yield _Lines(output.notes)


class _Bars:
    """Draws a bar for each task; one that has ended leaves."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, label: str, done: int, total: int | None, unit: Unit) -> None:
        if label not in self._tasks:
            self._tasks[label] = self._bars.add_task(label[:1].upper() + label[1:], total=total, unit=unit)
        self._bars.update(self._tasks[label], completed=done, total=total)
        if done == total:
            self._bars.remove_task(self._tasks.pop(label))


class _Lines:
    """Writes a line when a task begins, every few seconds, and when it ends."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._written_at_s: dict[str, float] = {}

    def __call__(self, label: str, done: int, total: int | None, unit: Unit) -> None:
        now_s = time.monotonic()
        is_new, has_ended = label not in self._written_at_s, done == total
        if is_new or has_ended or now_s - self._written_at_s[label] > _LINE_EVERY_S:
            self._written_at_s[label] = now_s
            self._console.print(f"{label}: {_amount(done, total, unit)}" if done else label)
        if has_ended:
            del self._written_at_s[label]


class _Amount(ProgressColumn):
    def render(self, task: Task) -> Text:
        total = None if task.total is None else int(task.total)
        return Text(_amount(int(task.completed), total, task.fields["unit"]))


def _amount(done: int, total: int | None, unit: Unit) -> str:
    if unit == "bytes":
        return decimal(done) if total is None else f"{decimal(done)} of {decimal(total)}"
    if total is None:
        return f"{done} {unit}" if done else ""
    return f"{done} of {total} {unit}"
