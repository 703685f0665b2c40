"""What the doctor has to say: findings, and how they are shown."""

from collections.abc import Sequence
from typing import Literal

import msgspec
from rich.table import Table
from rich.text import Text

from corolla.cli.console import Output, without_controls

__all__ = ["Finding", "show_findings"]

State = Literal["good", "note", "bad", "unknown"]

_MARKS: dict[State, tuple[str, str]] = {
    "good": ("ok", "green"),
    "note": ("note", "yellow"),
    "bad": ("problem", "bold red"),
    "unknown": ("?", "dim"),
}


class Finding(msgspec.Struct, frozen=True):
    """One thing that was looked at.

    Args:
        what: In a word or two.
        state: Good; worth knowing; in the way; or not to be found out.
        says: What was found, in plain words, with the number.
        remedy: What to do about it.
    """

    what: str
    state: State
    says: str
    remedy: str = ""


def show_findings(findings: Sequence[Finding], output: Output) -> None:
    """Write findings for people: each with what to do below it."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for one in findings:
        mark, style = _MARKS[one.state]
        says = Text(without_controls(one.says))
        if one.remedy:
            says.append(f"\n-> {without_controls(one.remedy)}", "bold" if one.state == "bad" else "dim")
        table.add_row(Text(mark, style), Text(one.what, "bold"), says)
    output.result(table)
