"""Tensors to payload bytes and back; each codec states its error bound. Knows no model, stream or clock."""

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
    "Codec",
    "Encoded",
    "check_preference",
    "codec_named",
    "decode",
    "encode",
    "splice",
    "wire_bytes",
]
