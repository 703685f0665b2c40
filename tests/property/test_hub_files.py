"""Whatever a checkpoint's files hold, they are read or refused: nothing else can happen."""

import contextlib
import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corolla.errors import BadCheckpoint
from corolla.hub.checkpoint import read_config, read_header, read_index

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)
NUMBERS = st.integers(-(2**65), 2**65)
TENSORS = st.fixed_dictionaries(
    {"dtype": st.just("F32"), "shape": st.lists(NUMBERS, max_size=2), "data_offsets": st.lists(NUMBERS, max_size=3)}
)
HEADERS = st.dictionaries(st.text(max_size=8), TENSORS | VALUES, max_size=3)
FILES = st.binary(max_size=64) | st.builds(lambda value: json.dumps(value).encode(), VALUES | HEADERS)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("files") / "file"


@pytest.mark.parametrize("read", [read_header, read_index, read_config])
@given(content=FILES)
def test_any_bytes_are_read_or_refused(path, read, content):
    path.write_bytes(content)
    with contextlib.suppress(BadCheckpoint):
        read(path)


@given(header=FILES, claimed=st.none() | st.integers(0, 2**64 - 1), data=st.binary(max_size=16))
def test_any_header_is_read_or_refused(path, header, claimed, data):
    path.write_bytes(struct.pack("<Q", len(header) if claimed is None else claimed) + header + data)
    with contextlib.suppress(BadCheckpoint):
        read_header(path)


@given(name=st.text(max_size=12), suffix=st.sampled_from([".safetensors", ""]))
def test_every_file_that_an_index_may_name_lies_beside_it(path, name, suffix):
    path.write_text(json.dumps({"weight_map": {"tensor": name + suffix}}))
    with contextlib.suppress(BadCheckpoint):
        (file,) = read_index(path).values()
        assert (path.parent / file).resolve().parent == path.parent.resolve()
        assert file.endswith(".safetensors")
