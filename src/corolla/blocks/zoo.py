"""Tiny models of every family: a configuration shrunk until it runs in milliseconds, its architecture unchanged.

The tests run the exact ladder on each of ``FAMILIES``; a server runs it on the very configuration that it is about to
serve, shrunk by the same rules. Mostly data: names of sizes and what they shrink to. Knows no weights, files or spans.
"""

from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig

from corolla.blocks.architecture import num_blocks, text_config
from corolla.errors import UnsupportedModel

__all__ = ["FAMILIES", "TINY_BLOCKS", "TINY_WINDOW", "UNSUPPORTED", "default_config", "shrink_config", "tiny_config"]

TINY_BLOCKS = 4
"""Blocks of a tiny model: enough for a first, a middle and a last span."""

TINY_WINDOW = 6
"""Tokens that a tiny model's sliding windows and chunks hold: fewer than the prompts of the tests."""

_WIDTH, _HEADS, _HEAD_WIDTH, _EXPERTS = 64, 4, 16, 4

# What a size shrinks to, under all the names that configurations have for it.
_SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "lru_width"), _WIDTH),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "intermediate_size_mlp"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("moe_shared_expert_intermediate_size",), 32),
    "vocab_size": 128,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 256),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "window_size", "attention_window_size"), TINY_WINDOW),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), _EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("head_dim", "v_head_dim", "qk_nope_head_dim", "kv_channels", "index_head_dim"), _HEAD_WIDTH),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 8),
    "qk_head_dim": _HEAD_WIDTH + 8,
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 24),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_state", "ssm_state_size"), _HEAD_WIDTH),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), _HEAD_WIDTH),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size", "mamba_dt_rank"), 8),
    **dict.fromkeys(("linear_num_key_heads", "n_groups"), 2),
    "linear_num_value_heads": 4,
    "block_multiple_of": 16,
    "moe_layer_end_index": TINY_BLOCKS - 1,
    "index_topk": 8,
    "index_n_heads": 2,
    "original_max_position_embeddings": 10,
    "mamba_d_ssm": 128,
    "state_size": _HEAD_WIDTH,
    "linear_head_dim": _HEAD_WIDTH,
    "linear_num_heads": 4,
    "num_experts_per_token": 2,
    **dict.fromkeys(("attn_layer_period", "expert_layer_period"), 2),
    **dict.fromkeys(("attn_layer_offset", "expert_layer_offset"), 1),
    "vocab_size_per_layer_input": 128,
    "hidden_size_per_layer_input": 8,
}

_HEAD_NAMES = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_KV_HEAD_NAMES = ("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads")
_BLOCK_NAMES = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_TOKEN_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

_HYBRID = {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2}
_CONVOLVED = {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2}
_LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 1.0,
    "short_factor": [1.0] * 48,
    "long_factor": [1.0 + step / 8 for step in range(48)],
    "original_max_position_embeddings": 4096,
}
_DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}

# Families whose configuration's defaults are not worth a test, or not a model at all.
_SETTINGS: dict[str, dict[str, Any]] = {
    "bamba": {"num_hidden_layers": 4, "attn_layer_indices": [1, 3]},
    "bloom": {"n_layer": 4},
    "deepseek_v2": {"topk_method": "greedy", "n_group": 1, "topk_group": 1, "num_experts_per_tok": 6},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "falcon/alibi": {"alibi": True},
    "falcon/new": {"new_decoder_architecture": True, "num_kv_heads": 8, "num_attention_heads": 64, "hidden_size": 4096},
    "falcon/separate": {"multi_query": False},
    "falcon_h1": {"mamba_d_ssm": 2048, "mamba_d_head": 16},
    "gemma4_text": {"hidden_size_per_layer_input": 0},
    "glm_moe_dsa/shared": {
        "num_hidden_layers": 4,
        "indexer_types": ["full", "shared", "full", "shared"],
        "mlp_layer_types": ["dense", "sparse"] * 2,
    },
    "granitemoehybrid": _HYBRID,
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 8, "moe_topk": 2},
    "kimi_linear": {
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "mlp_layer_types": ["dense", "sparse"] * 2,
    },
    "lfm2": _CONVOLVED,
    "lfm2_moe": _CONVOLVED,
    "llama/dynamic": {"rope_parameters": _DYNAMIC_ROPE, "max_position_embeddings": 10},
    "ministral": {"head_dim": 128},
    "mistral/full": {"sliding_window": None},
    "nemotron": {"num_key_value_heads": 8},
    "phi3/longrope": {"rope_parameters": _LONG_ROPE},
    "qwen2/sliding": {"use_sliding_window": True, "max_window_layers": 2, "num_hidden_layers": 4},
}

# fmt: off
FAMILIES: tuple[str, ...] = (
    "afmoe", "apertus", "arcee", "aria_text", "axk1", "bailing_hybrid", "bamba", "biogpt", "bitnet", "bloom",
    "codegen", "cohere", "cohere2", "cohere2_moe", "cwm", "deepseek_v2", "deepseek_v3", "deepseek_v32", "diffllama",
    "doge", "dots1", "ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe", "falcon", "falcon/alibi", "falcon/new",
    "falcon/separate", "falcon_h1", "flex_olmo", "gemma", "gemma2", "gemma3_text", "gemma4_text", "glm", "glm4",
    "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_neox_japanese",
    "gpt_oss", "gptj", "granite", "granite_swa", "granitemoe", "granitemoe_swa", "granitemoehybrid",
    "granitemoeshared", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3", "hyperclovax", "inkling_text",
    "internlm3", "iquestcoder", "jais2", "jamba", "jetmoe", "kimi_linear", "kolibri1", "laguna", "lfm2", "lfm2_moe",
    "lfm3", "llama", "llama/dynamic", "llama4_text", "mellum", "mimo_v2_flash", "minicpm3", "minimax_m2",
    "minimax_m3_vl_text", "ministral", "ministral3", "mistral", "mistral/full", "mixtral", "mpt", "nanochat",
    "nemotron", "nemotron_h", "olmo", "olmo2", "olmo3", "olmo_hybrid", "olmoe", "opt", "persimmon", "phi", "phi3",
    "phi3/longrope", "phimoe", "qwen2", "qwen2/sliding", "qwen2_moe", "qwen3", "qwen3_5_moe_text", "qwen3_5_text",
    "qwen3_moe", "qwen3_next", "seed_oss", "smollm3", "solar_open", "stablelm", "starcoder2", "vaultgemma", "xglm",
    "youtu",
)
# fmt: on
"""Families whose spans are exact: model types of transformers, some in several variants."""

UNSUPPORTED: dict[str, str] = {
    "deepseek_v4": "several streams of hidden states pass from block to block",
    "falcon_mamba": "keeps its states in a cache of another kind",
    "gemma3n_text": "blocks take the embeddings of the tokens as well, and use the keys of other blocks",
    "glm_moe_dsa/shared": "blocks use the choice of tokens that another block made",
    "hy_v4": "several streams of hidden states, and choices of tokens, pass from block to block",
    "longcat_flash": "two attentions to a block, which do not share an index",
    "mamba": "keeps its states in a cache of another kind",
    "mamba2": "keeps its states in a cache of another kind",
    "minimax": "insists on a cache class of its own (its successor minimax_m2 does not)",
    "recurrent_gemma": "keeps the states of its one session inside the blocks",
    "rwkv": "the base model reaches into its blocks",
    "zamba": "blocks share weights with each other",
    "zamba2": "blocks share weights with each other",
    "zaya": "the choice of experts in one block depends on the choice in the one before",
}
"""Families whose spans are not exact, and why; a server refuses them."""


def tiny_config(family: str) -> PreTrainedConfig:
    """A configuration of a family, small enough to run in milliseconds.

    Args:
        family: One of ``FAMILIES``: a model type of transformers, with a variant after a slash where it has several.

    Raises:
        UnsupportedModel: If the family cannot be made small, as some of ``UNSUPPORTED``.
    """
    return shrink_config(default_config(family))


def default_config(family: str) -> PreTrainedConfig:
    """The configuration that transformers has for a family, in full size, with the settings that make it a model."""
    found: PreTrainedConfig = CONFIG_MAPPING[family.partition("/")[0]](**_SETTINGS.get(family, {}))
    return found


def shrink_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Shrink a configuration of any size: few blocks and narrow ones, of the same kinds and in the same order.

    Raises:
        UnsupportedModel: If the shrunken configuration is not a valid one.
    """
    text = text_config(config)
    sizes = text.to_dict()
    count = num_blocks(text)
    chosen = _choose_blocks(sizes, count)
    tiny: dict[str, Any] = {}
    for name, value in sizes.items():
        if name in _BLOCK_NAMES:
            tiny[name] = len(chosen)
        elif name == "per_layer_config" and isinstance(value, dict):
            tiny[name] = _shrink_exceptions(value, sizes, chosen)
        elif isinstance(value, list) and len(value) == count and count > 1:
            tiny[name] = [value[index] for index in chosen]
        else:
            tiny[name] = _shrink(name, value)
    tiny.update(_shrink_heads(sizes))
    if "qk_rope_head_dim" in tiny and sizes.get("head_dim") == sizes["qk_rope_head_dim"]:
        tiny["head_dim"] = tiny["qk_rope_head_dim"]
    tiny.update({name: token for name, token in _TOKEN_IDS.items() if sizes.get(name) is not None})
    try:
        return type(text)(**tiny)
    except (ArithmeticError, AttributeError, LookupError, StrictDataclassError, TypeError, ValueError) as error:
        raise UnsupportedModel(f"a small {config.model_type} cannot be configured: {error}") from error


def _choose_blocks(sizes: dict[str, Any], count: int) -> list[int]:
    """Blocks that between them are of every kind, in the model's own order."""
    lists = [value for value in sizes.values() if isinstance(value, list) and len(value) == count]
    kinds = [repr([values[index] for values in lists]) for index in range(count)]
    first_of_kind = [index for index in range(count) if kinds.index(kinds[index]) == index]
    others = [index for index in range(count) if index not in first_of_kind]
    return (
        sorted((first_of_kind + others)[: max(TINY_BLOCKS, len(first_of_kind))])
        if count > TINY_BLOCKS
        else list(range(count))
    )


def _shrink(name: str, value: Any) -> Any:
    if isinstance(value, dict) and name in ("rope_parameters", "rope_scaling"):
        return _shrink_rope(value)
    if name in _SIZES and isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return min(value, _SIZES[name])
    return value


def _shrink_exceptions(exceptions: dict[Any, dict[str, Any]], sizes: dict[str, Any], chosen: list[int]) -> Any:
    """Single blocks' own sizes, in proportion to the sizes of all others."""
    tiny = {}
    for block, own in exceptions.items():
        if int(block) in chosen:
            ratios = {name: value / sizes[name] for name, value in own.items() if name in _SIZES}
            tiny[chosen.index(int(block))] = own | {name: int(_SIZES[name] * ratio) for name, ratio in ratios.items()}
    return tiny


def _shrink_rope(rope: dict[str, Any]) -> dict[str, Any]:
    tiny: dict[str, Any] = {}
    for name, value in rope.items():
        if isinstance(value, dict):
            tiny[name] = _shrink_rope(value)
        elif name.endswith("_factor") and isinstance(value, list):
            tiny[name] = value[: int(_HEAD_WIDTH * rope.get("partial_rotary_factor", 1.0)) // 2]
        else:
            tiny[name] = _shrink(name, value)
    return tiny


def _shrink_heads(sizes: dict[str, Any]) -> dict[str, int]:
    heads = next((name for name in _HEAD_NAMES if isinstance(sizes.get(name), int)), None)
    if heads is None:
        return {}
    tiny = {heads: _HEADS}
    for name in _KV_HEAD_NAMES:
        if isinstance(sizes.get(name), int):
            tiny[name] = _HEADS if sizes[name] == sizes[heads] else 1 if sizes[name] == 1 else _HEADS // 2
    return tiny
