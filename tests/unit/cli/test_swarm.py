"""The commands of those who own a private swarm; what they tell a running one is in tests/swarm/test_private.py."""

import json

import pytest

from corolla.cli.settings import parse_seconds
from corolla.swarm import Invite


def test_new_writes_the_invite_and_nothing_else_to_standard_output(invoke):
    done = invoke("swarm", "new", "lab")
    assert done.exit_code == 0, done.stderr
    invite = Invite.parse(done.stdout.strip())
    assert invite.grant.allows == "both"
    assert "its key is in" in done.stderr
    assert f"corolla swarm revoke {invite.grant.invite[:8]} --swarm lab" in done.stderr


def test_an_invite_says_what_it_was_told(invoke):
    invoke("swarm", "new")
    flags = ("--for", "use", "--expires", "12h", "--name", "b\x1b[31mob", "--peer", "tls://192.0.2.7:31330")
    said = json.loads(invoke("swarm", "invite", *flags, "--json").stdout)
    invite = Invite.parse(said["invite"])
    assert (invite.grant.allows, invite.peers) == ("use", ("tls://192.0.2.7:31330",))
    assert invite.grant.expires_s == said["expires_s"]
    (swarm,) = json.loads(invoke("swarm", "list", "--json").stdout)
    assert swarm["swarm"] == said["swarm"]
    assert [one["name"] for one in swarm["invites"]] == ["", "b\x1b[31mob"]
    assert "\x1b" not in (listed := invoke("swarm", "list").stdout)
    assert invite.grant.invite[:8] in listed
    assert invite.line not in listed


def test_an_invite_may_hold_for_ever(invoke):
    invoke("swarm", "new")
    done = invoke("swarm", "invite", "--expires", "never")
    assert Invite.parse(done.stdout.strip()).grant.expires_s is None
    assert "until it is revoked" in done.stderr


def test_an_invite_can_be_revoked_before_any_peer_is_known_and_says_what_to_do_then(invoke):
    invite = Invite.parse(invoke("swarm", "new", "lab").stdout.strip())
    done = invoke("swarm", "revoke", invite.grant.invite[:8])
    assert done.exit_code == 0
    assert "does not know it yet: no address of a peer is known" in done.stderr
    assert "--swarm lab --peer ADDRESS" in done.stderr
    assert "revoked" in invoke("swarm", "list").stdout


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("invite",), "owns no swarm"),
        (("revoke",), "say which invite"),
        (("status",), "--peer tls://host:port"),
        (("status", "--invite", "corolla-invite:x"), "copy the whole line"),
        (("new", "a/b"), "cannot name a swarm"),
        (("invite", "--expires", "soon"), "10min"),
        (("invite", "--for", "nothing"), "nothing"),
    ],
)
def test_a_mistake_is_told_and_costs_nothing(invoke, arguments, reason):
    done = invoke("swarm", *arguments)
    assert done.exit_code == 2
    assert reason in done.stderr


def test_an_invite_is_a_secret_setting(invoke, monkeypatch):
    monkeypatch.setenv("COROLLA_SWARM_INVITE", "corolla-invite:secret")
    assert "corolla-invite" not in invoke("config").stdout + invoke("config", "--json").stdout


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30d", 2592000),
        ("12 h", 43200),
        ("10min", 600),
        ("1.5s", 1.5),
        ("90", 90),
        ("2w", 1209600),
        ("never", float("inf")),
    ],
)
def test_a_length_of_time_is_read_as_people_write_it(text, seconds):
    assert parse_seconds(text) == seconds
