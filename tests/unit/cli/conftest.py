"""No test of the command line sees the settings of whoever runs it."""

import os

import pytest
from typer.testing import CliRunner

from corolla.cli import app


@pytest.fixture(autouse=True)
def no_settings_of_this_account(monkeypatch, tmp_path):
    for variable in [name for name in os.environ if name.startswith("COROLLA_")]:  # noqa: TID251
        monkeypatch.delenv(variable)
    for variable in ("XDG_CONFIG_HOME", "XDG_STATE_HOME", "HOME", "APPDATA", "LOCALAPPDATA"):
        monkeypatch.setenv(variable, str(tmp_path / "account"))
    monkeypatch.setenv("COROLLA_SWARM_LAN", "false")  # nor does any look around in the network


@pytest.fixture
def invoke():
    """Run a command line within this process."""

    def run(*arguments: str, stdin: str | None = None):
        return CliRunner().invoke(app, arguments, input=stdin, prog_name="corolla")

    return run
