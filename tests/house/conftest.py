"""What the tests of the house rules look at: the files of this repository, read but not run."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "corolla"


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def package() -> Path:
    """The source of ``corolla``."""
    return PACKAGE


@pytest.fixture(scope="session")
def modules() -> dict[str, ast.Module]:
    """Every module of Corolla as a syntax tree, by its path below the package."""
    return {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_bytes()) for path in PACKAGE.rglob("*.py")}
