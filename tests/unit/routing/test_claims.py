"""Whoever joins while another is loading does not take the same blocks, whichever of them has the smaller id."""

import pytest

from corolla.routing import choose_span, claims_before
from corolla.terms import Announcement, ModelId, PeerId, Snapshot, Span

MODEL = ModelId("ab" * 32)
SMALLER, GREATER = PeerId("a" * 52), PeerId("b" * 52)


def joining(peer, *span):
    return Announcement(
        peer=peer,
        sequence=1,
        ttl_s=20.0,
        model=MODEL,
        model_name="tiny",
        num_blocks=4,
        span=Span(*span),
        state="joining",
        precision="float32",
        addresses=(),
    )


def chosen(peer, *claims, respected=()):
    snapshot = Snapshot(announcements=claims)
    return choose_span(claims_before(snapshot, peer, respected), MODEL, [1] * 4, 2)


@pytest.mark.parametrize(("newcomer", "loading"), [(SMALLER, GREATER), (GREATER, SMALLER)])
def test_a_claim_that_was_known_at_the_first_choice_counts(newcomer, loading):
    claim = joining(loading, 0, 2)
    assert chosen(newcomer, claim, respected={(loading, Span(0, 2))}) == Span(2, 4)


def test_of_claims_at_the_same_moment_the_smaller_id_s_stays():
    claims = joining(SMALLER, 0, 2), joining(GREATER, 0, 2)
    assert chosen(SMALLER, *claims) == Span(0, 2)
    assert chosen(GREATER, *claims) == Span(2, 4)


def test_a_claim_that_has_moved_since_is_not_respected():
    assert chosen(SMALLER, joining(GREATER, 0, 2), respected={(GREATER, Span(2, 4))}) == Span(0, 2)
