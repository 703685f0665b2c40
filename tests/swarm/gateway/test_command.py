"""``corolla gateway`` as a person runs it, in a process of its own."""

import json
import subprocess
import sys

import httpx
import pytest
from typer.testing import CliRunner

from corolla.cli import app


@pytest.fixture
def invoke(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    return lambda *words: CliRunner().invoke(app, ["gateway", *words], prog_name="corolla")


def test_keys_are_made_listed_and_revoked(invoke):
    assert "there is no key" in invoke("keys", "list").stdout
    made = invoke("keys", "new", "--name", "lab", "--requests-per-min", "30", "--tokens-per-day", "5000")
    assert made.stdout.startswith("ck-")
    listed = json.loads(invoke("keys", "list", "--json").stdout)
    assert (listed[0]["name"], listed[0]["requests_per_min"], listed[0]["tokens_per_day"]) == ("lab", 30, 5000)
    assert "30 requests/min" in invoke("keys", "list").stdout.replace("\n", " ")
    assert invoke("keys", "revoke", listed[0]["id"]).exit_code == 0
    assert invoke("keys", "revoke", listed[0]["id"]).exit_code == 2
    assert invoke("keys", "revoke").exit_code == 2
    assert made.stdout.strip() not in (invoke("keys", "list").stdout)


def test_the_first_run_makes_a_key_and_shows_it_once(servers, directory, tmp_path):
    database = f"sqlite:///{tmp_path}/keys.sqlite"
    command = [sys.executable, "-m", "corolla", "gateway", "--peer", servers.address, "--port", "0", "--json"]
    for run in range(2):
        with subprocess.Popen([*command, "--database", database], stdout=subprocess.PIPE, text=True) as process:
            said = json.loads(process.stdout.readline())
            assert (said["key"] is None) == (run == 1)
            if run == 0:
                key = said["key"]
            headers = {"Authorization": f"Bearer {key}"}
            (model,) = httpx.get(f"{said['url']}/v1/models", headers=headers, verify=False).json()["data"]
            assert model["id"] == said["models"][0] == str(directory)
            process.terminate()
            assert process.wait(20) == 0
