"""Tensors to payload bytes and back; each codec states its error bound. Knows no model, stream or clock."""

from corolla.codec.adapters import (
    AdapterParts,
    EncodedAdapter,
    decode_adapter,
    encode_adapter,
    join_numbers,
    split_numbers,
)
from corolla.codec.codec import (
    CODECS,
    PREFERENCES,
    Codec,
    Encoded,
    check_preference,
    codec_named,
    decode,
    encode,
    splice,
    wire_bytes,
)
from corolla.codec.finite import all_finite, count_not_finite

__all__ = [
    "CODECS",
    "PREFERENCES",
    "AdapterParts",
    "Codec",
    "Encoded",
    "EncodedAdapter",
    "all_finite",
    "check_preference",
    "codec_named",
    "count_not_finite",
    "decode",
    "decode_adapter",
    "encode",
    "encode_adapter",
    "join_numbers",
    "splice",
    "split_numbers",
    "wire_bytes",
]
