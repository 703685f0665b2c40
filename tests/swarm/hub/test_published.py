"""Adapters on the Hugging Face hub, which is a small one here that speaks its HTTP API over loopback."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from corolla.errors import AdapterNotFound, BadAdapter
from corolla.hub import HubConfig, open_repository
from corolla.sharing import CARD_FILE, Shelf, bring_files, describe_files, open_files
from corolla.sharing.huggingface import HuggingFaceStore
from corolla.swarm import Identity


@pytest.fixture
def published(tmp_path):
    model, adapter = tmp_path / "model", tmp_path / "adapter"
    model.mkdir()
    adapter.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({"weight": np.ones((4, 4), np.float32)}, model / "model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    save_file({"lora_A": np.ones((2, 4), np.float32)}, adapter / "adapter_model.safetensors")
    mine = HubConfig(cache_dir=tmp_path / "mine")
    about = {"name": "pirate", "data": "sea shanties", "metrics": {"arrr": 0.5}, "licence": "MIT", "parent": None}
    files = open_files(adapter)
    card = describe_files(files, open_repository(str(model), config=mine), **about).sign(Identity.generate())
    return Shelf(mine.adapters).put(files, card), card


@pytest.fixture
def endpoint(tmp_path):
    served = tmp_path / "served"
    served.mkdir()
    command = [sys.executable, Path(__file__).with_name("fake_hub.py"), served, tmp_path / "log"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}", served
        process.terminate()


def test_an_adapter_goes_to_the_hugging_face_hub_and_back(endpoint, published, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    url, served = endpoint
    files, card = published
    theirs = HubConfig(cache_dir=tmp_path / "theirs", endpoint=url)
    store = HuggingFaceStore(theirs, "me/reviews")
    assert store.push(files, card) == "hf:me/reviews"
    assert "tags: [corolla, lora]" in (served / "me" / "reviews" / "README.md").read_text()
    assert store.search("", card.base) == [card]
    assert store.search("", "cd" * 32) == []
    assert bring_files("me/reviews", theirs).card == card
    weights = served / "me" / "reviews" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes() + b"0")
    other = HubConfig(cache_dir=tmp_path / "others", endpoint=url)
    with pytest.raises(BadAdapter, match="were signed or are the most that is read; it was not downloaded"):
        bring_files("me/reviews", other)
    with pytest.raises(AdapterNotFound, match="no such adapter in me/nothing"):
        bring_files("me/nothing", other)
    (served / "me" / "reviews" / CARD_FILE).unlink()
    with pytest.raises(AdapterNotFound, match="holds no published adapter"):
        bring_files("me/reviews@main", other)
