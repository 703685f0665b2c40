"""Directories as transformers and PEFT write them, by hand, and the card of an adapter."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from corolla.hub import HubConfig, open_repository
from corolla.sharing import Shelf, describe_files, open_files
from corolla.swarm import Identity


def write_model(directory, seed):
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 4}))
    numbers = np.full((4, 4), seed, np.float32)
    save_file({"model.layers.0.self_attn.q_proj.weight": numbers}, directory / "model.safetensors")
    return directory


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "llama", 1)


@pytest.fixture(scope="session")
def other_model(tmp_path_factory):
    """One of the same shapes."""
    return write_model(tmp_path_factory.mktemp("models") / "other", 2)


@pytest.fixture(scope="session")
def plain(model, tmp_path_factory):
    """An adapter that has no card."""
    directory = tmp_path_factory.mktemp("adapters") / "pirate"
    directory.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "base_model_name_or_path": str(model)}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    pair = {key.format("A"): np.ones((2, 4), np.float32), key.format("B"): np.ones((4, 2), np.float32)}
    save_file(pair, directory / "adapter_model.safetensors")
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
