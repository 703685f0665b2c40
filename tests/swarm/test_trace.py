"""What happened in a session can be seen, decision by decision; what was said in it cannot, in any log."""

# B batch, T tokens

import json
import logging
import secrets

import pytest
import torch

from corolla.cli import app
from corolla.client import AutoModelForCausalLM, ClientConfig, Swarm
from corolla.hub import HubConfig, load_tokenizer, open_repository
from corolla.testing import ThreadedSwarm, save_tiny_model

PROMPT = "My secret is xylophone-7431."


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def test_no_log_holds_prompts_tokens_or_keys(directory, caplog, monkeypatch):
    """Everything is logged, down to debugging, through steps, a replay and a handover, by servers and client alike."""
    caplog.set_level(logging.DEBUG)
    made, make = [], secrets.token_bytes

    def remember(size):
        made.append(make(size))
        return made[-1]

    monkeypatch.setattr(secrets, "token_bytes", remember)
    tokenizer = load_tokenizer(open_repository(str(directory), config=HubConfig()))
    prompt_BT = tokenizer(PROMPT, return_tensors="pt").input_ids
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with (
        ThreadedSwarm(str(directory), ["0:2", "2:4", "2:4"], drain_s=10.0) as servers,
        Swarm(servers.address, config=ClientConfig(codec="raw")) as swarm,
    ):
        model = AutoModelForCausalLM.from_pretrained(str(directory), swarm=swarm, dtype=torch.float32)
        with model.session(128) as session:
            said_BT = model.generate(prompt_BT, session=session, **options)
            servers.servers[0].forget()
            leaving = next(one for one in servers.servers[1:] if one.peer_id == session.chain.hops[1].peer)
            leaving.stop()
            said_BT = model.generate(said_BT, session=session, **options)
            what = [entry.what for entry in session.trace.entries]
    assert {"step", "hops chosen", "hop left", "replaced", "hop handed over"} <= set(what)
    assert len(made) >= 4
    written = "\n".join(everything_of(record) for record in caplog.records)
    assert "hops chosen" in written
    said = tokenizer.decode(said_BT[0])
    told = [PROMPT, "xylophone", "7431", said[len(PROMPT) :]]
    told += [", ".join(map(str, said_BT[0, start : start + 6].tolist())) for start in range(0, 24, 6)]
    keys = [shown for key in made for shown in (repr(key), key.hex(), key.hex().upper())]
    assert not [secret for secret in told + keys if secret in written]


def everything_of(record):
    fields = getattr(record, "corolla_fields", {})
    trace = logging.Formatter().formatException(record.exc_info) if record.exc_info else ""
    return f"{record.getMessage()} {fields!r} {' '.join(map(str, fields.values()))} {trace}"


def test_a_trace_is_shown_step_by_step(directory, capsys):
    from typer.testing import CliRunner

    with ThreadedSwarm(str(directory), ["0:2", "2:4"]) as servers:
        arguments = ["trace", str(directory), "--peer", servers.address, "--prompt", PROMPT, "--max-new-tokens", "3"]
        shown = CliRunner().invoke(app, arguments)
        assert shown.exit_code == 0, shown.output
        assert shown.output.count("step") >= 3
        assert "hops chosen" in shown.output
        assert "xylophone" not in shown.output
        lines = CliRunner().invoke(app, [*arguments, "--json"]).output.splitlines()
        entries = [json.loads(line) for line in lines if line.startswith("{")]
        steps = [entry for entry in entries if entry["what"] == "step"]
        assert [entry["tokens"] for entry in steps] == [len(PROMPT), 1, 1]
        assert all(len(entry["hops"]) == 2 and entry["hops"][0]["compute_s"] > 0 for entry in steps)
