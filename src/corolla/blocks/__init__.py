"""Any Hugging Face decoder family as spans of blocks that run exactly, and the edges that a client keeps.

Knows models and tensors; not pages, sessions, peers or the wire.
"""

from corolla.blocks.adapters import Adapter, BlockAdapter, LoraPair, Prefix, adaptable_layers
from corolla.blocks.architecture import (
    context_tokens,
    decoder_of,
    hidden_size,
    load_config,
    model_class,
    num_blocks,
    text_config,
)
from corolla.blocks.edges import RemoteBlocks, RemoteLayer, load_edges, needed_edge_keys, stand_ins_of
from corolla.blocks.kv import GrowingKV, KVShape, KVView, PackedRow
from corolla.blocks.loading import block_bytes, load_span, needed_keys
from corolla.blocks.quantized import Quantization, compute_dtype, tensors_of, weight_format
from corolla.blocks.restoring import restore_span
from corolla.blocks.selftest import FamilyReport, build_tiny, check_family, split_model
from corolla.blocks.session_cache import SessionCache
from corolla.blocks.span import BlockSpan
from corolla.blocks.zoo import FAMILIES, UNSUPPORTED, tiny_config

__all__ = [
    "FAMILIES",
    "UNSUPPORTED",
    "Adapter",
    "BlockAdapter",
    "BlockSpan",
    "FamilyReport",
    "GrowingKV",
    "KVShape",
    "KVView",
    "LoraPair",
    "PackedRow",
    "Prefix",
    "Quantization",
    "RemoteBlocks",
    "RemoteLayer",
    "SessionCache",
    "adaptable_layers",
    "block_bytes",
    "build_tiny",
    "check_family",
    "compute_dtype",
    "context_tokens",
    "decoder_of",
    "hidden_size",
    "load_config",
    "load_edges",
    "load_span",
    "model_class",
    "needed_edge_keys",
    "needed_keys",
    "num_blocks",
    "restore_span",
    "split_model",
    "stand_ins_of",
    "tensors_of",
    "text_config",
    "tiny_config",
    "weight_format",
]
