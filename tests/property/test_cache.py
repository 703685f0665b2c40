"""The KV pool never lends a page twice, and a row is exactly the tokens that were committed to it."""

# H heads, T new tokens, L stored tokens, D head width

import mmap

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from corolla.cache import PAGE_TOKENS, PagePool, RowKV, pages_for
from corolla.errors import CacheFull, PeerBusy, SessionClosed

PAGES = 12
LENGTHS = st.lists(st.integers(0, 4 * PAGE_TOKENS), min_size=1, max_size=4)


class PoolMachine(RuleBasedStateMachine):
    """Any sequence of what sessions do to a pool, against two numbers for each lease."""

    leases = Bundle("leases")

    def __init__(self):
        super().__init__()
        self.pool = PagePool(PAGES)
        self.claims = {}  # lease: (pages promised, pages held)

    def free(self):
        return PAGES - sum(max(promised, held) for promised, held in self.claims.values())

    @rule(target=leases, rows=st.integers(1, 4), max_tokens=st.integers(0, 5 * PAGE_TOKENS))
    def open(self, rows, max_tokens):
        pages = rows * -(-max_tokens // PAGE_TOKENS)
        refusal = CacheFull if pages > PAGES else PeerBusy if pages > self.free() else None
        if refusal:
            with pytest.raises(refusal):
                self.pool.lease(rows, max_tokens)
            return multiple()
        lease = self.pool.lease(rows, max_tokens)
        self.claims[lease] = (pages, 0)
        return lease

    @rule(lease=leases, lengths=LENGTHS)
    def hold(self, lease, lengths):
        promised, held = self.claims[lease]
        pages = sum(-(-length // PAGE_TOKENS) for length in lengths)
        if pages > max(promised, held) + self.free():
            with pytest.raises(CacheFull, match=f"{pages - max(promised, held) - self.free()} more than are free"):
                lease.hold(lengths)
            assert lease.held_pages == held
        else:
            lease.hold(lengths)
            self.claims[lease] = (promised, pages)

    @rule(lease=consumes(leases), lengths=LENGTHS)
    def release(self, lease, lengths):
        lease.release()
        lease.release()
        with pytest.raises(SessionClosed):
            lease.hold(lengths)
        del self.claims[lease]

    @invariant()
    def accounts_add_up(self):
        self.pool.check_integrity()
        assert self.pool.free_pages == self.free() >= 0
        assert self.pool.free_tokens == self.free() * PAGE_TOKENS
        assert self.pool.sessions == len(self.claims)
        assert all(held == lease.held_pages <= lease.claim_pages for lease, (_, held) in self.claims.items())


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30)
TestPool = PoolMachine.TestCase


def test_integrity_notices_a_page_with_two_owners():
    pool = PagePool(2)
    pool.lease(1, PAGE_TOKENS).held_pages = 3
    with pytest.raises(AssertionError, match="1 pages are claimed that do not exist"):
        pool.check_integrity()


HEADS, KEY_WIDTH, VALUE_WIDTH = 2, 3, 1
BLOCKS = (4, 9)
WINDOW = 70


def random_tokens(tokens):
    return torch.randn(HEADS, tokens, KEY_WIDTH), torch.randn(HEADS, tokens, VALUE_WIDTH)


def joined(pieces):
    return tuple(torch.cat(parts, 1) for parts in zip(*pieces, strict=True))


class Rows:
    """Rows that share what they have in common, beside plain tensors of each; ``windows`` says what blocks see."""

    def __init__(self, windows):
        self.windows = windows
        self.rows = [RowKV(200, windows)]
        self.models = [{block: random_tokens(0) for block in BLOCKS}]

    def step(self, which, tokens, *, fails=False):
        """Append new tokens in some blocks, compare what comes back, and commit if all blocks were run."""
        row, model = self.rows[which], self.models[which]
        for block in BLOCKS[:1] if fails else BLOCKS:
            new = random_tokens(tokens)
            found = joined(row.append(block, *new))
            expected = joined([model[block], new])
            seen = min(self.windows.get(block, row.length) + tokens, row.length + tokens)
            assert all(torch.equal(one[:, -seen:], due[:, -seen:]) for one, due in zip(found, expected, strict=True))
            if not fails:
                model[block] = expected
        row.commit(row.length if fails else row.length + tokens)

    def rewind(self, which, share):
        """Take a row back as far as its windows allow, or to nothing."""
        row = self.rows[which]
        length = int(share * row.length)
        length = length if length >= row.shortest else 0
        row.commit(length)
        self.models[which] = {
            block: (keys[:, :length], values[:, :length]) for block, (keys, values) in self.models[which].items()
        }

    def fork(self, which, share):
        """Let another row begin as one does."""
        row = self.rows[which]
        length = max(int(share * row.length), row.shortest)
        self.rows.append(row.fork(length))
        self.models.append(dict(self.models[which]))
        self.rewind(-1, 1.0)
        self.models[-1] = {block: tuple(part[:, :length] for part in pair) for block, pair in self.models[-1].items()}

    def leave(self, which):
        """Drop a row that others may share a part of."""
        if len(self.rows) > 1:
            self.rows.pop(which).leave()
            self.models.pop(which)

    def check(self):
        """Compare all rows with what they are to hold, without disturbing them."""
        for row, model in zip(self.rows, self.models, strict=True):
            assert row.length == model[BLOCKS[0]][0].shape[1]
            if row.length and not row.shortest:
                for block in BLOCKS:
                    assert all(
                        torch.equal(one, due)
                        for one, due in zip(row.read(block, 0, row.length), model[block], strict=True)
                    )
            else:
                assert row.length == 0 or row.shortest <= row.length
            token_bytes = 4 * HEADS * (KEY_WIDTH + VALUE_WIDTH)
            own_pages = pages_for(row.length - row.shared_tokens)
            assert row.nbytes <= len(row.blocks) * token_bytes * own_pages * PAGE_TOKENS
            if not row.shortest and not row.shared_tokens:
                assert row.nbytes in (0, *(n * token_bytes * own_pages * PAGE_TOKENS for n in (1, len(BLOCKS))))


ACTIONS = st.one_of(
    st.tuples(st.just("step"), st.integers(1, 400)),
    st.tuples(st.just("fail"), st.integers(1, 150)),
    st.tuples(st.just("rewind"), st.floats(0, 1)),
    st.tuples(st.just("fork"), st.floats(0, 1)),
    st.tuples(st.just("leave"), st.just(0)),
)


@given(actions=st.lists(st.tuples(ACTIONS, st.integers(0, 5)), max_size=16), windows=st.sampled_from([{}, {9: WINDOW}]))
@torch.inference_mode()
def test_rows_are_what_was_committed_to_them_whatever_they_share(actions, windows):
    torch.manual_seed(0)
    rows = Rows(windows)
    for (action, amount), which in actions:
        which %= len(rows.rows)
        if action == "fail":
            rows.step(which, amount, fails=True)
        else:
            getattr(rows, action)(which, *[amount][: action != "leave"])
        rows.check()
    for which in range(len(rows.rows)):
        rows.step(which, 3)


def test_a_row_never_shows_memory_that_nobody_wrote():
    row = RowKV()
    row.append(0, torch.ones(1, 5, 1), torch.ones(1, 5, 1))
    with pytest.raises(AssertionError, match="fewer than 65 tokens"):
        row.commit(65)
    row.commit(5)
    with pytest.raises(AssertionError):
        row.append(1, torch.ones(1, 1, 1), torch.ones(1, 1, 1))


def resident_bytes():
    return psutil.Process().memory_info().rss


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="the system takes no memory back")
def test_memory_is_taken_as_tokens_come_and_given_back_as_they_leave():
    token_bytes, tokens = 2 * 4 * 64 * 2 * 4, 16_384
    row, before_bytes = RowKV(2 * tokens), resident_bytes()
    new = torch.ones(4, PAGE_TOKENS, 64), torch.ones(4, PAGE_TOKENS, 64)
    slack_bytes = 8 << 20
    for _ in range(tokens // PAGE_TOKENS):
        for block in range(2):
            row.append(block, *new)
        row.commit(row.length + PAGE_TOKENS)
        if row.length == PAGE_TOKENS:
            assert resident_bytes() - before_bytes < slack_bytes
    assert row.nbytes == token_bytes * tokens
    assert token_bytes * tokens / 2 < resident_bytes() - before_bytes < token_bytes * tokens + slack_bytes
    row.commit(PAGE_TOKENS)
    assert resident_bytes() - before_bytes < slack_bytes
