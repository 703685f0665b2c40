"""What the gateway costs over the client library, and what a kept session saves.

One server process with SmolLM2-135M's 30 blocks on this machine; the gateway runs in this process, on its own thread.
Tokens are chosen greedily on both sides, and must be the same. Give it a quiet machine and, where possible, real-time
priority: ``chrt -r 5 python -m bench gateway``.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
from anyio.abc import TaskStatus
from anyio.from_thread import start_blocking_portal

from bench.report import Row, write_report
from corolla.cli.web import WebServer, listen
from corolla.client import Swarm
from corolla.gateway import GatewayConfig, KeyConfig
from corolla.gateway.accounts import Accounts
from corolla.gateway.app import make_app
from corolla.gateway.catalog import Catalog, Offer
from corolla.gateway.gateway import Gateway
from corolla.hub import HubConfig, stay_silent
from corolla.testing import LocalSwarm

__all__ = ["main"]

MODEL = "smollm2"
TOKENS = 64
ROUNDS = 9
ENDS = [0, 2]  # SmolLM2's tokens that end a text; both sides are kept from them
PROMPT = "Tell me about the history of the bicycle, " * 40


def main() -> None:
    """Measure and report."""
    torch.set_num_threads(1)
    with (
        tempfile.TemporaryDirectory() as folder,
        LocalSwarm(MODEL, ["0:30"], "--threads", "1", "--no-lan", logs=Path(folder)) as servers,
        Swarm(servers.wait_until_online().address) as swarm,
    ):
        catalog = Catalog.load([MODEL], swarm, hub=HubConfig(), report=stay_silent)
        accounts = Accounts(Path(folder) / "keys.sqlite")
        with _running(catalog, accounts) as http:
            rows = [*_overhead(catalog.find(MODEL), http), *_turns(http)]
        accounts.close()
    write_report("gateway", rows, "The gateway over the client library: one server, SmolLM2-135M")


@contextmanager
def _running(catalog: Catalog, accounts: Accounts) -> Iterator[httpx.Client]:
    gateway = Gateway(catalog, accounts, GatewayConfig(port=0))
    server = WebServer(make_app(gateway))

    async def run(*, task_status: TaskStatus[str]) -> None:
        with listen(gateway.config.host, gateway.config.port) as (ear, url):
            async with gateway:
                task_status.started(url)
                await server.run(ear)

    with start_blocking_portal() as portal:
        life, url = portal.start_task(run)
        headers = {"Authorization": f"Bearer {accounts.make(KeyConfig()).text}"}
        with httpx.Client(base_url=url, headers=headers, timeout=120, verify=False) as http:
            yield http
        server.stop()
        life.result()


def _overhead(offer: Offer, http: httpx.Client) -> list[Row]:
    """Compare the time from the first token to the last, turn by turn, so that both see the same machine."""
    library_s, gateway_s = [], []
    for number in range(ROUNDS):
        chat = [{"role": "user", "content": f"Count from {number} to a hundred, in words."}]
        text, token_s = _library(offer, chat)
        streamed = _stream(http, chat, max_tokens=TOKENS)
        if streamed.text != text:
            raise SystemExit(f"the gateway said {streamed.text!r}, and the library {text!r}")
        library_s.append(token_s)
        gateway_s.append(streamed.rest_s / (TOKENS - 1))
    library, gateway = statistics.median(library_s) * 1000, statistics.median(gateway_s) * 1000
    differences = [(one - other) * 1000 for one, other in zip(gateway_s, library_s, strict=True)]
    return [
        Row("a token by the library", library, "ms"),
        Row("a token by the gateway, streamed", gateway, "ms", "a token by the library", gateway / library),
        Row("what the gateway adds to a token", statistics.median(differences), "ms"),
    ]


def _library(offer: Offer, chat: list[dict[str, str]]) -> tuple[str, float]:
    tokens_BT = offer.tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    times_s: list[float] = []

    class Clock:
        def put(self, _: Any) -> None:
            times_s.append(time.perf_counter())

        def end(self) -> None:
            pass

    forever = {"eos_token_id": None, "do_sample": False, "max_new_tokens": TOKENS, "suppress_tokens": ENDS}
    with offer.model.session(tokens_BT.shape[1] + TOKENS) as session, torch.inference_mode():
        written_BT = offer.model.generate(
            tokens_BT, attention_mask=torch.ones_like(tokens_BT), session=session, streamer=Clock(), **forever
        )
    text = offer.decode(written_BT[0, tokens_BT.shape[1] :].tolist())
    return text, (times_s[-1] - times_s[1]) / (TOKENS - 1)  # the prompt is the first


class _Streamed:
    """When the pieces of an answer came, and what it was."""

    def __init__(self, text: str, first_s: float, rest_s: float, cached_tokens: int) -> None:
        self.text = text
        self.first_s = first_s
        self.rest_s = rest_s
        self.cached_tokens = cached_tokens


def _stream(http: httpx.Client, chat: list[dict[str, str]], max_tokens: int) -> _Streamed:
    said = {
        "model": MODEL,
        "messages": chat,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "logit_bias": {str(token): -100 for token in ENDS},
        "stream_options": {"include_usage": True},
    }
    began_s, times_s, text, cached = time.perf_counter(), [], "", 0
    with http.stream("POST", "/v1/chat/completions", json=said) as answer:
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            cached = (event.get("usage") or {}).get("prompt_tokens_details", {}).get("cached_tokens", cached)
            if event["choices"] and event["choices"][0]["delta"].get("content"):
                times_s.append(time.perf_counter())
                text += event["choices"][0]["delta"]["content"]
    return _Streamed(text, times_s[0] - began_s, times_s[-1] - times_s[0], cached)


def _turns(http: httpx.Client) -> list[Row]:
    first_s, turn_s, shares = [], [], []
    for number in range(3):
        chat = [{"role": "user", "content": f"{number}: {PROMPT}"}]
        first = _stream(http, chat, max_tokens=8)
        chat += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "Go on."}]
        turn = _stream(http, chat, max_tokens=8)
        first_s.append(first.first_s)
        turn_s.append(turn.first_s)
        shares.append(turn.cached_tokens)
    first_ms, turn_ms = statistics.median(first_s) * 1000, statistics.median(turn_s) * 1000
    return [
        Row("first piece of a chat of 370 tokens", first_ms, "ms"),
        Row("first piece of its next turn", turn_ms, "ms", "first piece of a chat of 370 tokens", turn_ms / first_ms),
        Row("tokens of that turn that servers knew", statistics.median(shares), "tokens"),
    ]


if __name__ == "__main__":
    main()
