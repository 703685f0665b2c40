"""What the code imports is what the package declares, so that it runs wherever it was installed."""

import ast
import sys
import tomllib
from importlib import metadata

# What comes with something that is declared.
PROMISED = {
    "ifaddr": "zeroconf",
    "jinja2": "torch",
    "pydantic": "fastapi",
    "starlette": "fastapi",
    "tokenizers": "transformers",
}

# What a package is imported as, where that is not its name.
NAMES = {"opentelemetry": "opentelemetry_sdk"}


def test_every_import_is_declared(root, modules):
    """Petals defect P: a server imported a package that only developers were told to install."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [one for name, needs in project["optional-dependencies"].items() if name != "dev" for one in needs]
    declared = {name_of(requirement) for requirement in [*project["dependencies"], *extras]}
    undeclared = {
        f"{path}: {name}"
        for path, tree in modules.items()
        for name in imported(tree)
        if name not in sys.stdlib_module_names | {"corolla", "_typeshed", *PROMISED}
        and NAMES.get(name, name.lower()) not in declared
    }
    assert not undeclared
    assert declared >= set(PROMISED.values())
    for name, by in PROMISED.items():
        assert name in {name_of(requirement) for requirement in metadata.requires(by)}, f"{by} does not bring {name}"


def test_no_dependency_is_pinned_to_a_repository(root):
    """Petals defect P: a dependency by its repository keeps a package from being published."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needs = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    assert [one for one in needs if "@" in one or "://" in one] == []


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def name_of(requirement):
    name = requirement.split(";")[0]
    for mark in "[(<>=!~ ":
        name = name.split(mark)[0]
    return name.lower().replace("-", "_")
