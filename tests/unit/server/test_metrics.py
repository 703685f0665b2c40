"""What a server tells Prometheus is what it says of itself, and what its work took."""

import asyncio
from collections import Counter

import anyio.to_thread
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from corolla.engine import Result
from corolla.server.metrics import ServerMetrics
from corolla.swarm import RelayLoad
from corolla.telemetry.metrics import render
from corolla.terms import Announcement, ModelId, PeerId, Span, Speed

SAID = Announcement(
    peer=PeerId("a" * 52),
    sequence=1,
    ttl_s=20.0,
    model=ModelId("ab" * 32),
    model_name="org/model",
    num_blocks=8,
    span=Span(2, 6),
    state="online",
    precision="bfloat16",
    addresses=(),
    speed=Speed(decode_tokens_per_s=50, prefill_tokens_per_s=900),
    free_tokens=4096,
    sessions=3,
)


def read(metrics):
    families = text_string_to_metric_families(render(metrics.registry).decode())
    return {(sample.name, *sorted(sample.labels.values())): sample.value for one in families for sample in one.samples}


def test_a_server_that_has_said_nothing_yet_can_be_asked():
    found = read(ServerMetrics(Counter(), lambda: None))
    assert ("corolla_server_sessions",) not in found
    assert found["corolla_server_state", "online"] == 0


@pytest.mark.anyio
async def test_it_tells_what_it_says_of_itself():
    load = RelayLoad(peers=4, streams=2, passed_bytes=1000, day_bytes=10, refused=1)
    metrics = ServerMetrics(Counter(peer_busy=7), lambda: load)
    metrics.note_said(SAID)
    found = await anyio.to_thread.run_sync(read, metrics)
    assert found["corolla_server_sessions",] == 3
    assert found["corolla_server_blocks",] == 4
    assert found["corolla_server_first_block",] == 2
    assert found["corolla_server_free_kv_tokens",] == 4096
    assert found["corolla_server_state", "online"] == 1
    assert found["corolla_server_state", "draining"] == 0
    assert found["corolla_server_tokens_per_second", "decode"] == 50
    assert found["corolla_server_refused_total", "peer_busy"] == 7
    assert found["corolla_relay_passed_bytes_total",] == 1000
    assert found["corolla_server_tasks",] == len(asyncio.all_tasks())


@pytest.mark.anyio
async def test_work_is_counted_by_kind():
    metrics = ServerMetrics(Counter(), lambda: None)
    metrics.note_said(SAID)
    result = Result((torch.zeros(1),), queue_s=0.01, compute_s=0.02)
    metrics.note_work("prefill", 100, result)
    metrics.note_work("decode", 1, result)
    metrics.note_work("decode", 1, result)
    found = await anyio.to_thread.run_sync(read, metrics)
    assert found["corolla_server_tokens_total", "prefill"] == 100
    assert found["corolla_server_tokens_total", "decode"] == 2
    assert found["corolla_server_queue_seconds_count",] == 3
    assert found["gen_ai_server_time_per_output_token_seconds_count", "corolla", "decode", "org/model"] == 2
    assert found["gen_ai_server_request_duration_seconds_count", "", "corolla", "org/model", "prefill"] == 1
