"""Whatever the bytes, they are an invite, a proof or a list that the swarm's key has signed, or they are refused."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from corolla.errors import RemoteProtocolError, UsageError
from corolla.swarm import Identity, Invite, Membership, Revocations
from corolla.swarm.members.invite import PREFIX

KEY, PEER, JUDGE = (Identity.generate() for _ in range(3))
INVITE = Invite.issue(KEY, peers=("tls://192.0.2.7:31330",))
MEMBER = Membership(INVITE, PEER.peer_id)
JUDGING = Membership(Invite.issue(KEY), JUDGE.peer_id)
LIST = Revocations.issue(KEY, 1, {INVITE.grant.invite: 7}).encode()


@given(st.text() | st.text(alphabet="ABab09-_", max_size=400).map(PREFIX.__add__))
@example(PREFIX + "=" * 9)
@example("\ud800")
def test_any_text_is_no_invite(text):
    with pytest.raises(UsageError):
        Invite.read(text)


@given(st.integers(0, len(INVITE.line) - 1), st.characters())
def test_a_changed_invite_is_none(index, letter):
    changed = INVITE.line[:index] + letter + INVITE.line[index + 1 :]
    try:
        assert Invite.parse(changed) == INVITE  # the same letter, or one whose bits do not count
    except UsageError:
        assert changed != INVITE.line


@given(st.binary(max_size=600))
def test_any_bytes_prove_nothing(proof):
    assert isinstance(JUDGING.judge(PEER.peer_id, proof), str)


@given(st.integers(0, len(MEMBER.proof) - 1), st.integers(1, 255))
def test_a_changed_proof_proves_nothing(index, change):
    proof = bytearray(MEMBER.proof)
    proof[index] ^= change
    assert isinstance(JUDGING.judge(PEER.peer_id, bytes(proof)), str)


@given(st.binary(max_size=600))
def test_any_bytes_revoke_nothing(data):
    with pytest.raises(RemoteProtocolError):
        JUDGING.hear(data)


@given(st.integers(0, len(LIST) - 1), st.integers(1, 255))
def test_a_changed_list_revokes_nothing(index, change):
    data = bytearray(LIST)
    data[index] ^= change
    with pytest.raises(RemoteProtocolError):
        JUDGING.hear(bytes(data))
    assert JUDGING.number == -1
