"""A spare moves into the gap that a death leaves: over real processes, and within a bounded time."""

import pytest
import torch
import transformers

from corolla.client import AutoModelForCausalLM, ClientConfig, Swarm
from corolla.testing import LocalSwarm, ServerProcess, save_tiny_model

GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
ARGUMENTS = ("--threads", "1", "--kv-bytes", str(16 << 20), "--precision", "float32")
HURRY = {"SERVER_LOOK_S": "0.3", "SERVER_SETTLE_S": "0.3", "SWARM_TTL_S": "3", "SWARM_REFRESH_S": "0.5"}
pytestmark = pytest.mark.timeout(240)


def test_a_spare_moves_into_the_gap_that_a_death_leaves(tmp_path, monkeypatch):
    for name, value in HURRY.items():
        monkeypatch.setenv(f"COROLLA_{name}", value)
    model = save_tiny_model(tmp_path / "model")
    local = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    prompt_BT = torch.arange(3, 12)[None]
    expected_BT = local.generate(prompt_BT, **GREEDY)
    with (
        LocalSwarm(str(model), ["0:2", "2:4"], *ARGUMENTS, logs=tmp_path) as pinned,
        ServerProcess(
            str(model), *ARGUMENTS, "--num-blocks", "2", peers=[pinned.address], log=tmp_path / "spare.log"
        ) as spare,
    ):
        pinned.wait_until_online()
        here = spare.wait_for("online")["span"]
        killed, alive = pinned.servers[::-1] if here == [0, 2] else pinned.servers
        gap = "2:4" if here == [0, 2] else "0:2"
        with Swarm(alive.address, config=ClientConfig(codec="raw", chain_s=30.0)) as swarm:
            remote = AutoModelForCausalLM.from_pretrained(str(model), swarm=swarm, dtype=torch.float32)
            assert torch.equal(remote.generate(prompt_BT, **GREEDY), expected_BT)
            before = spare.peer_id, spare.address
            killed.kill()
            spare.wait_for("online", span=gap, within_s=60.0)
            assert (spare.peer_id, spare.address) == before
            assert torch.equal(remote.generate(prompt_BT, **GREEDY), expected_BT)
