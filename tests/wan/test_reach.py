"""Whoever is behind whatever router: each reaches each, directly where the routers allow it, else through a relay."""

import sys

import pytest

from .conftest import ENVIRONMENT

pytestmark = pytest.mark.timeout(300)


def test_a_public_peer_knows_that_it_is_and_is_dialled_directly(internet):
    server = internet.peer("open1")
    assert server.state["verdict"] == "direct"
    assert server.state["addresses"][0].startswith(f"tls://{internet.lab.addr('open1')}:")
    for host in ("open2", "port-restricted2", "symmetric2"):
        assert internet.peer(host).ping_until(server.id, lambda answer: answer["path"])["path"] == "direct"


@pytest.mark.parametrize("host", ["port-restricted1", "symmetric1"])
def test_a_peer_behind_a_router_knows_that_and_is_found_through_two_relays(internet, host):
    state = internet.peer(host).state
    assert state["verdict"] == "hidden"
    relays = {f"relay://{internet.lab.addr(name)}:31330/{relay.id}" for name, relay in internet.relays.items()}
    assert set(state["addresses"]) == relays


@pytest.mark.parametrize(
    ("dialler", "server", "ends"),
    [
        ("port-restricted2", "port-restricted1", "direct"),
        ("open2", "port-restricted1", "direct"),
        ("open2", "symmetric1", "direct"),
        ("symmetric2", "port-restricted1", "relayed"),
        ("port-restricted2", "symmetric1", "relayed"),
        ("symmetric2", "symmetric1", "relayed"),
    ],
)
def test_a_relayed_path_becomes_a_direct_one_where_the_routers_allow(internet, dialler, server, ends):
    server, dialler = internet.peer(server), internet.peer(dialler)
    assert dialler.ping_until(server.id, lambda answer: answer["path"])["path"] in ("relayed", ends)
    if ends == "direct":
        dialler.ping_until(server.id, lambda answer: answer["path"] == "direct")
    else:
        assert dialler.ping(server.id)["path"] == "relayed"


GENERATE = """
import sys, torch
from corolla.client import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], swarm=sys.argv[2])
ids = torch.tensor([[5, 6, 7]])
print(model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)[0].tolist())
model.close()
"""


def test_a_model_behind_one_router_says_the_same_to_a_client_behind_another(internet, model):
    import torch
    from transformers import AutoModelForCausalLM

    internet.server.wait_for(lambda said: said.get("stage") == "online", within_s=60)
    client = [sys.executable, "-c", GENERATE, model, internet.entry]
    done = internet.lab.run("symmetric2", client, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    ids = torch.tensor([[5, 6, 7]])
    local = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    expected = local.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)[0].tolist()
    assert done.stdout.strip() == str(expected), done.stderr


def test_a_server_that_moves_is_found_at_its_new_address(internet):
    server, dialler = internet.peer("open1"), internet.peer("open2")
    address = internet.lab.readdress("open1")
    server.wait_for(lambda said: any(f"//{address}:" in one for one in said.get("addresses", ())))
    assert dialler.ping_until(server.id, lambda answer: answer["path"])["path"] == "direct"


def test_a_server_whose_router_gets_another_address_is_found_again(internet):
    server, dialler = internet.peer("symmetric1"), internet.peer("symmetric2")
    internet.lab.readdress("symmetric1")
    server.wait_for(lambda said: said.get("verdict") == "hidden" and len(said["addresses"]) == 2)
    assert dialler.ping_until(server.id, lambda answer: answer["path"])["path"] == "relayed"


def test_a_partition_heals(internet):
    server, dialler = internet.peer("port-restricted1"), internet.peer("port-restricted2")
    others = {host.name for host in internet.lab.hosts} - {server.host}
    internet.lab.partition({server.host}, others)
    assert dialler.ping_until(server.id, lambda answer: not answer["path"])["error"]
    internet.lab.heal()
    assert dialler.ping_until(server.id, lambda answer: answer["path"])


def test_when_a_relay_dies_work_through_it_ends_with_an_error_and_new_streams_take_another(internet):
    server, dialler = internet.peer("symmetric1"), internet.peer("symmetric2")
    dialler.ping_until(server.id, lambda answer: answer["path"])
    dialler.tell(f"hold {server.id}")
    held = dialler.wait_for(lambda said: said.get("held") == server.id)
    assert held["path"] == "relayed"
    relay = next(relay for relay in internet.relays.values() if held["address"].endswith(relay.id))
    relay.process.kill()
    assert dialler.wait_for(lambda said: said.get("lost") == server.id)["error"].startswith("PeerLost")
    assert dialler.ping_until(server.id, lambda answer: answer["path"])["path"] == "relayed"


@pytest.mark.parametrize(
    ("host", "router", "reach"),
    [
        ("open1", "no router is between", "can be dialled on port"),
        ("port-restricted1", "shows all peers the same port", "cannot be dialled on port"),
        ("symmetric2", "shows each peer another port", "cannot be dialled on port"),
    ],
)
def test_the_doctor_tells_what_is_between(internet, host, router, reach):
    command = ("-m", "corolla", "doctor", "--peer", internet.entry, "--port", "0", "--no-lan", "--json")
    doctor = internet.run(host, *command)
    said = doctor.wait_for(lambda said: "findings" in said)
    doctor.stop()
    found = {finding["what"]: finding["says"] for finding in said["findings"]}
    assert router in found["router"]
    assert reach in found["reach"]
