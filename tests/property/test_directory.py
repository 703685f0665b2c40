"""Directories that heard the same are the same, and no one can speak for another or make a claim last longer."""

import itertools
import random

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from corolla.errors import FrameTooLarge
from corolla.swarm import Directory, Identity, SwarmConfig
from corolla.terms import Announcement, ModelId, Span
from corolla.wire import Publish, Reconcile, Record, encode_message
from corolla.wire.limits import MAX_MESSAGE_BYTES, MAX_RECORD_BYTES, MAX_RECORDS

IDENTITIES = [Identity(Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32)) for number in range(6)]
MODELS = [ModelId(digit * 64) for digit in "01"]
NOW_S = 1e6
TTL_S = 20.0


def claim(identity, sequence=1, **changes):
    fields = {
        "peer": identity.peer_id,
        "sequence": sequence,
        "ttl_s": TTL_S,
        "model": MODELS[0],
        "model_name": "tiny",
        "num_blocks": 8,
        "span": Span(0, 4),
        "state": "online",
        "precision": "float32",
        "addresses": (),
    }
    return Announcement(**{**fields, **changes})


def record(identity, sequence=1, age_s=0.0, **changes):
    signed = Directory().announce(claim(identity, sequence, **changes), identity, 0.0)
    return msgspec.structs.replace(signed, age_s=age_s)


def heard(records, now_s=NOW_S):
    directory = Directory()
    for each in records:
        directory.merge(each, now_s)
    return directory


def view(directory, now_s=NOW_S):
    """Give all that can be told of a directory: what is seen, and what would be sent."""
    sent = itertools.chain.from_iterable(directory.batches(sorted(directory.digest()), now_s))
    return set(directory.snapshot(now_s).announcements), list(sent)


# One announcement was made at one time, so its age is the same in whichever copy it comes.
RECORDS = st.lists(
    st.builds(
        lambda who, sequence, tokens: record(
            IDENTITIES[who], sequence, age_s=float((who * 7 + sequence * 3) % 25), free_tokens=tokens
        ),
        st.integers(0, 2),
        st.integers(0, 3),
        st.integers(0, 1),
    ),
    max_size=12,
)


@given(RECORDS, st.randoms(use_true_random=False))
def test_the_order_does_not_matter_nor_does_hearing_twice(records, rng):
    again = [*records, *rng.sample(records, len(records) // 2)]
    rng.shuffle(again)
    assert view(heard(records)) == view(heard(again))


@given(RECORDS, RECORDS, RECORDS)
def test_it_does_not_matter_who_told_whom_first(one, two, three):
    def exchanged(first, second):
        return heard([*view(first)[1], *view(second)[1]])

    left = exchanged(exchanged(heard(one), heard(two)), heard(three))
    right = exchanged(heard(one), exchanged(heard(two), heard(three)))
    assert view(left) == view(right) == view(heard([*one, *two, *three]))


@given(RECORDS)
def test_of_each_peer_the_latest_claim_is_seen_until_it_expires(records):
    latest = {}
    for each in records:
        said = msgspec.msgpack.decode(each.body, type=Announcement)
        latest[said.peer] = max(latest.get(said.peer, (-1, b"", 0.0)), (said.sequence, each.body, each.age_s))
    seen = {found.peer for found in heard(records).snapshot(NOW_S).announcements}
    assert seen == {peer for peer, (_, _, age_s) in latest.items() if age_s < TTL_S}


@given(st.floats(0, 19), st.floats(0, 40), st.floats(0, 40))
def test_a_replay_neither_lengthens_nor_shortens_a_life(age_s, later_s, claimed_age_s):
    directory = heard([record(IDENTITIES[0], age_s=age_s)])
    directory.merge(record(IDENTITIES[0], age_s=claimed_age_s), NOW_S + later_s)
    is_seen = bool(directory.snapshot(NOW_S + later_s).announcements)
    assert is_seen == (NOW_S - age_s + TTL_S > NOW_S + later_s)


@given(st.floats(0, 600), st.integers(0, 5))
def test_a_replay_cannot_revive_what_expired(later_s, sequence):
    directory = heard([record(IDENTITIES[0], sequence=5)])
    directory.expire(NOW_S + TTL_S + later_s / 2)
    assert directory.merge(record(IDENTITIES[0], sequence), NOW_S + TTL_S + later_s * 0.99) == "known"
    assert not directory.snapshot(NOW_S + TTL_S + later_s).announcements


def test_a_later_claim_with_a_shorter_life_is_not_outlived_by_an_earlier_one():
    farewell = record(IDENTITIES[0], sequence=2, age_s=5.0, ttl_s=1.0, state="draining")
    for order in itertools.permutations([record(IDENTITIES[0], sequence=1, age_s=6.0), farewell]):
        assert not heard(order).snapshot(NOW_S).announcements


@given(st.data())
def test_nobody_can_speak_for_another_or_alter_what_was_said(data):
    genuine = record(IDENTITIES[0])
    stolen = msgspec.structs.replace(record(IDENTITIES[1]), signature=genuine.signature)
    body = bytearray(genuine.body)
    body[data.draw(st.integers(0, len(body) - 1))] ^= data.draw(st.integers(1, 255))
    altered = msgspec.structs.replace(genuine, body=bytes(body))
    for forged in (stolen, altered):
        directory = Directory()
        verdict = directory.merge(forged, NOW_S)
        assert verdict in ("forged", "malformed")
        assert directory.verdicts[verdict] == 1
        assert len(directory) == 0


def test_a_signature_made_for_something_else_is_worth_nothing():
    body = record(IDENTITIES[0]).body
    assert Directory().merge(Record(body, IDENTITIES[0].sign(body), 0.0), NOW_S) == "forged"


@pytest.mark.parametrize(
    "wrong",
    [
        Record(b"", bytes(64), 0.0),
        Record(b"\xc1", bytes(64), 0.0),
        Record(bytes(MAX_RECORD_BYTES + 1), bytes(64), 0.0),
        record(IDENTITIES[0], age_s=-0.1),
        record(IDENTITIES[0], age_s=float("nan")),
        record(IDENTITIES[0], age_s=float("inf")),
        record(IDENTITIES[0], span=Span(4, 9)),
    ],
)
def test_what_no_honest_peer_says_is_malformed(wrong):
    assert Directory().merge(wrong, NOW_S) == "malformed"


@given(st.binary(max_size=200))
def test_any_bytes_can_be_merged(body):
    assert Directory().merge(Record(body, bytes(64), 0.0), NOW_S) in ("malformed", "forged")


def test_what_is_too_old_to_be_remembered_is_dropped():
    keep_s = SwarmConfig().keep_s
    directory = heard([record(IDENTITIES[0], age_s=TTL_S + keep_s + 1)])
    assert (len(directory), directory.verdicts["expired"]) == (0, 1)
    directory = heard([record(IDENTITIES[0])])
    directory.expire(NOW_S + TTL_S + keep_s - 1)
    assert len(directory) == 1
    directory.expire(NOW_S + TTL_S + keep_s + 1)
    assert len(directory) == 0


def test_an_announcement_over_the_limit_is_not_made():
    wide = claim(IDENTITIES[0], addresses=tuple(f"tls://{digit * 200}:1" for digit in "0123456789abcdef"))
    assert Directory().announce(wide, IDENTITIES[0], 0.0)
    wide = msgspec.structs.replace(wide, addresses=tuple("é" * 256 for _ in range(16)))
    with pytest.raises(FrameTooLarge, match=str(MAX_RECORD_BYTES)):
        Directory().announce(wide, IDENTITIES[0], 0.0)


def test_a_full_directory_keeps_the_living():
    directory = Directory(SwarmConfig(max_peers=2))
    old, living, late, later = (record(identity) for identity in IDENTITIES[:4])
    assert directory.merge(old, NOW_S - TTL_S) == "new"
    assert directory.merge(living, NOW_S) == "new"
    assert directory.merge(late, NOW_S) == "new"
    assert directory.merge(later, NOW_S) == "full"
    assert directory.merge(record(IDENTITIES[1], sequence=2), NOW_S) == "new"
    seen = {found.peer for found in directory.snapshot(NOW_S).announcements}
    assert seen == {IDENTITIES[1].peer_id, IDENTITIES[2].peer_id}


def test_a_snapshot_can_be_of_one_model():
    directory = heard([record(IDENTITIES[0]), record(IDENTITIES[1], model=MODELS[1])])
    assert [found.peer for found in directory.snapshot(NOW_S, model=MODELS[1]).announcements] == [IDENTITIES[1].peer_id]


@given(st.integers(2, 8), st.lists(st.tuples(st.integers(0, 7), st.integers(0, 5)), max_size=20), st.integers(0, 2**32))
def test_random_pairs_soon_agree(count, said, seed):
    rng = random.Random(seed)
    directories = [Directory() for _ in range(count)]
    for sequence, (where, who) in enumerate(said):
        directories[where % count].merge(record(IDENTITIES[who], sequence), NOW_S)
    for _ in range(40):
        for asker in directories:
            reconcile(asker, rng.choice([other for other in directories if other is not asker]))
    assert all(view(directory) == view(directories[0]) for directory in directories)


def reconcile(asker, other, now_s=NOW_S):
    records, wanted = other.delta(asker.digest(), now_s)
    for each in records:
        asker.merge(each, now_s)
    for batch in asker.batches(wanted, now_s):
        for each in batch:
            other.merge(each, now_s)


def test_batches_fit_into_messages_and_leave_nothing_out():
    # The table is filled from within: thousands of signatures would take longer than they tell.
    directory = heard([record(IDENTITIES[0], name="n" * 128, model_name="m" * 128)])
    entry = directory._entries[IDENTITIES[0].peer_id]
    peers = [f"{number:052}" for number in range(MAX_RECORDS * 2 + 1)]
    directory._entries = dict.fromkeys(peers, entry)
    batches = list(directory.batches(peers, NOW_S))
    assert sum(map(len, batches)) == len(peers)
    for batch in batches:
        assert len(batch) <= MAX_RECORDS
        assert len(encode_message(Publish(records=batch))) <= MAX_MESSAGE_BYTES


def test_the_largest_digest_fits_into_a_message():
    digest = {f"{number:052}": 2**53 for number in range(SwarmConfig().max_peers)}
    assert len(encode_message(Reconcile(digest=digest))) <= MAX_MESSAGE_BYTES


def test_changes_are_told_from_what_was_known_before():
    directory = heard([record(identity) for identity in IDENTITIES[:3]])
    revision = directory.revision
    assert directory.changed_since(revision) == []
    directory.merge(record(IDENTITIES[0], sequence=2), NOW_S)
    directory.merge(record(IDENTITIES[4]), NOW_S)
    directory.merge(record(IDENTITIES[4]), NOW_S)
    assert directory.changed_since(revision) == [IDENTITIES[4].peer_id, IDENTITIES[0].peer_id]
    assert directory.changed_since(0) == [IDENTITIES[number].peer_id for number in (4, 0, 2, 1)]
