"""What a server holds its weights in: chosen by what fits, announced, and demanded by clients."""

from functools import partial

import anyio
import pytest
import torch

from corolla.blocks import block_bytes, load_config, load_span, weight_format
from corolla.client import AsyncSwarm, ClientConfig, Session, StepTokens, Target
from corolla.engine import EngineConfig
from corolla.errors import NoChain, SpanTooLarge
from corolla.hub import HubConfig
from corolla.server import Server, ServerConfig, loading
from corolla.server.loading import choose_precision
from corolla.swarm import MemoryNetwork
from corolla.terms import Snapshot, Span
from corolla.testing import save_tiny_model

pytestmark = pytest.mark.anyio
pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def test_a_model_keeps_its_own_precision_where_it_fits(directory):
    config = load_config(directory)
    size_bytes = sum(block_bytes(config, torch.float32))
    assert choose_precision(config, None, 4, size_bytes) == "float32"
    assert choose_precision(config, None, 4, size_bytes - 1) == "nf4"
    assert choose_precision(config, Span(0, 2), 2, size_bytes // 2 + 100) == "float32"


def test_the_room_for_blocks_is_in_what_is_free(directory, monkeypatch):
    """Petals defect L: it was reckoned from all memory, whatever else had taken of it."""
    config = ServerConfig(model=str(directory), precision="float32")
    (block_bytes_, *_) = block_bytes(load_config(directory), torch.float32)
    served = []
    for blocks in (4, 2, 1):
        free = int(blocks * block_bytes_ / loading._WEIGHTS_SHARE) + 100
        monkeypatch.setattr(loading, "free_bytes", lambda device, free=free: free)
        model = loading.open_model(config, HubConfig(), lambda *_: None)
        served.append(len(model.choose_span(Snapshot(announcements=()))))
    assert served == [4, 2, 1]
    monkeypatch.setattr(loading, "free_bytes", lambda device: block_bytes_ // 2)
    with pytest.raises(SpanTooLarge, match="are free for them"):
        loading.open_model(config, HubConfig(), lambda *_: None)


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_blocks_are_rounded_once_for_all_starts(directory, precision, tmp_path, monkeypatch):
    model = loading.open_model(
        ServerConfig(model=str(directory), precision=precision), HubConfig(cache_dir=tmp_path), lambda *_: None
    )
    first = loading.load_blocks(model, Span(1, 3), EngineConfig(), lambda *_: None)
    monkeypatch.setattr(loading, "load_span", None)  # nothing is loaded any more
    again = loading.load_blocks(model, Span(1, 3), EngineConfig(), lambda *_: None)
    hidden_BTD = torch.randn(1, 5, 64, dtype=torch.bfloat16)
    assert torch.equal(again(hidden_BTD)[0], first(hidden_BTD)[0])
    with pytest.raises(TypeError):
        loading.load_blocks(model, Span(0, 2), EngineConfig(), lambda *_: None)


@pytest.mark.parametrize("precision", ["int8", "nf4"])
async def test_a_server_computes_in_the_precision_that_it_announces(directory, precision):
    """Petals defect G: a prompt through weights of four bits took a turn of its own for each block; here it is one."""
    network = MemoryNetwork()
    settings = ServerConfig(model=str(directory), host="here", port=0, precision=precision)
    engine = EngineConfig(threads=1, kv_bytes=1 << 20)
    server = Server(settings, engine=engine, transport=network.transport)
    online = anyio.Event()

    async def watch(stage):
        if stage == "online":
            online.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(server.run, watch)
        with anyio.fail_after(60):
            await online.wait()
        address = f"{server.addresses[0]}/{server.peer_id}"
        wants = ClientConfig(precision=precision, codec="raw")
        async with AsyncSwarm([address], config=wants, transport=network.transport) as swarm:
            (announcement,) = swarm.snapshot().announcements
            assert announcement.precision == precision
            target = Target(announcement.model, Span(0, 4), "raw")
            session = Session(swarm, target, rows=1, max_tokens=16)
            await session.open()
            hidden_ND = torch.randn(5, 64, dtype=torch.bfloat16)
            span, turns = server._engine.span, []
            run = span.forward_packed
            span.forward_packed = lambda *args, **kwargs: turns.append(kwargs["blocks"]) or run(*args, **kwargs)
            result = await session.step(StepTokens(hidden_ND, (0,), (5,)))
            assert turns == [Span(0, 4)]
            await session.close()
        others = ClientConfig(precision="float32", chain_s=0.1)
        async with AsyncSwarm([address], config=others, transport=network.transport) as swarm:
            with pytest.raises(NoChain, match="precision float32"):
                await Session(swarm, target, rows=1, max_tokens=16).open()
        server.stop()
    span = await anyio.to_thread.run_sync(partial(load_span, directory, Span(0, 4), dtype=weight_format(precision)))
    expected_ND = span(hidden_ND[None])[0][0]
    assert float((result.hidden_ND - expected_ND).abs().max() / expected_ND.abs().max()) < 0.05
