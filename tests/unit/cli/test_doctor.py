"""What the doctor makes of what it found, and what it does without a swarm; with one, see tests/swarm/test_cli.py."""

import json
import socket

import pytest
from msgspec.structs import replace

import corolla
from corolla.cli.doctor import tell_outlook, tell_swarm
from corolla.cli.machine import examine_machine, examine_port
from corolla.swarm import Outlook
from corolla.terms import Announcement, ModelId, PeerId, RelayOffer, Snapshot, Span

SERVER = Announcement(
    peer=PeerId("a" * 52),
    sequence=1,
    ttl_s=20.0,
    model=ModelId("ab" * 32),
    model_name="org/model",
    num_blocks=8,
    span=Span(0, 8),
    state="online",
    precision="bfloat16",
    addresses=(),
    version=corolla.__version__,
)
RELAY = RelayOffer(peer=PeerId("b" * 52), sequence=1, ttl_s=20.0, addresses=())
WELL = Outlook(2, ("192.0.2.7",), "none", "direct", "", 0.2)


def states(findings):
    return {one.what: one.state for one in findings}


def outlook(snapshot=None, port=31330, **changes):
    found = tell_outlook(WELL._replace(**changes), snapshot or Snapshot(announcements=(SERVER,)), port)
    return {one.what: one for one in found}


def test_a_machine_that_others_can_dial_is_well():
    assert states(outlook().values()) == {"router": "good", "reach": "good", "clock": "good"}


def test_one_that_cannot_be_dialled_needs_a_relay_or_its_port_forwarded():
    hidden = {"router": "symmetric", "verdict": "hidden", "problem": "refused"}
    alone = outlook(**hidden)["reach"]
    assert alone.state == "bad"
    assert "refused" in alone.says
    assert "forward TCP port 31330" in alone.remedy
    helped = outlook(Snapshot(announcements=(SERVER,), relay_offers=(RELAY,)), **hidden)["reach"]
    assert helped.state == "note"
    assert "through the swarm's 1 relay;" in helped.says


@pytest.mark.parametrize(("ahead_s", "state"), [(-2.0, "good"), (45.0, "note"), (-4000.0, "bad"), (None, "unknown")])
def test_a_clock_that_is_wrong_is_told(ahead_s, state):
    assert outlook(ahead_s=ahead_s)["clock"].state == state


def test_what_was_not_tried_is_not_told_as_if_it_was():
    assert outlook(port=None)["reach"].state == "unknown"
    assert outlook(verdict="unknown")["reach"].state == "unknown"
    assert states(outlook(asked=0).values()) == {"reach": "unknown"}


def test_blocks_without_a_server_are_in_the_way():
    half = replace(SERVER, span=Span(0, 3))
    assert states(tell_swarm(Snapshot(announcements=(SERVER,)))) == {"swarm": "good", "blocks": "good"}
    found = {one.what: one for one in tell_swarm(Snapshot(announcements=(half,)))}
    assert found["blocks"].state == "bad"
    assert "5 of 8 blocks" in found["blocks"].says
    assert states(tell_swarm(Snapshot(announcements=()))) == {"swarm": "note"}


def test_a_port_is_free_or_not():
    with socket.socket() as ear:
        ear.bind(("127.0.0.1", 0))
        ear.listen()
        port = ear.getsockname()[1]
        taken = examine_port("127.0.0.1", port)
        assert taken.state == "note"
        assert f"--port {port + 1}" in taken.remedy
    assert examine_port("127.0.0.1", port).state == "good"


def test_the_machine_is_looked_at_without_a_swarm(tmp_path):
    (tmp_path / "hub" / "models--org--model").mkdir(parents=True)
    (tmp_path / "hub" / "models--org--model" / "weights").write_bytes(bytes(5000))
    found = {one.what: one for one in examine_machine("org/model", tmp_path)}
    assert "5.0 kB of org/model" in found["model"].says
    assert {"versions", "packages", "memory", "disk", "threads", "GPU"} <= found.keys()
    assert examine_machine("org/other", tmp_path)[-1].state == "note"


def test_without_a_swarm_it_says_how_to_ask_one(invoke):
    done = invoke("doctor", "--json", "--port", "0")
    said = json.loads(done.stdout)
    assert done.exit_code == 0 if said["is_well"] else 1
    (swarm,) = [one for one in said["findings"] if one["what"] == "swarm"]
    assert swarm["state"] == "unknown"
    assert "--peer tls://host:port" in swarm["remedy"]


def test_a_swarm_that_cannot_be_reached_is_a_problem(invoke):
    done = invoke("doctor", "--peer", "tls://127.0.0.1:1", "--port", "0")
    assert done.exit_code == 1
    assert "problem" in done.stdout
    assert "127.0.0.1:1" in done.stdout
