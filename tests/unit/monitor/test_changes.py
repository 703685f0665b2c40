"""What has happened between two looks."""

import pytest
from msgspec.structs import replace

from corolla.monitor import compare
from corolla.monitor.changes import MAX_CHANGES
from corolla.terms import Announcement, ModelId, PeerId, Span

ONE = Announcement(
    peer=PeerId("a" * 52),
    sequence=1,
    ttl_s=20.0,
    model=ModelId("ab" * 32),
    model_name="org/model",
    num_blocks=8,
    span=Span(0, 4),
    state="online",
    precision="bfloat16",
    addresses=(),
    name="attic\x1b",
)


def happened(before, after):
    seen = [{} if one is None else {one.peer: one} for one in (before, after)]
    return [change.what for change in compare(*seen, 1.0)]


@pytest.mark.parametrize(
    ("before", "after", "what"),
    [
        (None, replace(ONE, state="joining"), "joined"),
        (None, ONE, "online"),
        (replace(ONE, state="joining"), ONE, "online"),
        (ONE, replace(ONE, next_span=Span(4, 8)), "moving"),
        (replace(ONE, next_span=Span(4, 8)), replace(ONE, span=Span(4, 8)), "moved"),
        (ONE, replace(ONE, state="draining"), "draining"),
        (replace(ONE, state="draining"), None, "drained"),
        (ONE, None, "died"),
        (replace(ONE, state="joining"), None, "died"),
    ],
)
def test_each_change_has_one_name(before, after, what):
    assert happened(before, after) == [what]


@pytest.mark.parametrize(
    "after",
    [
        ONE,
        replace(ONE, sequence=2, free_tokens=5),
        replace(ONE, state="draining", next_span=Span(4, 8), span=Span(0, 4)),
    ],
)
def test_load_is_no_news_and_a_move_is_told_once(after):
    before = replace(ONE, next_span=after.next_span)
    assert happened(before, after) == []


def test_a_change_names_the_server_in_letters_that_print_and_says_where_it_will_be():
    moving = replace(ONE, next_span=Span(4, 8))
    (change,) = compare({ONE.peer: ONE}, {ONE.peer: moving}, 1.0)
    assert (change.name, change.span, change.model_name) == ("attic", Span(4, 8), "org/model")


def test_a_great_change_is_cut_short():
    peers = [PeerId("a" * 50 + one + two) for one in "abcdefghijklmnopqrst" for two in "abcdefghijklmnopqrst"]
    assert len(compare({peer: replace(ONE, peer=peer) for peer in peers}, {}, 1.0)) == MAX_CHANGES
