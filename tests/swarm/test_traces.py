"""One trace of a generation, put together by a collector from what the client and each server have sent it."""

import subprocess
import sys
import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from corolla.testing import LocalSwarm, save_tiny_model

pytest.importorskip("opentelemetry.sdk", reason="needs corolla[otlp]")
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

SECRET = "A secret prompt"


@pytest.fixture
def collector():
    """Takes OTLP over HTTP: its URL, and what has come, by the program that sent it."""
    spans, raw = defaultdict(list), []

    class Collect(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            raw.append(body)
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                names = {one.key: one.value.string_value for one in resource.resource.attributes}
                for scope in resource.scope_spans:
                    spans[names["service.name"]] += scope.spans
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Collect) as server:
        thread = threading.Thread(target=server.serve_forever)  # noqa: TID251
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", spans, raw
        server.shutdown()
        thread.join()


def test_a_trace_goes_through_all_hops_and_holds_no_text(collector, tmp_path):
    url, spans, raw = collector
    model = str(save_tiny_model(tmp_path / "model"))
    asked = ["--prompt", SECRET, "--greedy", "--max-new-tokens", "4", "--otlp", url]
    with LocalSwarm(model, ["0:2", "2:4"], "--threads", "1", "--no-lan", "--otlp", url, logs=tmp_path) as swarm:
        peer = swarm.wait_until_online().address
        command = [sys.executable, "-m", "corolla", "generate", model, "--peer", peer, *asked]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
    (session,) = [span for span in spans["corolla generate"] if span.name == "session"]
    steps = [span for span in spans["corolla generate"] if span.name == "step"]
    hops = [span for span in spans["corolla serve"] if span.name == "hop"]
    computed = [span for span in spans["corolla serve"] if span.name == "compute"]
    assert {span.trace_id for spans_ in spans.values() for span in spans_} == {session.trace_id}
    assert [span.parent_span_id for span in (*steps, *hops)] == [session.span_id] * (len(steps) + 2)
    assert {span.parent_span_id for span in computed} == {span.span_id for span in hops}
    assert len(steps) == 4
    assert len(computed) == 8
    assert "hops chosen" in {event.name for event in session.events}
    said = {
        one.value.string_value for span in hops for one in span.attributes if one.key == "corolla.blocks"
    }  # fmt: skip
    assert said == {"0:2", "2:4"}
    assert not any(SECRET.encode() in body for body in raw)
