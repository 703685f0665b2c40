"""The KV pool never lends a page twice, and a row is exactly the tokens that were committed to it."""

# H heads, T new tokens, L stored tokens, D head width

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


class Model:
    """A row as two plain lists of tokens for each block."""

    def __init__(self, tokens=None):
        self.tokens = tokens or {block: [] for block in BLOCKS}

    def fork(self):
        return Model({block: list(tokens) for block, tokens in self.tokens.items()})


def stacked(tokens, width, part):
    return torch.stack([pair[part] for pair in tokens], dim=1) if tokens else torch.empty(HEADS, 0, width)


def step(row, model, tokens, blocks, keep):
    """Append new tokens in some blocks, compare what comes back, and commit if all blocks were run."""
    for block in blocks:
        new = [(torch.randn(HEADS, KEY_WIDTH), torch.randn(HEADS, VALUE_WIDTH)) for _ in range(tokens)]
        keys_HLD, values_HLD = row.append(block, stacked(new, KEY_WIDTH, 0), stacked(new, VALUE_WIDTH, 1))
        expected = model.tokens[block][: row.length] + new
        assert torch.equal(keys_HLD, stacked(expected, KEY_WIDTH, 0))
        assert torch.equal(values_HLD, stacked(expected, VALUE_WIDTH, 1))
        if len(blocks) == len(BLOCKS):
            model.tokens[block] = expected
    if len(blocks) == len(BLOCKS):
        row.commit(row.length + tokens)
    else:  # the step failed half-way
        row.commit(keep)
        model.tokens = {block: stored[:keep] for block, stored in model.tokens.items()}


def check(row, model):
    """Compare a row with its model; it takes exactly the pages of its tokens."""
    assert row.length == len(model.tokens[BLOCKS[0]])
    numbers = len(row._stored) * HEADS * (KEY_WIDTH + VALUE_WIDTH) * pages_for(row.length) * PAGE_TOKENS
    assert row.nbytes == 4 * numbers
    for block, (keys_HLD, values_HLD) in row._stored.items():
        assert torch.equal(keys_HLD[:, : row.length], stacked(model.tokens[block], KEY_WIDTH, 0))
        assert torch.equal(values_HLD[:, : row.length], stacked(model.tokens[block], VALUE_WIDTH, 1))


ACTIONS = st.one_of(
    st.tuples(st.just("step"), st.integers(1, 150)),
    st.tuples(st.just("fail"), st.integers(1, 150)),
    st.tuples(st.just("rewind"), st.floats(0, 1)),
    st.tuples(st.just("fork"), st.just(0)),
)


@given(actions=st.lists(st.tuples(ACTIONS, st.integers(0, 3)), max_size=12))
@torch.inference_mode()
def test_rows_are_what_was_committed_to_them(actions):
    torch.manual_seed(0)
    rows = [(RowKV(), Model())]
    for (action, amount), which in actions:
        row, model = rows[which % len(rows)]
        if action == "step":
            step(row, model, amount, BLOCKS, row.length)
        elif action == "fail":
            step(row, model, amount, BLOCKS[:1], row.length)
        elif action == "rewind":
            length = int(amount * row.length)
            row.commit(length)
            model.tokens = {block: tokens[:length] for block, tokens in model.tokens.items()}
        else:
            rows.append((row.fork(), model.fork()))
        for one in rows:
            check(*one)


def test_a_row_never_shows_memory_that_nobody_wrote():
    row = RowKV()
    row.append(0, torch.ones(1, 5, 1), torch.ones(1, 5, 1))
    with pytest.raises(AssertionError, match="fewer than 65 tokens"):
        row.commit(65)
    row.commit(5)
    with pytest.raises(AssertionError):
        row.append(1, torch.ones(1, 1, 1), torch.ones(1, 1, 1))
