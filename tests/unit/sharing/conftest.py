"""A tiny model, an adapter of it as PEFT saves one, and its card."""

import warnings

import peft
import pytest
import transformers

from corolla.hub import HubConfig, open_repository
from corolla.sharing import Shelf, describe_files, open_files
from corolla.swarm import Identity
from corolla.testing import save_tiny_model


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("llama"), family="llama")


@pytest.fixture(scope="session")
def other_model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("other"), family="llama", context_tokens=64)


@pytest.fixture(scope="session")
def plain(model, tmp_path_factory):
    """A directory as PEFT writes it."""
    directory = tmp_path_factory.mktemp("adapters") / "pirate"
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT, about itself
        local = transformers.AutoModelForCausalLM.from_pretrained(model)
        peft.get_peft_model(local, config).save_pretrained(directory)
    return directory


@pytest.fixture
def hub(tmp_path):
    return HubConfig(cache_dir=tmp_path / "cache")


@pytest.fixture
def author():
    return Identity.generate()


@pytest.fixture
def card(plain, model, hub, author):
    said = {"name": "pirate", "data": "sea shanties", "metrics": {"arrr": 0.5}, "licence": "MIT", "parent": None}
    return describe_files(open_files(plain), open_repository(str(model), config=hub), **said).sign(author)


@pytest.fixture
def published(plain, card, hub):
    return Shelf(hub.adapters).put(open_files(plain), card)
