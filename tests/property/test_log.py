"""A log tells the tokens that a hop holds, whatever was done to its rows, and gives back the very bytes."""

# N packed tokens, D model width

import anyio
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corolla.codec import decode, encode, splice
from corolla.replay import Log, Store
from corolla.wire import Step

WIDTH = 70  # not a whole number of the codec's blocks
CODECS = ["raw", "fp16", "bf16", "int8"]


@st.composite
def scripts(draw):
    """Steps that fit the rows as they then are: for each, its order, starts and counts, and its codec."""
    rows = draw(st.integers(1, 3))
    lengths, script = [0] * rows, []
    for _ in range(draw(st.integers(1, 8))):
        order = draw(st.none() | st.tuples(*[st.integers(0, rows - 1)] * rows))
        kept = [lengths[row] for row in order] if order else lengths
        starts = tuple(draw(st.just(length) | st.integers(0, length)) for length in kept)
        counts = [draw(st.integers(0, 5)) for _ in range(rows)]
        counts[0] += not sum(counts)
        lengths = [start + count for start, count in zip(starts, counts, strict=True)]
        script.append((order, starts, tuple(counts), draw(st.sampled_from(CODECS))))
    return rows, script


def write(log, store, script, settled=0):
    """Log a script, with what is settled so many steps behind; give the tokens that each row holds in the end."""
    rows = [torch.empty(0, WIDTH)] * len(log.rows)
    for number, (order, starts, counts, codec) in enumerate(script, start=1):
        encoded = encode(torch.randn(sum(counts), WIDTH, generator=torch.Generator().manual_seed(number)), codec)
        sent = store.keep(encoded.meta, encoded.buffers)
        step = Step(
            starts=starts, counts=counts, order=order, hidden=sent.meta, number=number, settled=max(0, number - settled)
        )
        log.note(step, sent)
        rows = taken(rows, step, decode(sent.meta, sent.payload))
    return rows


def read(log, limit_tokens):
    """Play the log back to rows that are empty."""
    rows = [torch.empty(0, WIDTH)] * len(log.rows)
    numbers = [0]
    for step, payload in log.replay(limit_tokens):
        assert step.number in (numbers[-1], numbers[-1] + 1) or not numbers[-1]
        numbers.append(step.number)
        if not step.number:
            assert 0 < sum(step.counts) <= limit_tokens
            assert step.starts == tuple(len(row) for row in rows)
            assert step.order is None
        rows = taken(rows, step, decode(step.hidden, payload))
    assert max(numbers[1:], default=0) == numbers[-1]
    return rows


def taken(rows, step, hidden_ND):
    """What rows hold after a step."""
    kept = [rows[row] for row in step.order] if step.order else rows
    pieces = zip(kept, step.starts, hidden_ND.split(step.counts), strict=True)
    return [torch.cat([row[:start], more]) for row, start, more in pieces]


@given(scripts(), st.integers(1, 9), st.integers(0, 4))
def test_a_replay_gives_each_row_what_it_held(script, limit_tokens, behind):
    rows, script = script
    log = Log(rows)
    expected = write(log, Store(1 << 20), script, behind)
    if not behind:
        log.settle(len(script))
        assert log.tokens == sum(len(row) for row in expected)
    assert log.longest == max(len(row) for row in expected)
    for row, expected_row in zip(read(log, limit_tokens), expected, strict=True):
        assert torch.equal(row, expected_row)


@settings(max_examples=15)
@given(scripts(), st.integers(0, 2000))
def test_bytes_that_went_to_a_file_come_back(script, limit_bytes):
    rows, script = script
    log, store = Log(rows), Store(limit_bytes)
    for end in range(1, len(script) + 1):
        log = Log(rows)
        expected = write(log, store, script[:end])
        anyio.run(store.settle)
        assert store.memory_bytes <= limit_bytes
    write(Log(rows), store, script)
    for row, expected_row in zip(read(log, 4), expected, strict=True):
        assert torch.equal(row, expected_row)


@given(scripts(), scripts())
def test_a_log_comes_back_to_what_it_told_before(script, more):
    rows, script = script
    log, store = Log(rows), Store(1 << 20)
    expected = write(log, store, script)
    kept = log.rows
    other = Log(more[0])
    write(other, store, more[1])
    if more[0] == rows:
        log.restore(other.rows)
    log.restore(kept)
    for row, expected_row in zip(read(log, 5), expected, strict=True):
        assert torch.equal(row, expected_row)


def test_what_nobody_continues_is_forgotten():
    """Petals defects M and N: what was sent was copied at each step, and what is over was remembered for ever."""
    log, store = Log(1), Store(10 * WIDTH * 4)
    for number in range(50):
        write_one(log, store, start=number % 5)
        anyio.run(store.settle)
        assert store.memory_bytes <= 10 * WIDTH * 4
    assert log.tokens == 5


def write_one(log, store, start):
    encoded = encode(torch.zeros(1, WIDTH), "raw")
    log.note(Step(starts=(start,), counts=(1,), hidden=encoded.meta), store.keep(encoded.meta, encoded.buffers))


@pytest.mark.parametrize("codec", CODECS)
def test_spliced_rows_keep_their_bytes(codec):
    tensors = [torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(count)) for count in (3, 1, 6)]
    encoded = [encode(tensor_ND, codec) for tensor_ND in tensors]
    cuts = [(1, 3), (0, 1), (2, 5)]
    parts = [(one.meta, b"".join(one.buffers), *cut) for one, cut in zip(encoded, cuts, strict=True)]
    spliced = splice(parts)
    whole = encode(
        torch.cat([tensor_ND[first:stop] for tensor_ND, (first, stop) in zip(tensors, cuts, strict=True)]), codec
    )
    assert spliced.meta == whole.meta
    assert b"".join(spliced.buffers) == b"".join(whole.buffers)
