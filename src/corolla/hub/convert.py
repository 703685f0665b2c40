"""The GGUF file of the demo model, rewritten as the directory that transformers loads.

Knows the one file that it is for: Llama's tensor names, and a byte-level BPE tokenizer. Written by hand rather than
with transformers' GGUF loader, which takes 40 s and 1.2 GB of memory for this file where this takes 7 s and 0.6 GB, and
which writes other files with every release.
"""

import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec

from corolla.errors import ModelError
from corolla.hub.checkpoint import SINGLE_FILE
from corolla.hub.progress import Progress

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader, ReaderTensor
    from numpy.typing import NDArray

__all__ = ["convert"]

T = TypeVar("T")

_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL


def convert(gguf: Path, directory: Path, report: Progress) -> None:
    """Write a model's directory: float32 weights, configuration and tokenizer; the tied head is not stored twice.

    Args:
        gguf: The demo model in GGUF format; its hash has been checked, so it is what this module is for.
        directory: Where to write; it exists.
        report: Told how many bytes of weights are written.

    Raises:
        ModelError: If the package gguf is missing.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ModelError("the demo model needs the package gguf; run pip install 'corolla[torch]'") from error
    report("Reading the demo model", 0, None, "bytes")
    reader = GGUFReader(gguf)
    _write_config(reader, directory)
    _write_tokenizer(reader, directory)
    _write_weights(reader, directory / SINGLE_FILE, report)


def _read(reader: "GGUFReader", name: str, kind: type[T]) -> T:
    return msgspec.convert(reader.fields[name].contents(), kind)


def _write_config(reader: "GGUFReader", directory: Path) -> None:
    heads = _read(reader, "llama.attention.head_count", int)
    width = _read(reader, "llama.embedding_length", int)
    special = {
        "bos_token_id": _read(reader, "tokenizer.ggml.bos_token_id", int),
        "eos_token_id": _read(reader, "tokenizer.ggml.eos_token_id", int),
        "pad_token_id": _read(reader, "tokenizer.ggml.padding_token_id", int),
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "hidden_size": width,
        "intermediate_size": _read(reader, "llama.feed_forward_length", int),
        "num_hidden_layers": _read(reader, "llama.block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": _read(reader, "llama.attention.head_count_kv", int),
        "head_dim": width // heads,
        "max_position_embeddings": _read(reader, "llama.context_length", int),
        "rms_norm_eps": _read(reader, "llama.attention.layer_norm_rms_epsilon", float),
        "rope_parameters": {"rope_type": "default", "rope_theta": _read(reader, "llama.rope.freq_base", float)},
        "vocab_size": _read(reader, "llama.vocab_size", int),
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        **special,
    }
    _write_json(directory / "config.json", config)
    _write_json(directory / "generation_config.json", special)


def _write_tokenizer(reader: "GGUFReader", directory: Path) -> None:
    tokens = _read(reader, "tokenizer.ggml.tokens", list[str])
    kinds = _read(reader, "tokenizer.ggml.token_type", list[int])
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": token, **flags}
            for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind == _CONTROL_TOKEN
        ],
        "normalizer": None,
        "pre_tokenizer": {  # what "smollm" as tokenizer.ggml.pre stands for in llama.cpp
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in _read(reader, "tokenizer.ggml.merges", list[str])],
        },
    }
    _write_json(directory / "tokenizer.json", tokenizer)
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": _read(reader, "llama.context_length", int),
            "bos_token": tokens[_read(reader, "tokenizer.ggml.bos_token_id", int)],
            "eos_token": tokens[_read(reader, "tokenizer.ggml.eos_token_id", int)],
            "pad_token": tokens[_read(reader, "tokenizer.ggml.padding_token_id", int)],
            "unk_token": tokens[_read(reader, "tokenizer.ggml.unknown_token_id", int)],
        },
    )
    (directory / "chat_template.jinja").write_text(_read(reader, "tokenizer.chat_template", str), encoding="utf-8")


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_weights(reader: "GGUFReader", path: Path, report: Progress) -> None:
    """Write one tensor after the other, so that memory holds only the largest."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in reader.tensors:
        begin, end = end, end + 4 * int(tensor.n_elements)
        shape = [int(size) for size in reversed(tensor.shape)]  # GGUF counts dimensions from the innermost
        header[_rename(tensor.name)] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)  # the data must be aligned
    done = 0
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for tensor in reader.tensors:
            done += file.write(_dequantise(reader, tensor).astype("<f4").tobytes())
            report("Converting the demo model", done, end, "bytes")


def _rename(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    if stem.startswith("blk."):
        _, number, stem = stem.split(".", 2)
        return f"model.layers.{number}.{_TENSORS[stem]}.{suffix}"
    return f"{_TENSORS[stem]}.{suffix}"


def _dequantise(reader: "GGUFReader", tensor: "ReaderTensor") -> "NDArray[np.float32]":
    from gguf import dequantize

    weights: NDArray[np.float32] = dequantize(tensor.data, tensor.tensor_type)
    for part, key in (("attn_q", "head_count"), ("attn_k", "head_count_kv")):
        if part in tensor.name:
            # llama.cpp rotates neighbouring rows of a head, transformers those half a head apart.
            heads = _read(reader, f"llama.attention.{key}", int)
            paired = weights.reshape(heads, weights.shape[0] // heads // 2, 2, *weights.shape[1:])
            return paired.swapaxes(1, 2).reshape(weights.shape)
    return weights
