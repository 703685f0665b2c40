"""Whatever is asked of it or thrown at it, a server answers with a reason, and answers the next as if nothing was."""

# B batch, T tokens

import contextlib
import math
import secrets
import socket
import struct

import anyio
import pytest
import torch

from corolla.client import AutoModelForCausalLM, ClientConfig, Session, StepTokens, Swarm, Target
from corolla.errors import (
    BadCheckpoint,
    BootstrapFailed,
    CodecError,
    ConfigError,
    ContextTooLong,
    ModelNotFound,
    NoChain,
    UsageError,
)
from corolla.server import Server, ServerConfig
from corolla.swarm import Identity, SwarmConfig, TlsTransport
from corolla.terms import Span
from corolla.testing import ThreadedSwarm, save_tiny_model
from corolla.wire import (
    PROTOCOL_VERSION,
    Failure,
    FrameDecoder,
    OpenSession,
    Ping,
    SessionState,
    decode_message,
    encode_frame,
)
from corolla.wire import encode_message as encode

GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
PROMPT_BT = torch.tensor([[5, 6, 7]])
SOON_S = 5.0


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def servers(directory):
    torch.set_num_threads(1)
    with ThreadedSwarm(str(directory), ["0:2", "2:4"], swarm=SwarmConfig(refresh_s=0.2)) as servers:
        yield servers


@pytest.fixture(scope="module")
def swarm(servers):
    with Swarm(servers.address, config=ClientConfig(codec="raw", chain_s=0.5)) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def model(directory, swarm):
    return AutoModelForCausalLM.from_pretrained(str(directory), swarm=swarm)


@pytest.fixture
def serves(model, servers):
    """Afterwards the servers answer as before and hold nothing."""
    expected = model.generate(PROMPT_BT, **GREEDY)
    yield
    assert torch.equal(model.generate(PROMPT_BT, **GREEDY), expected)
    with_deadline(sessions_are(model.swarm, 0))


def with_deadline(coroutine_function):
    async def run():
        with anyio.fail_after(SOON_S):
            return await coroutine_function()

    return anyio.run(run)


def sessions_are(swarm, count, free_tokens=None):
    """Wait until the servers announce so many sessions, each with its pages taken, and so many free tokens."""

    async def wait():
        while True:
            found = swarm.snapshot().announcements
            free = {server.free_tokens for server in found}
            if all(server.sessions == count for server in found) and free_tokens in (None, free):
                return free
            await anyio.sleep(0.02)

    return wait


# What a server cannot serve


def run_server(model, **settings):
    async def run():
        config = ServerConfig(**{"model": str(model), "host": "127.0.0.1", "port": 0} | settings)
        with anyio.fail_after(30):
            await Server(config).run()

    anyio.run(run)


def test_an_unknown_model_is_named(tmp_path):
    with pytest.raises(ModelNotFound, match="nowhere"):
        run_server(tmp_path / "nowhere")


def test_pickled_weights_are_refused(directory, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04]\x94.")
    with pytest.raises(BadCheckpoint, match="pytorch_model.bin, a format that can run code"):
        run_server(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "scrambled"])
def test_unreadable_weights_are_refused(directory, tmp_path, damage):
    for path in directory.iterdir():
        data = path.read_bytes()
        if path.suffix == ".safetensors":
            data = data[: len(data) // 2] if damage == "cut" else secrets.token_bytes(len(data))
        (tmp_path / path.name).write_bytes(data)
    with pytest.raises(BadCheckpoint, match="model-0000"):
        run_server(tmp_path)


def test_a_span_out_of_range_is_refused_with_the_range(directory):
    with pytest.raises(UsageError, match=r"has 4 blocks, 0:4; 2:9 were asked for"):
        run_server(directory, blocks=Span(2, 9))


def test_a_port_in_use_is_named(directory, servers):
    port = int(servers.servers[0].server.addresses[0].rpartition(":")[2])
    with pytest.raises(ConfigError, match=f"{port}.*in use"):
        run_server(directory, port=port)


def test_peers_that_do_not_answer_are_named(directory):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        address = f"tls://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(BootstrapFailed, match=address):
            run_server(directory, peers=(address,))
        with pytest.raises(BootstrapFailed, match=address):
            Swarm(address)


# What a client cannot have


def test_missing_blocks_are_named_with_the_age_of_the_view(directory, servers, serves):
    config = ClientConfig(codec="raw", chain_s=0.1, avoid_peers=(servers.servers[1].peer_id,))
    with Swarm(servers.address, config=config) as swarm:
        model = AutoModelForCausalLM.from_pretrained(str(directory), swarm=swarm)
        with pytest.raises(NoChain, match=r"no server for blocks 2:4 .*the view is \d+ s old.*--blocks 2:4"):
            model.generate(PROMPT_BT, **GREEDY)


def test_a_prompt_beyond_the_context_is_refused(model, serves):
    with pytest.raises(ContextTooLong, match="300 tokens.*256"):
        model.generate(torch.full((1, 300), 5), **GREEDY)


def test_more_tokens_than_the_context_are_refused_where_it_ends(model, serves):
    with pytest.raises(ContextTooLong, match="257 tokens.*256"):
        model.generate(torch.full((1, 250), 5), **GREEDY | {"max_new_tokens": 20})


def test_another_model_has_no_servers(tmp_path, servers, serves):
    other = save_tiny_model(tmp_path, family="gpt2")
    with Swarm(servers.address, config=ClientConfig(codec="raw", chain_s=0.1)) as swarm:
        model = AutoModelForCausalLM.from_pretrained(str(other), swarm=swarm)
        with pytest.raises(NoChain, match="0 servers of the model are known"):
            model.generate(PROMPT_BT, **GREEDY)


def test_an_unknown_codec_is_refused(directory, swarm, serves):
    with pytest.raises(CodecError, match="no codec 'gzip'; this version knows raw"):
        AutoModelForCausalLM.from_pretrained(str(directory), swarm=swarm, codec="gzip")
    with pytest.raises(ConfigError, match="codec is 'gzip'; it must be one of raw"):
        ClientConfig(codec="gzip")


def test_more_rows_than_there_are_pages_are_refused(model, serves):
    with pytest.raises(NoChain, match="free KV tokens"):
        model.generate(PROMPT_BT.repeat(1000, 1), **GREEDY | {"max_new_tokens": 250})


# What a stranger may throw


def frame(version=PROTOCOL_VERSION, message_bytes=0, payload_bytes=0, rest=b""):
    return struct.pack(">4sB3xIII", b"CRLA", version, 0, message_bytes, payload_bytes) + rest


PING = b"".join(encode_frame(encode(Ping())))
THROWN = {
    "noise": (secrets.token_bytes(4096), "remote_protocol", "not a Corolla peer, or a broken one"),
    "another protocol": (b"GET / HTTP/1.1\r\nHost: here\r\n\r\n", "remote_protocol", "expected a frame"),
    "another version": (frame(version=99), "peer_outdated", "speaks protocol version 99"),
    "a large message": (
        frame(message_bytes=2**31),
        "frame_too_large",
        "a message of 2147483648 bytes",
    ),
    "a large payload": (
        frame(payload_bytes=2**31),
        "frame_too_large",
        "2147483648 payload bytes",
    ),
    "no message": (frame(message_bytes=9, rest=b"\xc1" * 9), "remote_protocol", "message of 9 bytes could not be read"),
    "a good one before": (PING + b"\x00" * 64, "remote_protocol", "expected a frame"),
}


@pytest.mark.parametrize("what", THROWN)
def test_what_is_no_frame_is_answered_with_the_reason_and_costs_its_stream_alone(servers, serves, what):
    data, code, words = THROWN[what]
    failure = with_deadline(lambda: thrown(servers, data))
    assert failure.code == code
    assert words in failure.message


async def thrown(servers, data):
    """Send bytes on an encrypted stream and read until the server hangs up; give its last message."""
    first = servers.servers[0]
    stream = await TlsTransport(Identity.generate(), SwarmConfig()).dial(first.peer_id, first.server.addresses[0])
    decoder, messages = FrameDecoder(), []
    try:
        await stream.send(data)
        while True:
            messages += [decode_message(frame.message) for frame in decoder.receive(await stream.receive())]
    except anyio.EndOfStream:
        assert isinstance(messages[-1], Failure)
        return messages[-1]
    finally:
        await stream.aclose()


@pytest.mark.parametrize("nbytes", [6, 100, 10**6])
def test_noise_on_the_port_costs_its_connection_alone(servers, serves, nbytes):
    port = int(servers.servers[0].server.addresses[0].rpartition(":")[2])
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), SOON_S) as stranger:
        stranger.sendall(secrets.token_bytes(nbytes))  # and it may hang up at any time
        stranger.shutdown(socket.SHUT_WR)
        while stranger.recv(65536):
            pass


def test_a_client_that_vanishes_leaves_its_pages(servers, swarm, serves):
    free_tokens = with_deadline(sessions_are(swarm, 0))

    async def vanish():
        """Open a session on every server, and go without a word."""
        streams = []
        for thread in servers.servers:
            server = thread.server
            model = swarm.snapshot().announcements[0].model
            opening = OpenSession(model=model, span=server.span, rows=1, max_tokens=128, codec="raw")
            stream = await TlsTransport(Identity.generate(), SwarmConfig()).dial(thread.peer_id, server.addresses[0])
            SessionState("client").sent(opening)
            await stream.send(b"".join(encode_frame(encode(opening))))
            streams.append(stream)
        # A session that a test before this one has given up may still come, and go.
        await sessions_are(swarm, 1, {max(free_tokens) - 128})()
        for stream in streams:
            await stream.aclose()

    with_deadline(vanish)
    assert with_deadline(sessions_are(swarm, 0)) == free_tokens


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_numbers_that_are_none_hold_up_nobody(model, swarm, serves, value):
    hidden_ND = torch.full((3, 64), value)

    async def step():
        session = Session(swarm.core, model.blocks.target, rows=1, max_tokens=64)
        await session.open()
        try:
            if not math.isfinite(value):
                with pytest.raises(UsageError, match="nan or infinite"):
                    await session.step(StepTokens(hidden_ND, (0,), (3,)))
                hidden_ND.fill_(0)
            with anyio.fail_after(SOON_S):
                return await session.step(StepTokens(hidden_ND, (0,), (3,)))
        finally:
            await session.close()

    assert swarm.call(step).hidden_ND.shape == (3, 64)
    assert model.blocks(torch.full((1, 3, 64), value)).shape == (1, 3, 64)


@pytest.mark.parametrize("width", [1, 32, 65])
def test_hidden_states_of_another_width_are_refused(model, swarm, serves, width):
    with pytest.raises(UsageError, match=f"{width}.* was sent to blocks that take .* the last of 64"):
        model.blocks(torch.zeros(1, 3, width))

    async def step():
        session = Session(swarm.core, model.blocks.target, rows=1, max_tokens=64)
        await session.open()
        try:
            await session.step(StepTokens(torch.zeros(3, width), (0,), (3,)))
        finally:
            await session.close()

    with pytest.raises(UsageError, match=f"{width}.* was sent to blocks that take .* the last of 64"):
        swarm.call(step)


def test_blocks_that_the_model_does_not_have_are_refused(model, swarm, serves):
    beyond = Target(model.model_id, Span(3, 9), "raw")

    async def open_beyond():
        await Session(swarm.core, beyond, rows=1, max_tokens=64).open()

    with pytest.raises(NoChain, match="no server for blocks 4:9"):
        swarm.call(open_beyond)
