"""What a server holds its weights in: chosen by what fits, announced, and demanded by clients."""

from functools import partial

import anyio
import pytest
import torch

from corolla.blocks import block_bytes, load_config, load_span, weight_format
from corolla.client import AsyncSwarm, ClientConfig, Session, StepTokens, Target
from corolla.engine import EngineConfig
from corolla.errors import NoChain
from corolla.server import Server, ServerConfig
from corolla.server.loading import choose_precision
from corolla.swarm import MemoryNetwork
from corolla.terms import Span
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


@pytest.mark.parametrize("precision", ["int8", "nf4"])
async def test_a_server_computes_in_the_precision_that_it_announces(directory, precision):
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
            result = await session.step(StepTokens(hidden_ND, (0,), (5,)))
            await session.close()
        others = ClientConfig(precision="float32", chain_s=0.1)
        async with AsyncSwarm([address], config=others, transport=network.transport) as swarm:
            with pytest.raises(NoChain, match="precision float32"):
                await Session(swarm, target, rows=1, max_tokens=16).open()
        server.stop()
    span = await anyio.to_thread.run_sync(partial(load_span, directory, Span(0, 4), dtype=weight_format(precision)))
    expected_ND = span(hidden_ND[None])[0][0]
    assert float((result.hidden_ND - expected_ND).abs().max() / expected_ND.abs().max()) < 0.05
