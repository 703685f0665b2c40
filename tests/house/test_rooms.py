"""Rooms only look down, and those that promise to need no torch need none."""

import subprocess
import sys

import pytest
from importlinter.cli import lint_imports

TORCH_FREE = ("", ".errors", ".terms", ".telemetry", ".wire", ".routing", ".swarm", ".monitor")


def test_every_import_contract_is_kept(root, capsys):
    broken = lint_imports(config_filename=str(root / "pyproject.toml"), no_cache=True)
    assert not broken, capsys.readouterr().out


def test_no_folder_escapes_the_contracts(package):
    folders = {path.parent for path in package.rglob("*.py")}
    assert [folder.name for folder in folders if not (folder / "__init__.py").exists()] == []


@pytest.mark.parametrize("room", TORCH_FREE)
def test_a_torch_free_room_loads_no_torch(room, package):
    path = package / room.removeprefix(".")
    if not (path.with_suffix(".py").exists() or (path / "__init__.py").exists()):
        pytest.skip("not built yet")
    program = f"import sys, corolla{room}; sys.exit(bool({{'torch', 'transformers', 'numpy'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
