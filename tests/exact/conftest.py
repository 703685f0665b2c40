"""Tiny models twice: in one piece, and with their blocks in a swarm."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from transformers.utils import logging as transformers_logging

from corolla.client import AutoModelForCausalLM, ClientConfig, RemoteModel, Swarm
from corolla.testing import ThreadedSwarm, save_tiny_model

SPANS = {
    "llama": ["0:4", "0:1", "1:4", "1:3", "3:4"],  # chains of one, two and three hops
    "gemma3_text": ["0:1", "1:3", "3:4"],  # sliding windows
    "bloom": ["0:1", "1:3", "3:4"],  # cannot be packed
    "qwen3_moe": ["0:1", "1:3", "3:4"],  # experts
    "gpt2": ["0:4"],  # learned positions
    "opt": ["0:4"],  # learned positions, counted by the mask
    "mpt": ["0:4"],  # no positions, and no cache by default
    "phi3/longrope": ["0:4"],  # drops its cache when a sequence becomes long
    "gemma4_text": ["0:4"],  # initialises what its blocks have besides modules
}


@dataclass
class Pair:
    """A model in one piece, and the same in a swarm."""

    directory: Path
    servers: ThreadedSwarm
    swarm: Swarm
    local: transformers.PreTrainedModel
    remote: RemoteModel

    def assert_same_tokens(self, ids_BT, **options):
        torch.manual_seed(7)
        expected = self.local.generate(ids_BT, **options)
        torch.manual_seed(7)
        assert torch.equal(self.remote.generate(ids_BT, **options), expected)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    with ExitStack() as stack:
        found = {}
        for family, spans in SPANS.items():
            directory = save_tiny_model(tmp_path_factory.mktemp(family.replace("/", "-")), family=family)
            servers = stack.enter_context(ThreadedSwarm(str(directory), spans))
            hops = [servers.servers[spans.index(span)].peer_id for span in ("0:1", "1:3", "3:4") if span in spans]
            config = ClientConfig(codec="raw", allow_peers=tuple(hops))
            swarm = stack.enter_context(Swarm(servers.address, config=config))
            local = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
            remote = AutoModelForCausalLM.from_pretrained(str(directory), swarm=swarm)
            found[family] = Pair(directory, servers, swarm, local, remote)
        yield found
