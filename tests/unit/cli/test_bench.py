"""What a machine would give is measured on a few blocks, and said in a table or as JSON."""

import json

import pytest

from corolla.testing import save_tiny_model


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def test_each_precision_has_its_speed_and_its_room(directory, invoke, tmp_path):
    arguments = ("--num-blocks", "2", "--threads", "1", "--kv-bytes", "16MiB", "--precision", "float32")
    done = invoke("bench", "server", str(directory), *arguments, "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    (one,) = told["precisions"]
    assert (one["precision"], one["fitting_blocks"], one["num_blocks"], one["sample_blocks"]) == ("float32", 4, 4, 2)
    assert one["speed"]["decode_tokens_per_s"] > 0
    assert one["speed"]["prefill_tokens_per_s"] > 0
    kv_bytes = 4 * 2 * 4 * 16 * 4 + 64 * 4  # blocks, keys and values, heads, width, bytes of a number; the output
    assert one["sessions_tokens"] == (16 << 20) // (kv_bytes * 64) * 64
    assert one["sessions"] == one["sessions_tokens"] // 2048
    assert told["rtts_s"] is None


def test_the_table_has_a_line_for_each(directory, invoke):
    done = invoke("bench", "server", str(directory), "--threads", "1", "--kv-bytes", "16MiB", "--quiet")
    assert done.exit_code == 0, done.output
    for precision in ("float32", "bfloat16", "int8"):
        assert precision in done.stdout


def test_more_blocks_than_there_are_is_not_asked_for(directory, invoke):
    done = invoke("bench", "server", str(directory), "--precision", "float32", "--num-blocks", "99", "--json")
    assert json.loads(done.stdout)["precisions"][0]["sample_blocks"] == 4
