"""What the owner of a swarm keeps: nobody else can read the key, no secret of an invite is written, nothing is lost."""

import os

import pytest

from corolla.errors import ConfigError, UsageError
from corolla.swarm import Invite, Revocations
from corolla.swarm.members.owner import OwnedSwarm

NOW_S = 1_800_000_000.0
DAY_S = 86400


@pytest.fixture
def owned(tmp_path):
    return OwnedSwarm.create(tmp_path, "home")


def test_a_swarm_is_found_again_by_its_name_or_because_it_is_the_only_one(owned, tmp_path):
    assert OwnedSwarm.open(tmp_path, "home").id == OwnedSwarm.open(tmp_path, None).id == owned.id
    OwnedSwarm.create(tmp_path, "work")
    with pytest.raises(UsageError, match="2 swarms; name one with --swarm: home, work"):
        OwnedSwarm.open(tmp_path, None)
    with pytest.raises(UsageError, match="no swarm 'play'"):
        OwnedSwarm.open(tmp_path, "play")


def test_without_any_swarm_it_says_how_to_make_one(tmp_path):
    with pytest.raises(UsageError, match="corolla swarm new"):
        OwnedSwarm.open(tmp_path, None)


@pytest.mark.parametrize("name", ["", "..", "a/b", "-x", "a" * 65, "a\nb"])
def test_a_name_is_a_plain_word(tmp_path, name):
    with pytest.raises(ConfigError, match="cannot name a swarm"):
        OwnedSwarm.create(tmp_path, name)
    assert not list(tmp_path.iterdir())


def test_a_key_is_never_overwritten(owned, tmp_path):
    with pytest.raises(ConfigError, match="there is a swarm 'home' already"):
        OwnedSwarm.create(tmp_path, "home")


@pytest.mark.skipif(os.name != "posix", reason="other systems have no such modes")
def test_nobody_else_can_read_the_key(owned):
    assert owned.key_path.stat().st_mode & 0o077 == 0


def test_invites_are_remembered_without_their_secret(owned, tmp_path):
    made = owned.invite(allows="use", expires_s=7, name="Zoë", peers=("tls://192.0.2.7:1",))
    assert Invite.parse(made.line) == made
    (known,) = owned.issued()
    assert (known.id, known.allows, known.expires_s, known.name) == (made.grant.invite, "use", 7, "Zoë")
    assert known.peers == ("tls://192.0.2.7:1",)
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path != owned.key_path)
    assert made.seed not in written
    assert made.line.encode()[20:60] not in written


def test_a_revoked_invite_is_listed_until_it_has_expired_for_everyone(owned):
    ends = {"soon": NOW_S + 60, "never": None, "kept": None}
    ids = {name: owned.invite(expires_s=end and int(end), name=name).grant.invite for name, end in ends.items()}
    assert owned.revoke(ids["soon"][:12]).name == "soon"
    assert owned.revoke(ids["never"]).is_revoked
    first = owned.revocations(NOW_S)
    assert set(first.invites) == {ids["soon"], ids["never"]}
    assert Revocations.decode(first.encode(), owned.id) == first
    later = owned.revocations(NOW_S + 60 + 2 * DAY_S)
    assert set(later.invites) == {ids["never"]}
    assert later.number > first.number


def test_the_number_rises_even_if_the_clock_goes_back(owned):
    numbers = [owned.revocations(at_s).number for at_s in (NOW_S, NOW_S, NOW_S - DAY_S)]
    assert numbers == sorted(set(numbers))


@pytest.mark.parametrize("start", ["", "abc", "zzzz1"])
def test_an_invite_must_be_named_clearly(owned, start):
    owned.invite()
    with pytest.raises(UsageError, match="corolla swarm list"):
        owned.revoke(start)


def test_a_damaged_file_is_named(owned, tmp_path):
    owned.invite()
    (path,) = tmp_path.glob("home/invites/*.json")
    path.write_bytes(b"{")
    with pytest.raises(ConfigError, match=path.name):
        owned.issued()
