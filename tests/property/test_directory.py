"""Directories that heard the same are the same, and no one can speak for another or make a claim last longer."""

import hashlib
import itertools
import random

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from corolla.errors import FrameTooLarge
from corolla.swarm import Directory, Identity, SwarmConfig
from corolla.swarm.directory.stamps import accuse, id_of, peer_of, read_stamp
from corolla.terms import Announcement, ModelId, Span
from corolla.wire import News, Publish, Record, encode_message
from corolla.wire.limits import MAX_BUCKETS, MAX_IDS, MAX_MESSAGE_BYTES, MAX_RECORD_BYTES, MAX_RECORDS

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


def heard(records, now_s=NOW_S, **options):
    directory = Directory(**options)
    for each in records:
        directory.merge(each, now_s)
    return directory


def view(directory, now_s=NOW_S):
    """Give all that can be told of a directory: what is seen, and what would be sent."""
    entries = [directory.entry(identity.peer_id) for identity in IDENTITIES]
    sent = [entry.as_record(now_s, has_body=True) for entry in entries if entry is not None]
    return set(directory.snapshot(now_s).announcements), sent


def seen(directory, now_s=NOW_S):
    return {found.peer for found in directory.snapshot(now_s).announcements}


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
        said = read_stamp(each)
        latest[said.peer] = max(latest.get(said.peer, (-1, b"", 0.0)), (said.sequence, each.stamp, each.age_s))
    assert seen(heard(records)) == {peer_of(key) for key, (_, _, age_s) in latest.items() if age_s < TTL_S}


@given(st.floats(0, 19), st.floats(0, 40), st.floats(0, 40))
def test_a_replay_never_shortens_a_life_nor_makes_it_longer_than_from_when_it_was_first_heard(age_s, later_s, replay_s):
    directory = heard([record(IDENTITIES[0], age_s=age_s)])
    directory.merge(record(IDENTITIES[0], age_s=replay_s), NOW_S + later_s)
    is_seen = bool(seen(directory, NOW_S + later_s))
    if later_s < TTL_S - age_s:
        assert is_seen
    if later_s >= TTL_S:
        assert not is_seen


def test_a_wrong_age_is_put_right_by_whoever_knows_better():
    directory = heard([record(IDENTITIES[0], age_s=TTL_S + 1)])
    assert not seen(directory)
    assert directory.merge(record(IDENTITIES[0], age_s=2.0), NOW_S + 1) == "new"
    assert seen(directory, NOW_S + TTL_S - 2)


@given(st.floats(0, 600), st.integers(0, 5))
def test_a_replay_cannot_revive_what_expired(later_s, sequence):
    directory = heard([record(IDENTITIES[0], sequence=5)])
    directory.expire(NOW_S + TTL_S + later_s / 2)
    assert directory.merge(record(IDENTITIES[0], sequence), NOW_S + TTL_S + later_s * 0.99) == "known"
    assert directory.dropped == ({"replayed": 1} if sequence < 5 else {})
    assert not directory.snapshot(NOW_S + TTL_S + later_s).announcements


def test_a_later_claim_with_a_shorter_life_is_not_outlived_by_an_earlier_one():
    farewell = record(IDENTITIES[0], sequence=2, age_s=5.0, ttl_s=1.0, state="draining")
    for order in itertools.permutations([record(IDENTITIES[0], sequence=1, age_s=6.0), farewell]):
        assert not heard(order).snapshot(NOW_S).announcements


@given(st.data())
def test_nobody_can_speak_for_another_or_alter_what_was_said(data):
    genuine = record(IDENTITIES[0])
    stolen = msgspec.structs.replace(record(IDENTITIES[1]), signature=genuine.signature)
    part = data.draw(st.sampled_from(["stamp", "body"]))
    altered = bytearray(getattr(genuine, part))
    altered[data.draw(st.integers(0, len(altered) - 1))] ^= data.draw(st.integers(1, 255))
    for forged in (stolen, msgspec.structs.replace(genuine, **{part: bytes(altered)})):
        directory = Directory()
        verdict = directory.merge(forged, NOW_S)
        assert verdict in ("forged", "malformed")
        assert directory.verdicts[verdict] == 1
        assert len(directory) == 0


def test_a_signature_made_for_something_else_is_worth_nothing():
    genuine = record(IDENTITIES[0])
    signature = IDENTITIES[0].sign(genuine.stamp)
    assert Directory().merge(msgspec.structs.replace(genuine, signature=signature), NOW_S) == "forged"


@pytest.mark.parametrize(
    "wrong",
    [
        Record(b"", bytes(64), 0.0, b""),
        Record(b"\xc1", bytes(64), 0.0, b"\x80"),
        msgspec.structs.replace(record(IDENTITIES[0]), body=b"\x80"),
        record(IDENTITIES[0], age_s=-0.1),
        record(IDENTITIES[0], age_s=float("nan")),
        record(IDENTITIES[0], age_s=float("inf")),
        record(IDENTITIES[0], span=Span(4, 9)),
    ],
)
def test_what_no_honest_peer_says_is_malformed(wrong):
    assert Directory().merge(wrong, NOW_S) == "malformed"


@given(st.binary(max_size=200))
def test_any_bytes_can_be_merged(data):
    assert Directory().merge(Record(data, bytes(64), 0.0, data), NOW_S) == "malformed"
    genuine = record(IDENTITIES[0])
    stamp = msgspec.msgpack.encode(
        msgspec.structs.replace(read_stamp(genuine), body=hashlib.sha256(data).digest()[:16])
    )
    merged = Directory().merge(Record(stamp, bytes(64), 0.0, data), NOW_S)
    assert merged in ("malformed", "forged")


def test_what_is_too_old_to_be_remembered_is_dropped():
    keep_s = SwarmConfig().keep_s
    directory = heard([record(IDENTITIES[0], age_s=TTL_S + keep_s + 1)])
    assert (len(directory), directory.verdicts["expired"]) == (0, 1)
    directory = heard([record(IDENTITIES[0])])
    directory.expire(NOW_S + TTL_S + keep_s - 1)
    assert len(directory) == 1
    directory.expire(NOW_S + TTL_S + keep_s + 1)
    assert len(directory) == 0
    assert directory.find(id_of(record(IDENTITIES[0]))) is None


WALL_S = 1.7e9


@given(st.floats(-300, 300), st.floats(-300, 300))
def test_clocks_may_be_wrong_by_minutes(writer_s, reader_s):
    said = record(IDENTITIES[0], sequence=round((WALL_S + writer_s) * 1000))
    assert seen(heard([said], wall_s=lambda: WALL_S + reader_s))


def test_what_is_dated_far_ahead_or_long_ago_is_dropped():
    clock_s = SwarmConfig().clock_s
    for early_s, verdict in ((clock_s + 1, "future"), (-clock_s - TTL_S - 1, "expired")):
        said = record(IDENTITIES[0], sequence=round((WALL_S + early_s) * 1000))
        directory = heard([said], wall_s=lambda: WALL_S)
        assert (len(directory), directory.verdicts[verdict]) == (0, 1)


@given(st.floats(0, 1e5), st.floats(-300, 300))
def test_there_is_no_time_at_which_a_replay_passes_for_new(later_s, error_s):
    """What was seen once is seen no more after its life, whether it is still remembered or already forgotten."""
    said = record(IDENTITIES[0], sequence=round((WALL_S + error_s) * 1000))
    walls = [WALL_S]
    directory = heard([said], wall_s=lambda: walls[0])
    walls[0] += TTL_S + later_s
    directory.expire(NOW_S + TTL_S + later_s)
    assert directory.merge(said, NOW_S + TTL_S + later_s) in ("known", "expired")
    assert not seen(directory, NOW_S + TTL_S + later_s)


def test_a_stamp_upon_a_known_body_is_small_and_says_what_has_changed():
    directory, peer = Directory(), IDENTITIES[0]
    whole = directory.announce(claim(peer, 1, name="n" * 100, free_tokens=5), peer, NOW_S)
    stamp = directory.announce(claim(peer, 2, name="n" * 100, free_tokens=7), peer, NOW_S)
    assert not directory.entry(peer.peer_id).has_new_body
    bare = msgspec.structs.replace(stamp, body=None)
    assert len(msgspec.msgpack.encode(bare)) < 200 < len(msgspec.msgpack.encode(whole))
    other = Directory()
    assert other.merge(bare, NOW_S) == "bodiless"
    assert other.merge(whole, NOW_S) == other.merge(bare, NOW_S) == "new"
    assert other.snapshot(NOW_S).announcements == directory.snapshot(NOW_S).announcements
    assert other.entry(peer.peer_id).announcement.free_tokens == 7


@given(st.lists(st.dictionaries(st.sampled_from(["name", "version", "model_name"]), st.text(max_size=99)), max_size=8))
def test_whatever_changes_arrives_as_it_was_said(changes):
    here, there, peer = Directory(), Directory(), IDENTITIES[0]
    for sequence, fields in enumerate(changes):
        said = claim(peer, sequence, **fields)
        here.announce(said, peer, NOW_S)
        entry = here.entry(peer.peer_id)
        assert there.merge(entry.as_record(NOW_S, has_body=entry.has_new_body), NOW_S) == "new"
        assert there.snapshot(NOW_S).announcements == (said,)


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
    assert seen(directory) == {IDENTITIES[1].peer_id, IDENTITIES[2].peer_id}


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
    for depth in (0, 1, 2):
        sums = zip(asker.sums(now_s, depth), other.sums(now_s, depth), strict=True)
        differing = [bucket for bucket, (here, there) in enumerate(sums) if here != there]
        here, there = asker.ids(differing, now_s, depth), other.ids(differing, now_s, depth)
        for bucket in differing:
            for teller, hearer, lacking in (
                (other, asker, set(there[bucket]) - set(here[bucket])),
                (asker, other, set(here[bucket]) - set(there[bucket])),
            ):
                for record_id in lacking:
                    hearer.merge(teller.find(record_id).as_record(now_s, has_body=True), now_s)
    assert asker.sums(now_s, 2) == other.sums(now_s, 2)


def test_what_changed_fits_into_messages_and_leaves_nothing_out():
    # The table is filled from within: thousands of signatures would take longer than they tell.
    directory = heard([record(IDENTITIES[0], name="n" * 128, model_name="m" * 128)])
    entry = directory.entry(IDENTITIES[0].peer_id)
    peers = [f"{number:052}" for number in range(MAX_RECORDS * 2 + 1)]
    directory._entries = dict.fromkeys(peers, entry)
    parts = list(directory.changes(0, NOW_S))
    assert sum(len(records) for records, _ in parts) == len(peers)
    for records, suspicions in parts:
        assert len(records) <= MAX_RECORDS
        assert len(encode_message(Publish(records=records, suspicions=suspicions))) <= MAX_MESSAGE_BYTES


def test_the_longest_lists_fit_into_a_message():
    ids, listing = bytes(MAX_IDS * 8), {bucket: bytes(16 * 8) for bucket in range(MAX_BUCKETS)}
    news = News(ids=ids, wanted=ids, bodies=ids, sums=bytes(MAX_BUCKETS * 8), listing=listing)
    assert len(encode_message(news)) <= MAX_MESSAGE_BYTES * 5 // 8
    assert SwarmConfig().max_peers <= MAX_IDS


def test_changes_are_told_from_what_was_known_before():
    directory = heard([record(identity) for identity in IDENTITIES[:3]])
    revision = directory.revision
    assert list(directory.changes(revision, NOW_S)) == [((), ())]
    directory.merge(record(IDENTITIES[0], sequence=2), NOW_S)
    directory.merge(record(IDENTITIES[4]), NOW_S)
    directory.merge(record(IDENTITIES[4]), NOW_S)
    ((records, _),) = directory.changes(revision, NOW_S)
    assert [peer_of(read_stamp(each).peer) for each in records] == [IDENTITIES[number].peer_id for number in (4, 0)]
    assert [each.body is None for each in records] == [False, True]  # the other side has the old body already
    ((records, _),) = directory.changes(0, NOW_S)
    assert [peer_of(read_stamp(each).peer) for each in records] == [
        IDENTITIES[number].peer_id for number in (4, 0, 2, 1)
    ]
    assert all(each.body is not None for each in records)


# Suspicion

SUSPECT_S = SwarmConfig().suspect_s


def test_a_suspect_is_seen_for_a_while_and_then_no_more():
    directory = heard([record(identity) for identity in IDENTITIES[:3]])
    assert directory.suspect(accuse(IDENTITIES[0].peer_id, 1, IDENTITIES[1]), NOW_S) == "suspected"
    assert IDENTITIES[0].peer_id in seen(directory, NOW_S + SUSPECT_S - 0.1)
    assert IDENTITIES[0].peer_id not in seen(directory, NOW_S + SUSPECT_S)
    assert directory.suspect(accuse(IDENTITIES[0].peer_id, 1, IDENTITIES[2]), NOW_S) == "known"


@pytest.mark.parametrize("after_s", [0.0, SUSPECT_S + 1])
def test_only_a_newer_stamp_of_the_suspect_refutes(after_s):
    directory = heard([record(identity) for identity in IDENTITIES[:2]])
    suspicion = accuse(IDENTITIES[0].peer_id, 1, IDENTITIES[1])
    directory.suspect(suspicion, NOW_S)
    assert directory.merge(record(IDENTITIES[0]), NOW_S + after_s) == "known"
    assert directory.merge(record(IDENTITIES[0], sequence=2), NOW_S + after_s) == "new"
    assert IDENTITIES[0].peer_id in seen(directory, NOW_S + after_s + TTL_S - 1)
    assert directory.suspect(suspicion, NOW_S + after_s) == "refuted"


def test_a_suspicion_needs_an_accuser_who_is_seen_and_a_stamp_that_there_is():
    directory = heard([record(IDENTITIES[0]), record(IDENTITIES[1], age_s=TTL_S)])
    for accuser in (IDENTITIES[0], IDENTITIES[1], IDENTITIES[2]):  # itself, one who has expired, a stranger
        assert directory.suspect(accuse(IDENTITIES[0].peer_id, 1, accuser), NOW_S) == "groundless"
    directory.merge(record(IDENTITIES[2]), NOW_S)
    assert directory.suspect(accuse(IDENTITIES[0].peer_id, 2**53, IDENTITIES[2]), NOW_S) == "groundless"
    forged = msgspec.structs.replace(accuse(IDENTITIES[0].peer_id, 1, IDENTITIES[2]), signature=bytes(64))
    assert directory.suspect(forged, NOW_S) == "forged"
    assert IDENTITIES[0].peer_id in seen(directory, NOW_S + SUSPECT_S + 1)


def test_one_accuser_cannot_accuse_many():
    peers = [Identity(Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32)) for number in range(20)]
    directory = heard([record(peer) for peer in peers])
    results = [directory.suspect(accuse(peer.peer_id, 1, peers[0]), NOW_S) for peer in peers[1:]]
    assert results == ["suspected"] * 8 + ["excessive"] * 11
    assert directory.suspect(accuse(peers[19].peer_id, 1, peers[9]), NOW_S) == "suspected"
    assert directory.doubts["excessive"] == 11
