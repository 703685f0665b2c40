import pytest

from corolla.cli.demo import split
from corolla.errors import UsageError


@pytest.mark.parametrize(("blocks", "servers"), [(30, 3), (30, 4), (4, 4), (61, 1), (7, 5)])
def test_servers_share_all_blocks_and_none_has_two_more_than_another(blocks, servers):
    shares = split(blocks, servers)
    assert len(shares) == servers
    assert sum(shares) == blocks
    assert max(shares) - min(shares) <= 1


def test_more_servers_than_blocks_are_refused():
    with pytest.raises(UsageError, match="at most 4 servers"):
        split(4, 5)
