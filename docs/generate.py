"""Write the pages of docs/ that are made from the code: ``make docs``.

``python docs/generate.py --check`` writes nothing, and fails if a page is not what the code says.
"""

import argparse
import sys
from dataclasses import MISSING, fields
from pathlib import Path

from corolla import errors
from corolla.cli.settings import SECTIONS, field_of, kind_of, shown_type

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


def config_page() -> str:
    """Tell every setting: its name, type, unit, default and meaning."""
    lines = [
        "# Settings",
        "",
        NOTE.format(source="the config dataclass of each room"),
        "",
        "A setting is given by a flag; or else by a variable of the environment, `COROLLA_SERVER_PORT` for `port` in",
        "`[server]`; or else by a TOML file, corolla.toml in the configuration directory of your account or the one",
        "that `--config` names; or else it has its default. `corolla config` shows what is in force, and why. A key",
        "that is not on this page is an error. Numbers of bytes may be written as `2GiB` or `500MB`, lengths of time",
        "as `10min`, `12h` or `30d`; in the environment, commas separate the parts of a list.",
        "",
        "```toml",
        "[server]",
        'name = "attic"',
        "port = 4001",
        "",
        "[engine]",
        'kv_bytes = "2GiB"',
        "```",
    ]
    for section in SECTIONS:
        about = (kind_of(section).__doc__ or "").partition("\n")[0].replace("``", "`")
        lines += ["", f"## [{section}]", "", about, "", "| setting | type | default | meaning |", "|---|---|---|---|"]
        lines += [config_row(f"{section}.{field.name}") for field in fields(kind_of(section))]
    return "\n".join([*lines, ""])


def config_row(key: str) -> str:
    """Give the table row of a setting."""
    field = field_of(key)
    unit = field.metadata.get("unit")
    kind = shown_type(key) + (f", {unit}" if unit else "")
    if field.default_factory is not MISSING:
        default = "of this machine"
    elif field.default is MISSING:
        default = "must be given"
    elif field.default in (None, "", ()):
        default = ""
    else:
        default = f"`{str(field.default).lower() if isinstance(field.default, bool) else field.default}`"
    help_text = field.metadata["help"].replace("|", "\\|")
    return f"| `{field.name}` | {kind} | {default} | {help_text} |"


def pages() -> dict[Path, str]:
    """Make all generated pages, by where they belong."""
    return {DOCS / "config.md": config_page(), DOCS / "errors.md": errors_page()}


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
