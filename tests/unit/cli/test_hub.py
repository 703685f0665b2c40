"""``corolla hub`` with directories: what is pushed is found, shown, and pulled as an adapter that plain PEFT loads."""

import json

import peft
import pytest
import transformers

from corolla.testing import save_tiny_adapter, save_tiny_model

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{words}")  # of PEFT, about itself
    for words in ("`is_gradient_checkpointing` is deprecated", "Found missing adapter keys", "Position ids are not")
]


@pytest.fixture
def adapter(tmp_path):
    model = save_tiny_model(tmp_path / "model", family="llama")
    save_tiny_adapter(tmp_path / "pirate", model, r=2, target_modules=["q_proj"])
    return tmp_path / "pirate"


def test_an_adapter_is_pushed_found_shown_and_pulled(invoke, adapter, tmp_path, monkeypatch):
    store = str(tmp_path / "store")
    monkeypatch.setenv("COROLLA_HUB_CACHE_DIR", str(tmp_path / "here"))
    said = ["--data", "sea shanties", "--metric", "arrr=0.5", "--licence", "MIT", "--name", "pirate-2"]
    pushed = invoke("hub", "push", str(adapter), *said, "--to", store)
    assert pushed.exit_code == 0, pushed.output
    name = pushed.stdout.split()[0]
    monkeypatch.setenv("COROLLA_HUB_CACHE_DIR", str(tmp_path / "there"))
    found = json.loads(invoke("hub", "search", "shanties", "--in", store, "--json").stdout)
    assert [(one["id"], one["metrics"], one["method"]) for one in found] == [(name, {"arrr": 0.5}, "lora")]
    pulled = invoke("hub", "pull", "pirate-2", "--from", store, "--out", str(tmp_path / "out"))
    assert pulled.stdout.split() == [str(tmp_path / "out")]
    local = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    peft.PeftModel.from_pretrained(local, tmp_path / "out")
    shown = invoke("hub", "show", name[:12])
    assert "sea shanties" in shown.stdout
    child = invoke("hub", "push", str(adapter), "--name", "child", "--parent", "pirate-2", "--json")
    assert child.exit_code == 0, child.output
    assert json.loads(invoke("hub", "show", "child", "--json").stdout)["parent"] == name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["push"], "say which adapter"),
        (["push", "."], "no adapter in PEFT's format"),
        (["show", "nobody"], "no adapter goes by 'nobody'"),
        (["push", "ADAPTER", "--metric", "good"], "is no name=number"),
        (["push", "ADAPTER", "--base", "nowhere"], "no model goes by 'nowhere'"),
        (["push", "ADAPTER", "--name", "../x"], "no adapter's card"),
        (["show", "ADAPTER"], "has no card"),
        (["push", "ADAPTER", "--to", "hf:what?"], "no repository of the Hugging Face hub"),
    ],
)
def test_what_cannot_be_is_refused_in_words(invoke, adapter, arguments, words):
    result = invoke("hub", *(str(adapter) if word == "ADAPTER" else word for word in arguments))
    assert result.exit_code != 0
    assert words in result.stderr.replace("\n", " ")
