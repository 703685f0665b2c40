"""An invite lets in its holder's peers, for what it allows, until it is over; nothing else lets anybody in."""

import base64

import msgspec
import pytest

from corolla.errors import NotAMember, PeerStranger, RemoteProtocolError, UsageError
from corolla.swarm import Directory, Grant, Identity, Invite, Membership, Revocations, SwarmConfig
from corolla.swarm.members.invite import CLOCK_TOLERANCE_S
from corolla.terms import Announcement, ModelId, Span

NOW_S = 1_800_000_000
KEY = Identity.generate()
PEER = Identity.generate()


def member(invite, identity=PEER, now_s=NOW_S):
    return Membership(invite, identity.peer_id, now=lambda: now_s)


def invite(key=KEY, **changes):
    return Invite.issue(key, **changes)


def spoiled(one, **changes):
    """Give the line of an invite that was changed after it was signed."""
    return msgspec.structs.replace(one, **changes).line


def test_an_invite_survives_its_way_as_a_line_and_as_a_file(tmp_path):
    given = invite(allows="serve", expires_s=NOW_S, peers=("tls://192.0.2.7:31330", "tls://[2001:db8::1]:7"))
    assert Invite.parse(given.line) == given
    (path := tmp_path / "invite.txt").write_text(f"{given.line}\n")
    assert Invite.read(str(path)) == Invite.read(f"  {given.line} ") == given
    assert len(invite(expires_s=NOW_S, peers=("tls://192.0.2.7:31330",)).line) < 300
    assert base64.b32encode(given.seed).decode().lower()[:8] not in repr(given)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("corolla-invite:", "copy the whole line"),
        ("corolla-invite:äöü", "copy the whole line"),
        ("corolla-invite:" + "A" * 5000, "characters and can have"),
        (invite().line[:-5], "copy the whole line"),
        (invite().line + "AAAA", "copy the whole line"),
        (spoiled(invite(), version=2), "newer version"),
        (spoiled(invite(), seed=bytes(32)), "not signed"),
        (spoiled(invite(), peers=("nowhere",)), "cannot be read"),
        (spoiled(invite(), grant=Grant.issue(KEY, Identity.generate().peer_id, "both", None)), "not signed"),
        ("/no/such/file", "neither an invite"),
        ("\0", "neither an invite"),
    ],
)
def test_what_is_no_whole_invite_is_refused_with_its_fault(line, reason):
    with pytest.raises(UsageError, match=reason):
        Invite.read(line)


@pytest.mark.parametrize("field", ["allows", "expires_s", "swarm"])
def test_nobody_but_the_owner_can_change_what_an_invite_says(field):
    given = invite(allows="use", expires_s=NOW_S)
    value = {"allows": "both", "expires_s": None, "swarm": Identity.generate().peer_id}[field]
    with pytest.raises(UsageError, match="not signed"):
        Invite.parse(spoiled(given, grant=msgspec.structs.replace(given.grant, **{field: value})))


def test_members_know_each_other_and_what_each_may_do():
    one, other = invite(allows="both"), invite(allows="use", expires_s=NOW_S + 1)
    guest = Identity.generate()
    assert member(one).require(guest.peer_id, member(other, guest).proof) == other.grant
    assert member(other, guest).require(PEER.peer_id, member(one).proof) == one.grant
    assert [one.grant.allows_serving, one.grant.allows_use] == [True, True]
    assert [other.grant.allows_serving, other.grant.allows_use] == [False, True]


def test_an_invite_may_be_used_by_several_peers():
    given, guests = invite(), [Identity.generate() for _ in range(3)]
    for guest in guests:
        assert member(invite()).require(guest.peer_id, member(given, guest).proof) == given.grant


@pytest.mark.parametrize(
    ("proof", "reason"),
    [
        (b"", "showed no invite"),
        (b"x" * 513, "showed no invite"),
        (b"\x93\x01\x02\x03", "cannot be read"),
        (member(invite(), Identity.generate()).proof, "forged"),  # another peer's
        (member(invite(Identity.generate())).proof, "another swarm"),
    ],
)
def test_a_peer_without_a_proof_of_its_own_is_a_stranger(proof, reason):
    with pytest.raises(PeerStranger, match=reason) as caught:
        member(invite(), Identity.generate()).require(PEER.peer_id, proof)
    assert caught.value.peer == PEER.peer_id


def test_an_invite_ends_at_its_time_give_or_take_wrong_clocks():
    given = invite(expires_s=NOW_S)
    proof = member(given).proof
    judge = member(invite(), Identity.generate(), NOW_S + CLOCK_TOLERANCE_S)
    assert judge.require(PEER.peer_id, proof)
    late = member(invite(), Identity.generate(), NOW_S + CLOCK_TOLERANCE_S + 1)
    assert "expired on 2027-01-15 08:00 UTC, and it is 2027-01-15 08:05 UTC here" in late.judge(PEER.peer_id, proof)
    with pytest.raises(NotAMember, match="ask its owner for another"):
        member(given, now_s=NOW_S + CLOCK_TOLERANCE_S + 1)


def test_a_revoked_invite_is_over_at_once_and_an_older_list_does_not_revive_it():
    given, judge = invite(), member(invite(), Identity.generate())
    proof = member(given).proof
    assert judge.require(PEER.peer_id, proof)
    assert judge.hear(Revocations.issue(KEY, 7, {given.grant.invite: None}).encode())
    assert judge.judge(PEER.peer_id, proof) == f"invite {given.grant.invite[:8]} was revoked"
    assert not judge.hear(Revocations.issue(KEY, 6, {}).encode())
    assert not judge.hear(Revocations.issue(KEY, 7, {}).encode())
    assert isinstance(judge.judge(PEER.peer_id, proof), str)
    assert judge.hear(Revocations.issue(KEY, 8, {}).encode())


def test_a_list_is_remembered_from_one_start_to_the_next(tmp_path):
    path, given = tmp_path / "revoked" / "here.list", invite()
    first = Membership(invite(), PEER.peer_id, path=path)
    first.save()  # nothing yet
    first.hear(Revocations.issue(KEY, 7, {given.grant.invite: None}).encode())
    first.save()
    assert Membership(invite(), PEER.peer_id, path=path).number == 7
    with pytest.raises(NotAMember, match="was revoked; ask"):
        Membership(given, PEER.peer_id, path=path)
    path.write_bytes(b"damaged")
    assert Membership(given, PEER.peer_id, path=path).number == -1


@pytest.mark.parametrize(
    "data",
    [b"", b"\x90", Revocations.issue(Identity.generate(), 1, {}).encode(), Revocations(KEY.peer_id, 1, {}).encode()],
)
def test_a_list_that_the_swarms_key_did_not_sign_counts_for_nothing(data):
    judge = member(invite())
    with pytest.raises(RemoteProtocolError):
        judge.hear(data)
    assert judge.number == -1


def test_a_list_has_a_limit_and_says_what_helps():
    with pytest.raises(UsageError, match="1024 revoked invites"):
        Revocations.issue(KEY, 1, {Identity.generate().peer_id: None for _ in range(1025)})


def announce(invite_, *, identity=PEER, sequence=1):
    membership = member(invite_, identity).proof if invite_ else b""
    announcement = Announcement(
        peer=identity.peer_id,
        sequence=sequence,
        ttl_s=20.0,
        model=ModelId("ab" * 32),
        model_name="tiny",
        num_blocks=8,
        span=Span(0, 4),
        state="online",
        precision="float32",
        addresses=(),
        membership=membership,
    )
    return Directory(SwarmConfig()).announce(announcement, identity, 0.0)


def test_a_directory_takes_announcements_of_members_who_may_serve_and_of_nobody_else():
    judge = member(invite(), Identity.generate())
    directory = Directory(SwarmConfig(), admits=judge.admits)
    others = [invite(allows="use"), invite(Identity.generate()), None]
    assert [directory.merge(announce(one), 0.0) for one in others] == ["stranger"] * 3
    assert directory.merge(announce(given := invite(allows="serve")), 0.0) == "new"
    assert len(directory.snapshot(1.0).announcements) == 1
    judge.hear(Revocations.issue(KEY, 1, {given.grant.invite: None}).encode())
    assert directory.snapshot(1.0).announcements == ()
    assert directory.merge(announce(given, sequence=2), 1.0) == "stranger"


def test_only_who_may_serve_may_become_a_server():
    member(invite(allows="serve")).check_may_serve()
    with pytest.raises(NotAMember, match="allows using the swarm and not serving"):
        member(invite(allows="use")).check_may_serve()
