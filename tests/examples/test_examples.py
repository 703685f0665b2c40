"""Each example runs as it is, on a tiny swarm; and what is interrupted goes on as if it had not been."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from corolla.testing import ThreadedSwarm, save_tiny_model

ROOT = Path(__file__).parents[2]
SCRIPTS = [path for path in (ROOT / "examples").glob("*.py") if path.read_text(encoding="utf-8")[:4] == "# %%"]
RUNS = {"lora": ("sentiment", "--method", "lora"), "prompt": ("sentiment", "--method", "prompt")}
RUNS |= {"persona": ("persona",), "early_exit": ("early_exit",)}
WORDS = {False: ("dull", "flat", "weak"), True: ("warm", "wise", "fun")}
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{words}")  # of PEFT, about itself
    for words in ("`is_gradient_checkpointing` is deprecated", "Position ids are not supported")
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny swarm, and texts for it."""
    folder = tmp_path_factory.mktemp("examples")
    model = save_tiny_model(folder / "model")
    rated = [(good, f"{first}, {second}") for good, some in WORDS.items() for first in some for second in some]
    lines = [f"{number}\t{2 * good - 1}\t{text}" for number, (good, text) in enumerate(rated)]
    (folder / "reviews.txt").write_text("\n".join(lines) + "\n")
    talks = [f"- - What is {number}?\n  - It is {number}." for number in range(12)]
    (folder / "talks.yml").write_text("conversations:\n" + "\n".join(talks) + "\n")
    with ThreadedSwarm(str(model), ["0:2", "2:4"]) as servers:
        yield servers, folder


@pytest.fixture
def run(tiny, tmp_path, monkeypatch, capsys):
    """Runs an example in this process, with what is given on its command line."""
    servers, folder = tiny
    monkeypatch.syspath_prepend(ROOT / "examples")

    def run(name, out, *arguments, steps=6):
        script, *chosen = RUNS[name]
        data = folder / ("talks.yml" if script == "persona" else "reviews.txt")
        place = () if "--local" in arguments else ("--peer", servers.address)
        command = [f"{script}.py", *chosen, "--model", folder / "model", "--data", data, *place, *arguments]
        command += ["--steps", steps, "--batch", 4, "--held-out", 4, "--out", tmp_path / out]
        monkeypatch.setattr(sys, "argv", [*map(str, command)])
        runpy.run_path(str(ROOT / "examples" / command[0]), run_name="__main__")
        return capsys.readouterr().out, tmp_path / out / (chosen[1] if chosen else ".")

    return run


@pytest.mark.parametrize("name", RUNS)
def test_an_example_that_is_interrupted_goes_on_as_if_it_was_not(run, name):
    said, whole = run(name, "whole")
    assert re.search(r"accuracy before: [01]\.\d+, after 6 steps: [01]\.\d+", said)
    assert (whole / "loss.png").stat().st_size > 5000
    said, parts = run(name, "parts", "--until", "2")
    assert "accuracy before" not in said
    said, _ = run(name, "parts")
    assert "going on after step 2" in said
    one, other = (load_file(folder / "checkpoint.safetensors") for folder in (whole, parts))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def test_what_an_example_saves_is_an_adapter_for_peft(run, tiny):
    _, folder = run("lora", "out", "--codec", "raw")
    local = transformers.AutoModelForCausalLM.from_pretrained(tiny[1] / "model", dtype=torch.float32)
    peft.PeftModel.from_pretrained(local, folder / "adapter")


def test_a_training_with_blocks_elsewhere_is_the_one_with_all_blocks_here(run):
    _, remote = run("lora", "remote", "--codec", "raw")
    _, local = run("lora", "local", "--local")
    one, other = (load_file(folder / "checkpoint.safetensors") for folder in (remote, local))
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def test_notebooks_are_those_of_the_scripts():
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "notebooks.py", "--check"], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert {path.stem for path in SCRIPTS} == {script for script, *_ in RUNS.values()}
    assert all(path.with_suffix(".ipynb").exists() for path in SCRIPTS)
