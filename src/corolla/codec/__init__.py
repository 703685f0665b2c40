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

__all__ = [
    "CODECS",
    "PREFERENCES",
    "AdapterParts",
    "Codec",
    "Encoded",
    "EncodedAdapter",
    "check_preference",
    "codec_named",
    "decode",
    "decode_adapter",
    "encode",
    "encode_adapter",
    "join_numbers",
    "splice",
    "split_numbers",
    "wire_bytes",
]
