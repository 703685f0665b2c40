"""Whatever rows share, each holds what its own tokens make; what is kept is what was, is counted, and yields."""

# H heads, T new tokens, D head width

import hashlib
from itertools import takewhile

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from corolla.cache import PAGE_TOKENS, Content, PagePool, Prefixes, RowKV, pages_for

PAGES = 40
LIMIT_PAGES = 16
ROOTS = (b"one client", b"another")
BLOCKS = (3, 5)
WINDOW = 70


def digest(token):
    return hashlib.sha256(bytes([token])).digest()


def stored_of(root, tokens, start):
    """What blocks store of some tokens, which depends on all before them, as it does in a model."""
    sums = [
        root[0] + sum((place + 1) * token for place, token in enumerate(tokens[: stop + 1]))
        for stop in range(start, len(tokens))
    ]
    return torch.tensor(sums, dtype=torch.float32)[None, :, None]


class Session:
    """A row, what its tokens are, and its right to pages."""

    def __init__(self, root, row, lease):
        self.root, self.row, self.lease, self.tokens = root, row, lease, []


class PrefixMachine(RuleBasedStateMachine):
    """Sessions that open, go on, go back and end, on a pool that is nearly full."""

    def __init__(self):
        super().__init__()
        self.pool = PagePool(PAGES)
        self.prefixes = Prefixes(LIMIT_PAGES)
        self.sessions = []
        self.now_s = 0.0
        self.windows = {}

    def make_room(self):
        self.prefixes.shrink(self.pool.free_pages)

    @rule(root=st.sampled_from(ROOTS), windowed=st.booleans())
    def open(self, root, windowed):
        if self.pool.free_pages < 6:
            return
        row = RowKV(6 * PAGE_TOKENS, {BLOCKS[0]: WINDOW} if windowed else {})
        row.content = Content(root + bytes([windowed]))  # the same weights have the same windows
        self.prefixes.watch(row)
        self.sessions.append(Session(root + bytes([windowed]), row, self.pool.lease(1, 6 * PAGE_TOKENS)))
        self.make_room()

    @precondition(lambda self: self.sessions)
    @rule(which=st.integers(0, 9), kind=st.integers(0, 2), count=st.integers(1, 400))
    def go_on(self, which, kind, count):
        """Add tokens; as there are three kinds of texts, rows often begin alike."""
        session = self.sessions[which % len(self.sessions)]
        start = len(session.tokens)
        count = min(count, 9 * PAGE_TOKENS - start)
        if count < 1 or pages_for(start + count) > session.lease.claim_pages + self.pool.free_pages:
            return
        session.lease.hold([start + count])
        self.make_room()
        new = [kind if start + place < 300 else place % 3 + kind for place in range(count)]
        keys = session.row.content.keys_with([digest(token) for token in new])
        whole = [*session.tokens, *new]
        best = max((self.common(session, other, whole) for other in self.sessions), default=0)
        found = self.prefixes.find(keys, self.now_s)
        assert (found.tokens if found else 0) >= best
        if found and found.tokens > start:
            assert found.row.content.keys[: found.tokens // PAGE_TOKENS] == keys[: found.tokens // PAGE_TOKENS]
            twin = found.row.fork(found.tokens, session.row.capacity_tokens)
            self.prefixes.watch(twin)
            session.row.leave()
            session.row, start = twin, found.tokens
        if start < len(whole):
            for block in BLOCKS:
                session.row.append(block, *[stored_of(session.root, whole, start)] * 2)
            session.row.commit(len(whole))
            session.row.content.add([digest(token) for token in whole[start:]])
        session.tokens = whole

    def common(self, session, other, whole):
        """Count the tokens that a live row could lend."""
        if other.root != session.root:
            return 0
        alike = len([*takewhile(lambda pair: pair[0] == pair[1], zip(other.tokens, whole, strict=False))])
        pages = alike // PAGE_TOKENS
        return pages * PAGE_TOKENS if pages * PAGE_TOKENS >= other.row.shortest else 0

    @precondition(lambda self: self.sessions)
    @rule(which=st.integers(0, 9), share=st.floats(0, 1))
    def go_back(self, which, share):
        session = self.sessions[which % len(self.sessions)]
        length = int(share * len(session.tokens))
        length = length if length >= session.row.shortest else 0
        session.row.commit(length)
        session.lease.hold([length])
        session.tokens = session.tokens[:length]

    @precondition(lambda self: self.sessions)
    @rule(which=st.integers(0, 9))
    def end(self, which):
        session = self.sessions.pop(which % len(self.sessions))
        session.lease.release()
        self.prefixes.keep(session.row, self.now_s)
        self.make_room()

    @rule(elapsed_s=st.floats(0, 5))
    def time_passes(self, elapsed_s):
        self.now_s += elapsed_s
        self.prefixes.drop_old(self.now_s - 20)

    @invariant()
    def rows_hold_what_their_tokens_make(self):
        for session in self.sessions:
            row = session.row
            assert row.length == len(session.tokens) == row.content.tokens
            if row.length:
                for block in BLOCKS[1:] if row.shortest else BLOCKS:
                    for part in row.read(block, 0, row.length):
                        assert torch.equal(part, stored_of(session.root, session.tokens, 0))

    @invariant()
    def accounts_add_up(self):
        self.pool.check_integrity()
        self.prefixes.check_integrity()
        assert self.prefixes.kept_pages <= min(LIMIT_PAGES, self.pool.free_pages)


PrefixMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30)
TestPrefixes = PrefixMachine.TestCase


def test_a_key_names_all_that_came_before_and_who_may_know():
    content = Content(b"root")
    content.add([digest(0)] * 200)
    assert len(content.keys) == 3
    other = Content(b"root")
    other.add([digest(0)] * 100)
    other.add([digest(0)] * 28)
    assert other.keys == content.keys[:2]
    for changed, root in [([1, *[0] * 63], b"root"), ([0] * 64, b"other root")]:
        different = Content(root)
        different.add([digest(token) for token in changed])
        different.add([digest(0)] * 64)
        assert not {*different.keys} & {*content.keys}
    content.cut(130)
    content.add([digest(0)] * 62)
    assert content.keys[:2] == other.keys
    assert len(content.keys) == 3


def row_of(token, tokens=PAGE_TOKENS):
    row = RowKV()
    row.content = Content(b"")
    for block in BLOCKS:
        row.append(block, torch.ones(1, tokens, 1), torch.ones(1, tokens, 1))
    row.commit(tokens)
    row.content.add([digest(token)] * tokens)
    return row


def test_a_row_that_comes_back_to_what_others_share_still_knows_what_it_is():
    row = row_of(0, 600)
    twin = row.fork(512)
    for one in (row, twin):
        one.commit(400)
        assert one.content.tokens == 400
        assert one.content.keys == twin.content.keys[:6]


def test_what_was_not_wanted_for_longest_goes_first():
    prefixes = Prefixes(3)
    rows = [row_of(token) for token in range(4)]
    keys = [row.content.keys[:] for row in rows]
    for row in rows[:3]:
        prefixes.keep(row, 0.0)
    assert prefixes.find(keys[0], 1.0) == (rows[0], PAGE_TOKENS)
    prefixes.keep(rows[3], 2.0)
    assert [prefixes.find(one, 3.0) is not None for one in keys] == [True, False, True, True]
    again = row_of(0)
    prefixes.keep(again, 4.0)  # another begins with all of it
    assert prefixes.find(keys[0], 5.0).row is rows[0]
    assert again.length == 0
    prefixes.shrink(0)
    assert prefixes.kept_pages == 0
    assert not any(row.nbytes for row in rows)
