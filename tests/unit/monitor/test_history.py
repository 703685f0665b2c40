"""What the monitor remembers, and that it forgets."""

import sqlite3

import anyio
import pytest

from corolla.errors import ConfigError
from corolla.monitor.changes import Change
from corolla.monitor.history import COARSE_S, FINE_S, MAX_POINTS, History
from corolla.monitor.picture import ModelView, NextServer, Picture
from corolla.terms import ModelId, PeerId, Span

pytestmark = pytest.mark.anyio

MODEL = ModelId("ab" * 32)
DAY_S = 86_400


def picture(at_s, *, rate=10.0, online=3):
    model = ModelView(
        model=MODEL, name="m", blocks=1, servers=(), servers_total=online, online=online, rates=(rate,), counts=(1,),
        missing=0, bottleneck=Span(0, 1), tokens_per_s=rate, session_tokens_per_s=None, chain=(), free_tokens=2**70,
        sessions=1, next_server=NextServer(Span(0, 1), 0, 1.0, 2.0), links=(),
    )  # fmt: skip
    return Picture(at_s=at_s, age_s=0.0, models=(model,))


def remembering(path=None, *, keep_s=90 * DAY_S, max_changes=5):
    return History(path, keep_s=keep_s, max_changes=max_changes)


async def test_samples_come_back_in_order_and_many_are_drawn_together():
    async with remembering() as history:

        def fill():
            for at_s in range(3 * MAX_POINTS):
                history._note(picture(at_s, rate=float(at_s % 7)), {})

        await anyio.to_thread.run_sync(fill)
        few = await history.samples(MODEL, 10, 12)
        assert [(one.at_s, one.tokens_per_s) for one in few] == [(10, 3), (11, 4), (12, 5)]
        assert few[0].session_tokens_per_s is None
        many = await history.samples(MODEL, 0, 3 * MAX_POINTS)
        assert len(many) <= MAX_POINTS
        assert {one.tokens_per_s for one in many[1:-1]} < {0.0, 1.0, 2.0, 3.0, 4.0}  # the least of each group


async def test_what_is_old_is_thinned_out_and_then_forgotten():
    async with remembering(keep_s=3 * DAY_S) as history:
        await history.note(picture(-DAY_S), {})
        for at_s in range(0, 2 * COARSE_S, 60):
            await history.note(picture(at_s), {})
        await history.note(picture(FINE_S + 2 * COARSE_S), {})
        kept = [one.at_s for one in await history.samples(MODEL, -2 * DAY_S, COARSE_S * 2 - 1)]
        assert kept == [-DAY_S, 0, COARSE_S]
        await history.note(picture(2.5 * DAY_S), {})
        assert [one.at_s for one in await history.samples(MODEL, -2 * DAY_S, 1)] == [0]


async def test_only_the_newest_changes_are_kept():
    async with remembering(max_changes=5) as history:
        await history.add([Change(at_s=float(number), what="died", span=Span(0, 1)) for number in range(9)])
        assert [change.at_s for change in await history.changes(100)] == [8, 7, 6, 5, 4]
        assert [change.at_s for change in await history.changes(2)] == [8, 7]


async def test_a_monitor_that_starts_again_knows_since_when_a_server_is_seen_unless_it_was_away_for_long(tmp_path):
    peer = PeerId("a" * 52)
    async with remembering(tmp_path / "deep" / "monitor.sqlite") as history:
        await history.note(picture(1000), {peer: 100.0})
    async with remembering(tmp_path / "deep" / "monitor.sqlite") as history:
        assert await history.since(1100) == {peer: 100.0}
        assert await history.since(5000) == {}
        assert len(await history.samples(MODEL, 0, 2000)) == 1


async def test_a_file_that_is_no_database_is_told(tmp_path):
    (tmp_path / "note.txt").write_text("this is no database, and nothing will be written to it" * 50)
    with pytest.raises(ConfigError, match=r"note\.txt"):
        async with remembering(tmp_path / "note.txt"):
            pass
    with pytest.raises(sqlite3.DatabaseError):
        sqlite3.connect(tmp_path / "note.txt").execute("SELECT * FROM samples")
