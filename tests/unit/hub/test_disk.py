"""The disk cache: what makes room, and what stays."""

import os
import time

import pytest

from corolla.errors import CapacityError
from corolla.hub import HubConfig
from corolla.hub.disk import build_view, make_room, mark_used

MB = 1 << 20


@pytest.fixture
def cache(tmp_path):
    """Three weight files of 2 MB, the first used longest ago, and a small file older than all."""
    blobs = tmp_path / "hub" / "blobs"
    blobs.mkdir(parents=True)
    for age_h, name, size in ((4, "config", 100), (3, "old", 2 * MB), (2, "newer", 2 * MB), (0, "now", 2 * MB)):
        (blobs / name).write_bytes(bytes(size))
        used_s = time.time() - age_h * 3600
        os.utime(blobs / name, (used_s, used_s))
    return tmp_path


def names(cache):
    return {path.name for path in (cache / "hub" / "blobs").iterdir()}


def test_without_a_limit_nothing_is_deleted(cache):
    make_room(HubConfig(cache_dir=cache), MB, [])
    assert names(cache) == {"config", "old", "newer", "now"}


def test_the_least_recently_used_weights_make_room(cache):
    make_room(HubConfig(cache_dir=cache, max_disk_bytes=7 * MB), 2 * MB, [])
    assert names(cache) == {"config", "newer", "now"}


def test_marking_a_file_as_used_saves_it_and_keeps_its_time_of_change(cache):
    old = cache / "hub" / "blobs" / "old"
    changed_ns = old.stat().st_mtime_ns
    mark_used(old)
    make_room(HubConfig(cache_dir=cache, max_disk_bytes=7 * MB), 2 * MB, [])
    assert names(cache) == {"config", "old", "now"}
    assert old.stat().st_mtime_ns == changed_ns


def test_what_is_to_be_kept_and_what_was_just_used_stay(cache):
    with pytest.raises(CapacityError, match="exceed its limit of 4,194,304 bytes"):
        make_room(HubConfig(cache_dir=cache, max_disk_bytes=4 * MB), 2 * MB, [cache / "hub" / "blobs" / "newer"])
    assert names(cache) == {"config", "newer", "now"}


def test_a_full_disk_is_noticed_before_the_download(cache):
    with pytest.raises(CapacityError, match="free; make room"):
        make_room(HubConfig(cache_dir=cache), 1 << 60, [])


def test_a_view_whose_files_made_room_is_built_anew(tmp_path):
    sources = {"a": tmp_path / "source"}
    sources["a"].write_text("first")
    view, built = tmp_path / "views" / "x", []
    for content in ("first", "first", None, "second"):
        if content is None:
            sources["a"].unlink()
            assert not (view / "a").exists()
        else:
            sources["a"].write_text(content)
            build_view(view, sources, lambda directory: built.append(directory))
            assert (view / "a").read_text() == content
    assert list(view.parent.iterdir()) == [view]
