"""Events of an answer: told in order while the next piece is made, and ended with the reason if the answer fails."""

import json

import anyio
import pytest
from prometheus_client.parser import text_string_to_metric_families

from corolla.errors import PeerTimeout
from corolla.gateway.catalog import Offer
from corolla.gateway.generation import Answer, Piece
from corolla.gateway.metrics import GatewayMetrics
from corolla.gateway.sampling import Sampling
from corolla.gateway.streams import EventStream
from corolla.gateway.telling import Telling
from corolla.telemetry.metrics import render

OFFER = Offer("tiny", None, None, None, Sampling(), frozenset(), 0)
LIMIT_S = 60


@pytest.fixture
def metrics():
    return GatewayMetrics(lambda: 0, lambda: 0)


def answered(produce):
    """Send an event stream to a client that stays, and give the status and what it was sent."""
    sent = []

    async def run():
        async def send(message):
            sent.append(message)

        with anyio.fail_after(LIMIT_S):
            await EventStream(produce)({"type": "http"}, anyio.sleep_forever, send)

    anyio.run(run)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent).decode()


def ended(metrics):
    families = text_string_to_metric_families(render(metrics.registry).decode())
    return {
        sample.labels["error_type"]: sample.value
        for family in families for sample in family.samples
        if sample.name == "gen_ai_server_request_duration_seconds_count"
    }  # fmt: skip


@pytest.mark.parametrize("is_begun", [True, False])
def test_a_failure_within_a_group_of_tasks_is_told_as_itself(metrics, is_begun):
    async def fail(emit):
        async with anyio.create_task_group():
            if is_begun:
                await emit({"said": "a"})
            raise PeerTimeout("a server was too slow")

    status, body = answered(metrics.timed("chat", fail, OFFER))
    assert "a server was too slow" in body
    assert status == (200 if is_begun else PeerTimeout.http_status)
    if is_begun:
        first, failure, last = body.strip().split("\n\n")
        assert json.loads(first.removeprefix("data: ")) == {"said": "a"}
        assert json.loads(failure.removeprefix("data: "))["error"]["code"] == PeerTimeout.code
        assert last == "data: [DONE]"
    assert ended(metrics) == {PeerTimeout.code: 1}


def test_a_client_that_goes_away_is_counted_as_that(metrics):
    async def run():
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(metrics.timed("chat", anyio.sleep_forever, OFFER))
                await anyio.lowlevel.checkpoint()
                scope.cancel()

    anyio.run(run)
    assert ended(metrics) == {"client_gone": 1}


@pytest.mark.parametrize("pieces", [0, 1, 500])
def test_all_pieces_are_told_in_order_however_slowly(pieces):
    told, most = [], 0

    async def tell(answer, piece):
        nonlocal most
        await anyio.lowlevel.checkpoint()
        most = max(most, answer.tokens - len(told))
        told.append(piece.text)

    async def run():
        telling, answer = Telling(tell), Answer()

        def make():
            for number in range(pieces):
                answer.tokens += 1
                telling.put(answer, Piece(str(number)))

        with anyio.fail_after(LIMIT_S):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(telling.run)
                await anyio.to_thread.run_sync(make)
                telling.end()

    anyio.run(run)
    assert told == [str(number) for number in range(pieces)]
    assert most <= 66  # the thread waits for whoever listens
