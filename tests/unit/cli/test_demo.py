import pytest

from corolla.cli.demo import split
from corolla.errors import UsageError
from corolla.terms import Span


@pytest.mark.parametrize(("blocks", "servers"), [(30, 3), (30, 4), (4, 4), (61, 1), (7, 5)])
def test_servers_share_all_blocks_and_none_has_two_more_than_another(blocks, servers):
    spans = split(blocks, servers)
    assert len(spans) == servers
    assert [block for span in spans for block in range(span.start, span.stop)] == list(range(blocks))
    assert max(map(len, spans)) - min(map(len, spans)) <= 1


def test_more_servers_than_blocks_are_refused():
    with pytest.raises(UsageError, match="at most 4 servers"):
        split(4, 5)


def test_a_third_of_a_model_is_what_it_should_be():
    assert split(30, 3) == [Span(0, 10), Span(10, 20), Span(20, 30)]
