"""Weights that were rounded once: found when all is as it was, and never taken when it is not."""

import os

import pytest
import torch

from corolla.hub import HubConfig, RoundedWeights
from corolla.hub.disk import make_room

TENSORS = {"packed": torch.arange(1 << 20, dtype=torch.uint8), "scale": torch.ones(3, dtype=torch.bfloat16)}


@pytest.fixture
def config(tmp_path):
    return HubConfig(cache_dir=tmp_path / "cache")


def is_same(found):
    return all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


def test_what_was_kept_is_found_by_the_same_facts_alone(config):
    weights = RoundedWeights(config, ["model", "nf4"])
    assert weights.find([0, 1]) is None
    weights.keep(0, TENSORS)
    weights.keep(1, TENSORS)
    found = RoundedWeights(config, ["model", "nf4"]).find([0, 1])
    assert set(found) == {0, 1}
    assert is_same(found[1])
    assert weights.find([1, 2]) is None
    assert RoundedWeights(config, ["model", "int8"]).find([0]) is None


def test_tensors_that_share_memory_are_kept(config):
    weights = RoundedWeights(config, [])
    weights.keep(0, {"one": TENSORS["packed"], "other": TENSORS["packed"]})
    assert torch.equal(weights.find([0])[0]["other"], TENSORS["packed"])


@pytest.mark.parametrize("damage", [b"", b"x" * 100, None])
def test_a_damaged_file_is_deleted_and_not_used(config, damage):
    weights = RoundedWeights(config, [])
    weights.keep(0, TENSORS)
    (path,) = config.rounded.rglob("*.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if damage is None else damage)
    assert weights.find([0]) is None
    assert not path.exists()
    weights.keep(0, TENSORS)
    assert is_same(weights.find([0])[0])


def test_what_is_kept_makes_room_for_others(config):
    limited = HubConfig(cache_dir=config.cache_dir, max_disk_bytes=3 << 20)
    weights = RoundedWeights(limited, [])
    weights.keep(0, TENSORS)
    (path,) = limited.rounded.rglob("*.safetensors")
    os.utime(path, (0, 0))
    make_room(limited, 5 << 19, ())
    assert not path.exists()
    assert weights.find([0]) is None


def test_without_room_nothing_is_kept_and_nothing_fails(config):
    weights = RoundedWeights(HubConfig(cache_dir=config.cache_dir, max_disk_bytes=1000), [])
    weights.keep(0, TENSORS)
    assert weights.find([0]) is None
