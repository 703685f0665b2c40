"""Make a notebook of every example, or with ``--check`` say which are not those of their scripts."""

import sys
from pathlib import Path

import jupytext
import nbformat


def made(script: Path) -> str:
    """The notebook of a script, the same each time it is made."""
    notebook = jupytext.read(script, fmt="py:percent")
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    for index, cell in enumerate(notebook.cells):
        cell.id = f"cell-{index}"  # by chance otherwise
        cell.metadata = {}
    return nbformat.writes(notebook, version=4) + "\n"


def main() -> None:
    """Write the notebooks, or compare them."""
    stale = []
    for script in sorted(Path(__file__).parent.glob("*.py")):
        if not script.read_text(encoding="utf-8").startswith("# %%"):
            continue
        notebook = script.with_suffix(".ipynb")
        if "--check" not in sys.argv[1:]:
            notebook.write_text(made(script), encoding="utf-8")
        elif not notebook.exists() or notebook.read_text(encoding="utf-8") != made(script):
            stale.append(notebook.name)
    if stale:
        sys.exit(f"not those of their scripts: {', '.join(stale)}; run make notebooks")


if __name__ == "__main__":
    main()
