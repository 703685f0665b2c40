"""Tiny models, made from a seed in milliseconds: architectures of transformers, tokenizer, chat template."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corolla.blocks.selftest import build_tiny
from corolla.blocks.zoo import FAMILIES, tiny_config

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["FAMILIES", "save_tiny_adapter", "save_tiny_model"]

_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
_FIRST_CHARACTER, _LAST_CHARACTER = 32, 126


def save_tiny_model(
    directory: Path,
    *,
    family: str = "llama",
    shard_bytes: int = 100_000,
    context_tokens: int | None = None,
    chat_template: str = _CHAT_TEMPLATE,
) -> Path:
    """Write a tiny model as one would find it on a hub: sharded safetensors, configuration, tokenizer.

    Its weights are random but always the same; its tokenizer has a token for every printable ASCII character.

    Args:
        directory: Where to; made if it is not there.
        family: One of :data:`FAMILIES`.
        shard_bytes: How large a weight file may be.
        context_tokens: The longest sequence that it says it was made for; ``None`` for 256.
        chat_template: How its tokenizer writes a chat.

    Returns:
        The directory.
    """
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    specials = {"<pad>": 0, "<s>": 1, "</s>": 2}
    characters = [chr(code) for code in range(_FIRST_CHARACTER, _LAST_CHARACTER + 1)] + ["\n"]
    vocabulary = specials | {character: len(specials) + index for index, character in enumerate(characters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<pad>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse()]
    )  # of no effect but to say of what kind it is
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=chat_template,
    )
    model = build_tiny(tiny_config(family))
    if context_tokens is not None:
        model.config.max_position_embeddings = context_tokens
    model.save_pretrained(directory, max_shard_size=shard_bytes)
    fast.save_pretrained(directory)
    return directory


def save_tiny_adapter(directory: Path, model: Path, **lora: Any) -> "PeftModel":
    """Write an adapter as PEFT does, of random weights that do something.

    Args:
        directory: Where to.
        model: The directory of the model that it is for.
        **lora: Settings of ``peft.LoraConfig``.

    Returns:
        The model in one piece, in float32, with the adapter on it.
    """
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT, about itself
        plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **lora)
        tuned = peft.get_peft_model(plain, config).eval()
        tuned.save_pretrained(directory)
    return tuned
