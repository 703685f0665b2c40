"""What is said to need no torch needs none, nor anything else of corolla[torch]; what needs it says so in a line."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
from corolla.cli import main
main()
"""
OF_TORCH = {
    "accelerate", "filelock", "gguf", "huggingface_hub", "numpy", "prompt_toolkit", "psutil", "safetensors",
    "tokenizers", "torch", "transformers", "zeroconf",
}  # fmt: skip
OF_MONITOR = {"fastapi", "uvicorn"}
NOBODY = ("--peer", "tls://127.0.0.1:1")


def run(*arguments, missing=OF_TORCH):
    program = PROGRAM.format(missing=missing)
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("command", [("monitor",), ("top",), ("swarm", "status"), ("doctor", "--port", "0")])
def test_a_machine_without_torch_can_look_at_swarms(command):
    done = run(*command, *NOBODY)
    assert done.returncode == 1
    assert "127.0.0.1:1" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_the_doctor_says_what_is_missing():
    assert "pip install 'corolla[torch]'" in run("doctor", "--no-lan").stdout


@pytest.mark.parametrize(
    ("command", "missing", "extra"),
    [(("serve", "x"), OF_TORCH, "torch"), (("monitor", *NOBODY), OF_TORCH | OF_MONITOR, "monitor")],
)
def test_what_is_not_installed_is_named_with_the_command_that_installs_it(command, missing, extra):
    done = run(*command, missing=missing)
    assert done.returncode == 1
    assert done.stderr.strip().endswith(f"pip install 'corolla[{extra}]'")
    assert "Traceback" not in done.stderr
