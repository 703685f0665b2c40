"""API keys and what was spent with them: in SQLite, and in PostgreSQL where Debian's package is installed."""

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest

from corolla.errors import ConfigError, DatabaseFailed, InvalidKey, QuotaSpent, RateLimited, UsageError
from corolla.gateway import KeyConfig
from corolla.gateway.accounts import Accounts

PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
OWNER = "nobody"  # PostgreSQL refuses to run as root


class Clock:
    now_s = 86400.0 * 20_000 + 90.0

    def __call__(self):
        return self.now_s


@pytest.fixture(scope="module")
def postgresql():
    if not PROGRAMS:
        pytest.skip("PostgreSQL is not installed here: apt-get install postgresql")
    if os.geteuid() != 0:
        pytest.skip("only root can start PostgreSQL as another account")
    account = pwd.getpwnam(OWNER)
    directory = Path(tempfile.mkdtemp(prefix="corolla-postgresql-"))
    os.chown(directory, account.pw_uid, account.pw_gid)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    data, options = directory / "data", f"-p {port} -h 127.0.0.1 -k {directory} -F"
    as_owner = {"user": account.pw_uid, "group": account.pw_gid, "cwd": directory, "check": True}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "timeout": 60}
    programs = PROGRAMS[-1].parent
    subprocess.run([programs / "initdb", "-D", data, "-A", "trust", "-U", "corolla", "-N"], **as_owner, **quiet)
    control = [programs / "pg_ctl", "-D", data, "-w"]
    subprocess.run([*control, "-l", directory / "log", "-o", options, "start"], **as_owner, **quiet)
    yield f"postgresql://corolla@127.0.0.1:{port}/postgres"
    subprocess.run([*control, "-m", "immediate", "stop"], **as_owner, **quiet)
    shutil.rmtree(directory)


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request, tmp_path):
    return tmp_path / "keys.sqlite" if request.param == "sqlite" else request.getfixturevalue("postgresql")


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def accounts(database, clock):
    accounts = Accounts(database, clock_s=clock)
    yield accounts
    accounts.close()


def test_a_key_is_known_by_its_hash_until_it_is_revoked(accounts):
    made = accounts.make(KeyConfig(name="lab"))
    assert accounts.admit(made.text).name == "lab"
    (held,) = [one for one in accounts.all() if one.id == made.id]
    assert made.text not in repr(held)
    accounts.revoke(made.id)
    with pytest.raises(InvalidKey, match="revoked"):
        accounts.admit(made.text)
    with pytest.raises(UsageError, match="no key"):
        accounts.revoke(made.id)
    for wrong in (None, "", "ck-unknown"):
        with pytest.raises(InvalidKey):
            accounts.admit(wrong)
    assert not accounts.is_empty()


def test_a_key_has_so_many_requests_a_minute(accounts, clock):
    key = accounts.make(KeyConfig(requests_per_min=2)).text
    accounts.admit(key)
    accounts.admit(key)
    with pytest.raises(RateLimited, match="2 requests a minute") as caught:
        accounts.admit(key)
    assert caught.value.retry_after_s == 30
    clock.now_s += 30
    accounts.admit(key)


def test_a_key_has_so_many_tokens_a_day(accounts, clock):
    key = accounts.make(KeyConfig(tokens_per_day=100)).text
    accounts.record(accounts.admit(key), 60, 39)
    accounts.record(accounts.admit(key), 1, 0)
    with pytest.raises(QuotaSpent, match="100 were spent") as caught:
        accounts.admit(key)
    assert caught.value.retry_after_s == 86400 - 90
    clock.now_s += 86400
    accounts.admit(key)


def test_gateways_that_share_a_database_share_limits_and_lose_no_count(database, clock, at_once):
    gateways = [Accounts(database, clock_s=clock) for _ in range(2)]
    made = gateways[0].make(KeyConfig(requests_per_min=60))

    def ask(index):
        gateway = gateways[index % 2]
        try:
            gateway.record(gateway.admit(made.text), 3, 2)
        except RateLimited:
            return False
        return True

    answered = sum(at_once(ask, range(80)))
    (spent,) = [one for one in gateways[1].all() if one.id == made.id]
    assert answered == 60
    assert (spent.requests, spent.read_tokens, spent.written_tokens) == (60, 180, 120)
    for gateway in gateways:
        gateway.close()


def test_a_database_that_cannot_be_used_is_said(tmp_path):
    for url in ("nothing", "mysql://a@b/c"):
        with pytest.raises(ConfigError, match="database"):
            Accounts(url)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(DatabaseFailed):
        Accounts(f"postgresql://corolla@127.0.0.1:{port}/nothing")
    (tmp_path / "broken").write_bytes(b"this is no database, but long enough to look at" * 99)
    with pytest.raises(DatabaseFailed):
        Accounts(tmp_path / "broken")
