"""Servers are killed with SIGKILL while a model speaks: it says what it would have said, with no code of its user."""

# B batch, T tokens

from functools import partial

import psutil
import pytest
import torch
import transformers

from corolla.client import AutoModelForCausalLM, ClientConfig, Swarm
from corolla.errors import Error
from corolla.hub import HubConfig, open_repository
from corolla.testing import LocalSwarm, save_tiny_model

GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
SERVER = ("--threads", "1", "--kv-bytes", str(64 << 20), "--precision", "float32")
pytestmark = pytest.mark.timeout(280)


def killing(server, tokens):
    """A logits processor that kills a server after so many tokens."""
    calls = []

    def process(ids_BT, scores_BV):
        calls.append(ids_BT)
        if len(calls) == tokens:
            server.kill()
        return scores_BV

    return [process]


@pytest.fixture(scope="module")
def smollm2():
    """The demo model's directory."""
    try:
        repository = open_repository("smollm2", config=HubConfig(offline=True))
    except Error as error:
        pytest.skip(f"the demo model is not here, and tests download nothing: {error.message}")
    return repository.fetch(set(repository.weight_map.values()))


def prompt(tokens, seed=1):
    return torch.randint(3, 98, (1, tokens), generator=torch.Generator().manual_seed(seed))


def test_smollm2_survives_the_death_of_all_its_servers(smollm2, tmp_path):
    local = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    first_BT, second_BT = prompt(9), prompt(7, seed=2)
    spans = ["0:13", "13:30"] * 2
    with LocalSwarm(str(smollm2), spans, *SERVER, logs=tmp_path) as servers:
        by_peer = {server.peer_id: server for server in servers.wait_until_online().servers}
        with Swarm([server.address for server in servers.servers], config=ClientConfig(codec="raw")) as swarm:
            model = AutoModelForCausalLM.from_pretrained(str(smollm2), swarm=swarm, dtype=torch.float32)
            with model.session(128) as session:
                say = partial(model.generate, session=session, **GREEDY)
                say(second_BT)  # opens the session
                first, last = [by_peer[hop.peer] for hop in session.chain.hops]
                said = say(first_BT, logits_processor=killing(last, 4))
                assert torch.equal(said, local.generate(first_BT, **GREEDY))
                joined_BT = torch.cat([said[:, :5], second_BT], dim=1)  # rewinds
                said = say(joined_BT, logits_processor=killing(first, 3))
                assert torch.equal(said, local.generate(joined_BT, **GREEDY))
                assert [replay.tokens for replay in session.replays] == [9 + 4 - 1, 12 + 3 - 1]
                assert not {first.peer_id, last.peer_id} & {hop.peer for hop in session.chain.hops}


@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_gradients_are_equal_though_a_server_is_lost_before_the_backward_pass(tmp_path, how):
    directory = str(save_tiny_model(tmp_path / "model"))
    local = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids_BT = prompt(9)
    expected_BTD, expected = gradients(local, ids_BT, lambda: None)
    config = ClientConfig(codec="raw", request_s=5.0)
    with LocalSwarm(directory, ["0:2", "2:4", "2:4"], *SERVER, logs=tmp_path) as servers:
        by_peer = {server.peer_id: server for server in servers.wait_until_online().servers}
        with Swarm([server.address for server in servers.servers], config=config) as swarm:
            model = AutoModelForCausalLM.from_pretrained(directory, swarm=swarm, dtype=torch.float32)
            with model.session(16) as session:  # shows who comes first
                model(ids_BT, past_key_values=session)
                lost = by_peer[session.chain.hops[1].peer]

            def lose():
                if how == "killed":
                    lost.kill()
                else:
                    psutil.Process(lost.process.pid).suspend()

            try:
                gradient_BTD, loss = gradients(model, ids_BT, lose)
            finally:
                if how == "frozen":
                    psutil.Process(lost.process.pid).resume()
    assert torch.equal(loss, expected)
    assert torch.equal(gradient_BTD, expected_BTD)


def gradients(model, ids_BT, before_backward):
    """Give the gradient of the embedded prompt, and the loss."""
    embedded_BTD = model.get_input_embeddings()(ids_BT).detach().requires_grad_()
    loss = model(inputs_embeds=embedded_BTD, labels=ids_BT).loss
    before_backward()
    loss.backward()
    return embedded_BTD.grad, loss.detach()
