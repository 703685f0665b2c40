"""``/v1/embeddings``: texts as vectors, the mean over tokens of the model's last hidden states."""

# B batch (always 1), T tokens, D model width

import base64
from functools import partial
from typing import Any

import anyio
import torch

from corolla.errors import InvalidRequest
from corolla.gateway.accounts import Account
from corolla.gateway.catalog import Offer
from corolla.gateway.gateway import Gateway
from corolla.gateway.prompts import read_texts
from corolla.gateway.requests import EmbeddingRequest

__all__ = ["embed"]


async def embed(gateway: Gateway, account: Account, request: EmbeddingRequest, offer: Offer) -> dict[str, Any]:
    """Turn texts into vectors of length 1.

    Args:
        gateway: Who answers.
        account: Who asks.
        request: The texts.
        offer: The model.

    Raises:
        Error: What is wrong with the request, or what the swarm raises.
    """
    width = int(offer.model.get_input_embeddings().embedding_dim)
    if request.dimensions not in (None, width):
        raise InvalidRequest(f"{offer.name} has vectors of {width} numbers; they cannot be cut", field="dimensions")
    texts = await anyio.to_thread.run_sync(read_texts, request.input, offer, "input")
    vectors = await gateway.run([partial(_vector, offer, tokens) for tokens in texts])
    tokens = sum(map(len, texts))
    await gateway.record(account, tokens, 0)
    is_packed = request.encoding_format == "base64"
    data = [
        {"object": "embedding", "index": index, "embedding": _pack(vector) if is_packed else vector.tolist()}
        for index, vector in enumerate(vectors)
    ]
    return {
        "object": "list",
        "data": data,
        "model": request.model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


@torch.inference_mode()
def _vector(offer: Offer, tokens: list[int]) -> torch.Tensor:
    anyio.from_thread.check_cancelled()
    model = getattr(offer.model, "get_base_model", lambda: offer.model)()
    states_BTD = model.base_model(torch.tensor([tokens]), use_cache=False).last_hidden_state
    return torch.nn.functional.normalize(states_BTD[0].float().mean(0), dim=0).cpu()


def _pack(vector: torch.Tensor) -> str:
    return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()
