"""The commands against a real swarm: one server process with a tiny model, and each command within this process."""

import json
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest
from typer.testing import CliRunner

from corolla.cli import app
from corolla.cli.chat import SECTIONS
from corolla.cli.config import OutputConfig
from corolla.cli.console import Output
from corolla.cli.conversation import Conversation
from corolla.cli.orders import obey
from corolla.cli.settings import Given, load_settings
from corolla.errors import UsageError
from corolla.hub import stay_silent
from corolla.testing import LocalSwarm, save_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def swarm(model, tmp_path_factory):
    with LocalSwarm(
        model, ["0:4"], "--threads", "1", "--name", "a\x1b[31mtest", logs=tmp_path_factory.mktemp("logs")
    ) as swarm:
        yield swarm.wait_until_online()


@pytest.fixture
def invoke(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("COROLLA_CHAT_MAX_NEW_TOKENS", "8")
    monkeypatch.setenv("COROLLA_CLIENT_CHAIN_S", "0.2")

    def run(*arguments, stdin=None):
        return CliRunner().invoke(app, arguments, input=stdin, prog_name="corolla")

    return run


def test_generate_continues_a_text(invoke, swarm, model):
    plain = invoke("generate", model, "--peer", swarm.address, "--prompt", "abc", "--greedy")
    assert plain.exit_code == 0, plain.stderr
    assert "tokens/s" in plain.stderr
    piped = invoke("generate", model, "--peer", swarm.address, "--greedy", "--json", stdin="abc")
    said = json.loads(piped.stdout)
    assert said["text"] == plain.stdout.removesuffix("\n")
    assert said["tokens"] == 8
    assert said["chain"] == [{"peer": swarm.servers[0].peer_id, "span": [0, 4]}]
    assert said["ttft_s"] > 0
    assert piped.stderr == ""


def test_sampling_with_a_seed_can_be_repeated(invoke, swarm, model):
    arguments = ("generate", model, "--peer", swarm.address, "--prompt", "abc", "--temperature", "1.5", "--quiet")
    texts = {seed: [invoke(*arguments, "--seed", seed).stdout for _ in range(2)] for seed in ("1", "2")}
    assert texts["1"][0] == texts["1"][1] != texts["2"][0] == texts["2"][1]


def test_chat_answers_a_question_from_standard_input_with_the_only_model_of_the_swarm(invoke, swarm):
    done = invoke("chat", "--peer", swarm.address, "--greedy", "--system", "Be brief.", stdin="Who are you?\n")
    assert done.exit_code == 0, done.stderr
    answer, chain, *_ = done.stdout.splitlines()
    assert answer
    assert chain.startswith(f"[{swarm.servers[0].peer_id[:8]} 0:4] 8 tokens")


@contextmanager
def talking(swarm, **chat):
    values = {"chat.peers": swarm.address, **{f"chat.{name}": value for name, value in chat.items()}}
    given = [Given(key, value, "test", is_text=True) for key, value in values.items()]
    with Conversation(load_settings(SECTIONS, flags=given, environment={}), stay_silent) as conversation:
        yield conversation


@pytest.fixture
def conversation(swarm):
    with talking(swarm, max_new_tokens=8, greedy=True) as conversation:
        yield conversation


def test_a_chat_keeps_its_session_over_turns(conversation):
    pieces = []
    first = conversation.ask("abc", pieces.append)
    assert "".join(pieces) == first.text
    chain = conversation.chain
    second = conversation.ask("def", pieces.append)
    assert conversation.chain == chain
    conversation.forget()
    assert conversation.ask("abc", pieces.append).text == first.text != second.text


def test_an_answer_that_is_stopped_ends_early_and_the_chat_goes_on(swarm):
    with talking(swarm, max_new_tokens=150, temperature=2.0, seed=1) as conversation:
        whole = conversation.ask("abc", lambda piece: None)
        conversation.forget()
        stopped = conversation.ask("abc", lambda piece: conversation.stop())  # at its first space
        assert 1 <= stopped.cost.tokens < whole.cost.tokens
        assert whole.text.startswith(stopped.text)
        assert conversation.ask("go on", lambda piece: None).cost.tokens > 1


def test_a_chat_that_outgrows_its_session_gets_a_larger_one(conversation):
    first = conversation.complete("x" * 8, lambda piece: None).text
    assert conversation.complete("y" * 4, lambda piece: None).cost.tokens == 8
    assert conversation.complete("x" * 8, lambda piece: None).text == first


def test_info_shows_the_model_and_its_servers(invoke, swarm, model):
    done = invoke("info", "--peer", swarm.address, "--json")
    said = json.loads(done.stdout)
    assert (said["family"], said["is_supported"], said["blocks"]) == ("llama", True, 4)
    assert said["block_bytes"]["float32"] == 2 * said["block_bytes"]["bfloat16"]
    assert [server["span"] for server in said["servers"]] == [[0, 4]]
    shown = invoke("info", model, "--peer", swarm.address).stdout
    assert "every block has 1 or more" in shown
    assert "atest" in shown  # without what would colour the terminal
    assert "\x1b" not in shown


def test_a_text_beyond_the_context_is_refused(invoke, swarm, model):
    done = invoke("generate", model, "--peer", swarm.address, stdin="x" * 5000)
    assert done.exit_code == 2
    assert "5000 tokens leave no room" in done.stderr


def test_a_model_that_nobody_serves_is_an_error_of_the_swarm(invoke, swarm, tmp_path):
    other = str(save_tiny_model(tmp_path / "other", family="gpt2"))
    done = invoke("generate", other, "--peer", swarm.address, "--prompt", "abc")
    assert done.exit_code == 1
    assert "no server for blocks" in done.stderr


def test_a_swarm_that_is_not_there_is_an_error_of_the_swarm(invoke, model):
    done = invoke("generate", model, "--peer", "tls://127.0.0.1:1", "--prompt", "abc")
    assert done.exit_code == 1
    assert done.stderr.startswith("error: ")


def test_a_port_in_use_is_the_callers_mistake(invoke, swarm, model):
    port = swarm.address.partition("//")[2].partition("/")[0].rpartition(":")[2]
    done = invoke("serve", model, "--host", "127.0.0.1", "--port", port, "--quiet")
    assert done.exit_code == 2
    assert port in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="processes are not told to end there")
def test_a_server_that_is_told_to_end_leaves_in_peace(model, tmp_path):
    command = [sys.executable, "-m", "corolla", "serve", model, "--host", "127.0.0.1", "--port", "0", "--threads", "1"]
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, stderr=log)
    stages = []
    for line in server.stdout:
        stages.append(json.loads(line)["stage"])
        if stages[-1] == "online":
            server.send_signal(signal.SIGTERM)
    server.stdout.close()
    assert server.wait() == 0
    assert stages == ["listening", "joined", "claimed", "loaded", "online", "draining", "left"]


def test_the_doctor_asks_the_swarm(invoke, swarm):
    done = invoke("doctor", "--peer", swarm.address, "--host", "127.0.0.1", "--port", "0", "--json")
    found = {one["what"]: one for one in json.loads(done.stdout)["findings"]}
    assert {name: found[name]["state"] for name in ("swarm", "blocks", "router", "reach", "clock")} == {
        "swarm": "good", "blocks": "good", "router": "good", "reach": "good", "clock": "good",
    }  # fmt: skip
    assert done.exit_code == 0, done.stdout


def test_top_without_a_terminal_shows_the_swarm_once(invoke, swarm):
    shown = invoke("top", "--peer", swarm.address).stdout
    assert swarm.servers[0].peer_id[:8] in shown
    assert "every block has a server" in shown
    assert "\x1b" not in shown
    (model,) = json.loads(invoke("top", "--peer", swarm.address, "--json").stdout)["models"]
    assert model["servers"][0]["answers"]


def test_a_chat_is_rewound_retried_saved_and_loaded_by_orders(conversation, tmp_path, capsys):
    output, file = Output(OutputConfig()), tmp_path / "chat.json"
    first = conversation.ask("abc", lambda piece: None).text
    conversation.ask("def", lambda piece: None)
    obey(f"/save {file}", conversation, output)
    said = conversation.messages
    obey("/rewind", conversation, output)
    assert [message["content"] for message in conversation.messages] == ["abc", first]
    question = obey("/retry", conversation, output)
    assert question == "abc"
    assert conversation.messages == []
    assert conversation.ask(question, lambda piece: None).text == first
    obey(f"/load {file}", conversation, output)
    assert conversation.messages == said == json.loads(file.read_text())
    obey("/chain", conversation, output)
    assert "0:4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("order", "reason"),
    [
        ("/rewind 9", "0 questions were asked"),
        ("/rewind x", "takes a number"),
        ("/retry", "0 questions were asked"),
        ("/load", "needs the name of a file"),
        ("/load /nowhere/chat.json", "cannot be read"),
        ("/load pyproject.toml", "holds no chat"),
        ("/save /nowhere/chat.json", "cannot be written"),
        ("/dance", "there is no order /dance"),
    ],
)
def test_an_order_that_cannot_be_obeyed_says_why_and_changes_nothing(conversation, order, reason):
    with pytest.raises(UsageError, match=reason):
        obey(order.replace("pyproject.toml", __file__), conversation, Output(OutputConfig()))
    assert conversation.messages == []
