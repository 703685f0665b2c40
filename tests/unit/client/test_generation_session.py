"""What a session counts before anything is sent: positions without padding, and masks that it can keep."""

# B batch, P positions

import pytest
import torch

from corolla.client import ClientConfig, GenerationSession, Target
from corolla.errors import ConfigError, UsageError
from corolla.terms import ModelId, Span


@pytest.fixture
def session():
    return GenerationSession(None, Target(ModelId("ab" * 32), Span(0, 4), "raw"), context_tokens=256)


def mask(*rows):
    return torch.tensor([[int(character) for character in row] for row in rows])


def test_positions_count_from_zero_without_a_mask(session):
    assert session.next_positions(2, 3, None).tolist() == [[0, 1, 2], [0, 1, 2]]


def test_positions_are_negative_where_there_is_padding(session):
    assert session.next_positions(2, 3, mask("111", "001")).tolist() == [[0, 1, 2], [-1, -1, 0]]


def test_padding_behind_virtual_tokens_is_no_token_either(session):
    assert session.next_positions(2, 4, mask("1111", "1001")).tolist() == [[0, 1, 2, 3], [0, -1, -1, 1]]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (("110", "111"), "no padding at the end of a row"),
        (("000", "111"), "nothing but padding"),
        (("1111", "1111"), r"shape \[2, 4\]; 2 rows of 3 stored and new positions"),
        (("111",), r"shape \[1, 3\]; 2 rows"),
    ],
)
def test_a_mask_that_cannot_be_kept_is_refused(session, rows, words):
    with pytest.raises(UsageError, match=words):
        session.next_positions(2, 3, mask(*rows))


def test_a_new_session_is_empty(session):
    assert (session.position, session.get_seq_length(), session.is_initialized, session.chain) == (0, 0, False, None)
    assert "not opened yet, position 0" in repr(session)
    session.close()
    assert "closed" in repr(session)


def test_rows_cannot_be_multiplied_or_dropped(session):
    with pytest.raises(UsageError, match="repeat the prompt"):
        session.batch_repeat_interleave(2)
    with pytest.raises(UsageError, match="generate without"):
        session.batch_select_indices(torch.tensor([0]))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"codec": "gzip"}, "codec is 'gzip'; it must be one of raw, half"),
        ({"attempts": 0}, "attempts is 0; it must be above 0"),
        ({"step_s": -1.0}, "step_s is -1.0"),
        ({"avoid_peers": ("bob",)}, "avoid_peers has 'bob', which is not a peer id"),
    ],
)
def test_an_impossible_setting_is_named(settings, words):
    with pytest.raises(ConfigError, match=words):
        ClientConfig(**settings)
