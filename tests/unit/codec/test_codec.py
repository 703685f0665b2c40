"""What codecs promise about memory, descriptions, sizes and refusals."""

import math

import pytest
import torch

from corolla.codec import CODECS, codec_named, decode, encode
from corolla.codec.blockwise import Blockwise, _codes_by_float16, _values_by_code
from corolla.errors import CodecError, UsageError
from corolla.wire import TensorMeta

HIDDEN = torch.randn(7, 576, generator=torch.Generator().manual_seed(0))


def transmit(name, tensor):
    encoded = codec_named(name).encode(tensor)
    return codec_named(name).decode(encoded.meta, b"".join(encoded.buffers))


def aligned(payload, shift=0):
    """Bytes that may be written to, ``shift`` past an address that suits any number."""
    memory = torch.empty(len(payload) + 64 + shift, dtype=torch.uint8)
    start = -memory.data_ptr() % 64 + shift
    view = memory.numpy().data[start : start + len(payload)]
    view[:] = payload
    return view


@pytest.mark.parametrize(("name", "nbytes"), [("raw", 7 * 576 * 4), ("bf16", 7 * 576 * 2), ("int8", 7 * (576 + 18))])
def test_the_description_fits_the_bytes(name, nbytes):
    encoded = codec_named(name).encode(HIDDEN)
    assert encoded.meta == TensorMeta(codec=name, dtype="float32", shape=(7, 576), nbytes=nbytes)
    assert sum(buffer.nbytes for buffer in encoded.buffers) == nbytes


@pytest.mark.parametrize(("name", "bits"), [("raw", 32), ("bf16", 16), ("fp16", 16), ("int8", 8.25)])
def test_bits_per_value(name, bits):
    assert codec_named(name).bits_per_value(HIDDEN) == bits


def test_payloads_are_little_endian():
    one = torch.ones(1)
    assert b"".join(codec_named("raw").encode(one).buffers).hex(" ") == "00 00 80 3f"
    assert b"".join(codec_named("bf16").encode(one).buffers).hex(" ") == "80 3f"
    assert b"".join(codec_named("int8").encode(one).buffers).hex(" ") == "80 3f fc"


def test_raw_bytes_of_a_large_tensor_are_its_own_memory_and_read_only():
    tensor = HIDDEN.repeat(32, 1)
    assert tensor.nbytes > 1 << 14
    (buffer,) = codec_named("raw").encode(tensor).buffers
    before = bytes(buffer)
    tensor[0, 0] += 1
    assert bytes(buffer) != before
    assert buffer.readonly


@pytest.mark.parametrize(("name", "dtype"), [("raw", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_writable_payload_becomes_the_tensor_without_a_copy(name, dtype):
    encoded = codec_named(name).encode(HIDDEN.to(dtype))
    payload = aligned(encoded.buffers[0])
    tensor = codec_named(name).decode(encoded.meta, payload)
    tensor.zero_()
    assert not any(payload)


@pytest.mark.parametrize("name", CODECS)
def test_a_payload_at_an_odd_address_is_read_all_the_same(name):
    encoded = codec_named(name).encode(HIDDEN)
    payload = b"".join(encoded.buffers)
    shifted = codec_named(name).decode(encoded.meta, aligned(payload, shift=1))
    assert torch.equal(shifted, codec_named(name).decode(encoded.meta, payload))
    assert shifted.data_ptr() % 4 == 0


def test_a_read_only_payload_is_copied():
    encoded = codec_named("raw").encode(HIDDEN)
    payload = bytes(encoded.buffers[0])
    codec_named("raw").decode(encoded.meta, payload).zero_()
    assert payload == bytes(encoded.buffers[0])


@pytest.mark.parametrize("name", CODECS)
def test_the_tensor_is_not_written_to_and_no_gradient_flows(name):
    tensor = HIDDEN.clone().requires_grad_()
    tensor.data[0, 3] = math.nan
    before = tensor.detach().clone()
    received = transmit(name, tensor)
    assert not received.requires_grad
    assert torch.equal(tensor.detach().view(torch.uint8), before.view(torch.uint8))


@pytest.mark.parametrize("name", CODECS)
def test_a_large_tensor_keeps_the_bound(name):
    tensor = torch.randn(2048, 4096, generator=torch.Generator().manual_seed(1)) * 50
    error = (transmit(name, tensor).double() - tensor.double()).abs()
    assert (error <= codec_named(name).bound(tensor)).all()


@pytest.mark.parametrize("name", CODECS)
def test_another_default_device_and_dtype_change_nothing(name):
    expected = transmit(name, HIDDEN)
    _values_by_code.cache_clear()
    _codes_by_float16.cache_clear()
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("meta"):
            received = transmit(name, HIDDEN)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(received, expected)


@pytest.mark.parametrize("name", CODECS)
def test_zeros_stay_zeros(name):
    assert torch.equal(transmit(name, torch.zeros(3, 70)), torch.zeros(3, 70))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp16_clips_what_is_finite_and_keeps_what_is_not(dtype):
    tensor = torch.tensor([65536.0, -1e30, math.inf, -math.inf, math.nan], dtype=dtype)
    expected = torch.tensor([65504.0, -65504.0, math.inf, -math.inf, math.nan]).to(dtype)
    torch.testing.assert_close(transmit("fp16", tensor), expected, rtol=0, atol=0, equal_nan=True)
    assert transmit("fp16", tensor[:1]) == expected[:1]


def test_int8_spoils_no_neighbour_of_nan_or_an_outlier():
    tensor = HIDDEN.clone()
    tensor[0, 0], tensor[1, 1], tensor[2, 2] = math.nan, math.inf, 1e6
    received = transmit("int8", tensor)
    assert received[0, 0].isnan()
    assert received[1, 1] == math.inf
    assert (received - tensor)[:2, 2:].abs().max() < 0.008 * HIDDEN.abs().max()
    assert torch.equal(received[:, 64:], transmit("int8", HIDDEN)[:, 64:])


def test_int8_bound_is_within_its_stated_share_of_the_largest_in_the_block():
    largest = HIDDEN.unflatten(1, (-1, 64)).abs().amax(-1, keepdim=True).expand(-1, -1, 64).flatten(1)
    assert (codec_named("int8").bound(HIDDEN) < 0.008 * largest).all()


def test_int8_has_256_codes_that_are_each_their_own_nearest():
    scale = torch.ones(1, dtype=torch.bfloat16).view(torch.uint8)
    codes = torch.arange(256).to(torch.uint8)
    layout = Blockwise(block=256)
    values = layout.unpack(torch.cat([scale, codes]).numpy().data, (256,), torch.float32)
    assert (values[:253].diff() > 0).all()
    assert torch.equal(layout.pack(values)[1].flatten(), codes)


@pytest.mark.parametrize("scale", [0.0, -1.0, 1e-39, math.inf, math.nan])
def test_int8_refuses_a_scale_that_no_encoder_writes(scale):
    payload = bytes(torch.tensor([scale], dtype=torch.bfloat16).view(torch.uint8).tolist()) + b"\x80" * 3
    with pytest.raises(CodecError, match="1 of 1 block scales"):
        codec_named("int8").decode(TensorMeta(codec="int8", dtype="float32", shape=(3,), nbytes=5), payload)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize(
    "tensor", [torch.zeros(2, 0), torch.tensor(1.0), torch.zeros(1, 1, 1, 1, 1), torch.zeros(2, dtype=torch.int64)]
)
def test_what_has_no_description_is_not_encoded(name, tensor):
    with pytest.raises(UsageError, match="cannot encode"):
        codec_named(name).encode(tensor)


@pytest.mark.parametrize(
    "change",
    [
        {"codec": "zip"},
        {"codec": "bf16"},
        {"dtype": "int64"},
        {"shape": ()},
        {"shape": (7, 0)},
        {"shape": (2**31,) * 4},
    ],
)
def test_a_description_of_something_else_is_refused(change):
    encoded = codec_named("raw").encode(HIDDEN)
    meta = {"codec": "raw", "dtype": "float32", "shape": (7, 576), "nbytes": encoded.meta.nbytes} | change
    with pytest.raises(CodecError):
        codec_named("raw").decode(TensorMeta(**meta), encoded.buffers[0])


def test_an_unknown_name_is_refused_with_those_that_are_known():
    with pytest.raises(CodecError, match="'zip'.*raw, fp16, bf16, int8"):
        codec_named("zip")


def test_a_big_endian_machine_is_refused(monkeypatch):
    monkeypatch.setattr("sys.byteorder", "big")
    with pytest.raises(UsageError, match="big-endian"):
        codec_named("raw")


@pytest.mark.parametrize(
    ("largest", "dtype", "codec"),
    [
        (1.0, torch.float32, "fp16"),
        (70_000.0, torch.float32, "bf16"),
        (1e-6, torch.float32, "bf16"),
        (1.0, torch.bfloat16, "bf16"),
        (1.0, torch.float16, "fp16"),
    ],
)
def test_half_chooses_the_format_that_serves_a_tensor_better(largest, dtype, codec):
    tensor = torch.tensor([[largest, largest / 3]], dtype=dtype)
    encoded = encode(tensor, "half")
    assert encoded.meta.codec == codec
    error = (decode(encoded.meta, b"".join(encoded.buffers)).double() - tensor.double()).abs()
    assert (error <= codec_named(codec).bound(tensor)).all()


def test_an_unknown_preference_is_refused_with_those_that_are_known():
    with pytest.raises(CodecError, match="no codec 'zip'.*half"):
        encode(torch.ones(1), "zip")
