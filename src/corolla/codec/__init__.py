"""Tensors to payload bytes and back; each codec states its error bound. Knows no model, stream or clock."""

from corolla.codec.codec import CODECS, Codec, Encoded, codec_named

__all__ = ["CODECS", "Codec", "Encoded", "codec_named"]
