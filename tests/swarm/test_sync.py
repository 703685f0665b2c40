"""The blocking face of the client: many threads, Ctrl-C, closing in the middle, and scripts that never close."""

import os
import signal
import subprocess
import sys
import threading

import anyio
import pytest
import torch

from corolla.client import AutoModelForCausalLM, ClientConfig, Swarm
from corolla.errors import SessionClosed, UsageError
from corolla.testing import ThreadedSwarm, save_tiny_model

GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
PROMPT_BT = torch.tensor([[5, 6, 7]])


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def servers(directory):
    torch.set_num_threads(1)
    with ThreadedSwarm(str(directory), ["0:2", "2:4"]) as servers:
        yield servers


@pytest.fixture
def swarm(servers):
    with Swarm(servers.address, config=ClientConfig(codec="raw")) as swarm:
        yield swarm


@pytest.fixture
def model(directory, swarm):
    return AutoModelForCausalLM.from_pretrained(str(directory), swarm=swarm)


def sessions(servers):
    return [thread.server.load.sessions for thread in servers.servers]


def test_a_closed_swarm_says_so(servers, model):
    model.swarm.close()
    model.swarm.close()
    for use in (model.swarm.snapshot, lambda: model.generate(PROMPT_BT, **GREEDY)):
        with pytest.raises(SessionClosed, match="it was closed; make another Swarm"):
            use()


def test_closing_a_swarm_ends_its_sessions(servers, model):
    session = model.session(64)
    model.generate(PROMPT_BT, session=session, **GREEDY)
    assert sessions(servers) == [1, 1]
    model.swarm.close()
    assert sessions(servers) == [0, 0]
    session.close()


@pytest.mark.anyio
async def test_closing_cancels_the_calls_of_other_threads(servers):
    swarm = await anyio.to_thread.run_sync(Swarm, servers.address)
    begun = threading.Event()

    async def wait_forever():
        begun.set()
        await anyio.sleep_forever()

    def call():
        with pytest.raises(SessionClosed, match="it was closed"):
            swarm.call(wait_forever)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.to_thread.run_sync, call)
        assert await anyio.to_thread.run_sync(begun.wait, 5)
        with anyio.fail_after(5):
            await anyio.to_thread.run_sync(swarm.close)


@pytest.mark.skipif(os.name == "nt", reason="signals cannot be sent to a thread there")
def test_control_c_in_a_call_cancels_it(swarm):
    cancelled = threading.Event()

    async def wait_forever():
        try:
            await anyio.sleep(0.05)  # until the caller waits
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            await anyio.sleep_forever()
        finally:
            cancelled.set()

    with pytest.raises(KeyboardInterrupt):
        swarm.call(wait_forever)
    assert cancelled.wait(5)


@pytest.mark.skipif(os.name == "nt", reason="signals cannot be sent to a thread there")
def test_control_c_while_generating_closes_the_session(servers, model):
    calls = []

    def process(ids_BT, scores_BV):
        calls.append(ids_BT)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return scores_BV

    session = model.session(64)
    with pytest.raises(KeyboardInterrupt), session:
        model.generate(PROMPT_BT, session=session, logits_processor=[process], **GREEDY | {"max_new_tokens": 50})
    assert sessions(servers) == [0, 0]
    with pytest.raises(SessionClosed, match="closed"):
        model.generate(PROMPT_BT, session=session, **GREEDY)
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        model.generate(PROMPT_BT, logits_processor=[process], **GREEDY | {"max_new_tokens": 50})
    assert sessions(servers) == [0, 0]
    assert model.generate(PROMPT_BT, **GREEDY).shape == (1, 7)


def test_a_session_and_use_cache_false_contradict_each_other(model):
    with model.session() as session, pytest.raises(UsageError, match="use_cache=False"):
        model.generate(PROMPT_BT, session=session, use_cache=False, **GREEDY)


def test_a_script_that_never_closes_ends(directory, servers):
    script = f"""
import torch
from corolla.client import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(directory)!r}, swarm={servers.address!r})
ids = torch.tensor([[5, 6, 7]])
print(model.generate(ids, max_new_tokens=2).shape)
session = model.session()
model(ids, past_key_values=session)
raise SystemExit(3)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, timeout=60, check=False)
    assert not done.stderr, done.stderr.decode()
    assert (done.returncode, done.stdout.split()) == (3, [b"torch.Size([1,", b"5])"])
