"""Write the pages of docs/ that are made from the code: ``make docs``.

``python docs/generate.py --check`` writes nothing, and fails if a page is not what the code says.
"""

import argparse
import sys
from pathlib import Path

from corolla import errors

DOCS = Path(__file__).parent
NOTE = "<!-- Written by docs/generate.py from {source}; change that, then run `make docs`. -->"


def errors_page() -> str:
    """Tell every error: its code, HTTP status, retry, ban and meaning."""
    lines = [
        "# Errors",
        "",
        NOTE.format(source="src/corolla/errors.py"),
        "",
        "Everything that Corolla raises on purpose is a `corolla.errors.Error`, sorted by whose fault it is. **Code**",
        "is its name on the wire, **HTTP** what the gateway answers, **retry** whether the same or another peer may",
        "succeed, and **ban** for how long the peer is avoided.",
        "",
        "| error | is a | code | HTTP | retry | ban | meaning |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *errors_below(errors.Error), ""])


def errors_below(cls: type[errors.Error]) -> list[str]:
    """Give the table rows of an error and of all that are made from it, in the order of their definition."""
    parent = cls.__mro__[1]
    kind = f"`{parent.__name__}`" if issubclass(parent, errors.Error) else ""
    ban = f"{cls.ban_s:g} s" if cls.ban_s else "no"
    meaning = (cls.__doc__ or "").partition("\n")[0]
    row = f"| `{cls.__name__}` | {kind} | `{cls.code}` | {cls.http_status} | {cls.retry} | {ban} | {meaning} |"
    return [row, *(line for child in cls.__subclasses__() for line in errors_below(child))]


def pages() -> dict[Path, str]:
    """Make all generated pages, by where they belong."""
    return {DOCS / "errors.md": errors_page()}


def main() -> None:
    """Write the pages, or check them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is out of date")
    check = parser.parse_args().check
    for path, text in pages().items():
        if not check:
            path.write_text(text, encoding="utf-8", newline="\n")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            sys.exit(f"{path.relative_to(DOCS.parent)} is out of date; run: make docs")


if __name__ == "__main__":
    main()
