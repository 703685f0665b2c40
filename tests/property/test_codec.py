"""Every codec keeps its stated bound on any tensor, and meets any bytes with a tensor or a CodecError."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from corolla.codec import CODECS, codec_named
from corolla.errors import CodecError
from corolla.wire import TensorMeta

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SPECIALS = (0.0, -0.0, 1.0, math.nan, math.inf, -math.inf, 65504.0, 65520.0, 1e5, 3.4e38, -3.4e38, 1.2e-38, 1e-45, 6e-8)

shapes = st.lists(st.integers(1, 5), max_size=3).flatmap(lambda axes: st.integers(1, 200).map(lambda d: (*axes, d)))
dtypes = st.sampled_from(sorted(DTYPES))
codecs = st.sampled_from(CODECS).map(codec_named)


@st.composite
def tensors(draw):
    """Gaussian rows of any magnitude, with special values strewn in; or numbers of arbitrary bits."""
    shape, dtype = draw(shapes), DTYPES[draw(dtypes)]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    if draw(st.booleans()):
        bits = torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)
        return bits.view(torch.float32).to(dtype)
    tensor = torch.randn(shape, generator=generator) * 10.0 ** draw(st.integers(-46, 39))
    for value in draw(st.lists(st.sampled_from(SPECIALS), max_size=5)):
        tensor.view(-1)[draw(st.integers(0, tensor.numel() - 1))] = value
    return tensor.to(dtype)


def transmit(codec, tensor):
    encoded = codec.encode(tensor)
    return codec.decode(encoded.meta, b"".join(encoded.buffers))


@given(codecs, tensors())
def test_no_number_is_further_off_than_the_bound(codec, tensor):
    error = (transmit(codec, tensor).double() - tensor.double()).abs()
    finite = tensor.isfinite()
    assert (error <= codec.bound(tensor))[finite].all()


@given(codecs, tensors())
def test_nan_and_infinities_survive_and_nothing_else_becomes_one(codec, tensor):
    received = transmit(codec, tensor)
    assert torch.equal(received.isnan(), tensor.isnan())
    assert torch.equal(received == math.inf, tensor == math.inf)
    assert torch.equal(received == -math.inf, tensor == -math.inf)


@given(codecs, tensors())
def test_shape_and_dtype_survive_and_the_bound_is_finite(codec, tensor):
    received, bound = transmit(codec, tensor), codec.bound(tensor)
    assert (received.shape, received.dtype) == (tensor.shape, tensor.dtype)
    assert bound.shape == tensor.shape
    assert bound.isfinite().all()
    assert (bound >= 0).all()


@given(st.sampled_from([("raw", None), ("bf16", "bfloat16"), ("fp16", "float16")]), tensors())
def test_numbers_that_have_the_format_already_come_back_bit_by_bit(case, tensor):
    name, dtype = case
    tensor = tensor if dtype is None else tensor.to(DTYPES[dtype])
    assert torch.equal(transmit(codec_named(name), tensor).view(torch.uint8), tensor.view(torch.uint8))


@given(codecs, tensors(), st.randoms(use_true_random=False))
def test_strides_do_not_change_the_bytes(codec, tensor, random):
    axes = random.sample(range(tensor.ndim), tensor.ndim)
    strided = tensor.permute(axes)
    assert b"".join(codec.encode(strided).buffers) == b"".join(codec.encode(strided.contiguous()).buffers)


@given(codecs, tensors())
def test_a_token_travels_alike_alone_and_with_others(codec, tensor):
    rows = tensor.view(-1, tensor.shape[-1])
    alone = torch.cat([transmit(codec, row[None]) for row in rows])
    torch.testing.assert_close(alone, transmit(codec, rows), rtol=0, atol=0, equal_nan=True)


@given(
    codecs,
    st.builds(
        TensorMeta,
        codec=st.sampled_from(CODECS) | st.text(max_size=8),
        dtype=dtypes | st.text(max_size=8),
        shape=st.lists(st.integers(1, 9) | st.integers(0, 2**31 - 1), max_size=5).map(tuple),
        nbytes=st.integers(0, 2**53),
    ),
    st.binary(max_size=64),
)
def test_any_bytes_with_any_description_give_a_tensor_or_a_codec_error(codec, meta, payload):
    try:
        tensor = codec.decode(meta, payload)
    except CodecError:
        return
    assert (tuple(tensor.shape), tensor.dtype) == (meta.shape, DTYPES[meta.dtype])


@given(codecs, dtypes, shapes, st.data())
def test_any_bytes_of_the_right_size_give_a_tensor_or_a_codec_error(codec, dtype, shape, data):
    nbytes = codec.encode(torch.zeros(shape, dtype=DTYPES[dtype])).meta.nbytes
    payload = bytes(torch.randint(0, 256, (nbytes,), generator=seeded(data), dtype=torch.uint8).tolist())
    try:
        tensor = codec.decode(TensorMeta(codec=codec.name, dtype=dtype, shape=shape, nbytes=nbytes), payload)
    except CodecError:
        return
    assert (tuple(tensor.shape), tensor.dtype) == (shape, DTYPES[dtype])


@given(codecs, tensors(), st.integers(-3, 3).filter(bool))
def test_a_payload_of_another_size_is_refused(codec, tensor, surplus):
    encoded = codec.encode(tensor)
    payload = b"".join(encoded.buffers)
    payload = payload + b"\0" * surplus if surplus > 0 else payload[:surplus]
    with pytest.raises(CodecError, match=f"{len(payload)} received"):
        codec.decode(encoded.meta, payload)


def seeded(data):
    return torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
