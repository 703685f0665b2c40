"""What the gateway costs over the client library, and what a kept session saves.

One server process on this machine; the gateway runs in this process, on threads of its own, over the very model object
that the library's side uses. The two take turns, each going first as often as the other, with the same chat, greedily;
their tokens must be the same. A token's time is the lower quartile of the times between tokens of an answer, which
others on this machine disturb least, and what the gateway adds is the median, over the rounds, of the differences
within a round. With a tiny model, whose steps take a few milliseconds, it can be seen; with SmolLM2-135M the time of a
step itself varies by more. Processor time is the process's, without what whoever asks for the answer spends.

Give it a quiet machine and, where possible, real-time priority: ``chrt -r 5 python -m bench gateway``.
"""

import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

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
from corolla.testing import LocalSwarm, save_tiny_model

__all__ = ["main"]

SMOLLM2 = "smollm2"
TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
PROMPT = "Tell me about the history of the bicycle, " * 40


class Task(NamedTuple):
    """What both sides are asked.

    Args:
        name: What the model is called in the report.
        rounds: How often.
        tokens: How many tokens an answer has.
    """

    name: str
    rounds: int
    tokens: int


class Answered(NamedTuple):
    """An answer, and when it came.

    Args:
        text: What it was.
        at_s: When each token came that says something, by a clock that began with the question.
        cpu_s: The processor time that this process has spent on it.
        cached_tokens: How many tokens of its prompt the servers knew.
    """

    text: str
    at_s: list[float]
    cpu_s: float
    cached_tokens: int = 0

    @property
    def token_s(self) -> float:
        """The lower quartile of the times from one token to the next."""
        return statistics.quantiles(later - earlier for earlier, later in itertools.pairwise(self.at_s))[0]


def main() -> None:
    """Measure and report."""
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        tiny = str(save_tiny_model(Path(folder) / "tiny", context_tokens=2048, chat_template=TEMPLATE))
        with _both(tiny, "0:4", folder) as (offer, http):
            rows += _overhead(offer, http, Task("tiny model", 16, 150))
        with _both(SMOLLM2, "0:30", folder) as (offer, http):
            rows += [*_overhead(offer, http, Task("SmolLM2", 12, 40)), *_turns(offer, http)]
    write_report("gateway", rows, "The gateway over the client library: one server")


@contextmanager
def _both(model: str, span: str, folder: str) -> Iterator[tuple[Offer, httpx.Client]]:
    """Have a model of a swarm for the library, and a gateway that offers it."""
    with (
        LocalSwarm(model, [span], "--threads", "1", "--no-lan", logs=Path(folder)) as servers,
        Swarm(servers.wait_until_online().address) as swarm,
        closing(Accounts(Path(folder) / "keys.sqlite")) as accounts,
    ):
        catalog = Catalog.load([model], swarm, hub=HubConfig(), report=stay_silent)
        with _running(catalog, accounts) as http:
            yield catalog.find(model), http


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


def _overhead(offer: Offer, http: httpx.Client, task: Task) -> list[Row]:
    """Have both answer the same chats in turn."""
    _check_tokens(offer, http, task)
    library_ms, gateway_ms, added_cpu_ms = [], [], []
    for number in range(2, 2 + task.rounds):
        chat = _chat(number)
        if number % 2:
            streamed, own = _stream(offer, http, chat, task.tokens), _library(offer, chat, task.tokens)[0]
        else:
            own, streamed = _library(offer, chat, task.tokens)[0], _stream(offer, http, chat, task.tokens)
        if streamed.text != own.text:
            raise SystemExit(f"the gateway said {streamed.text!r}, and the library {own.text!r}")
        if len(streamed.at_s) != len(own.at_s):
            raise SystemExit(f"{len(streamed.at_s)} pieces came of {len(own.at_s)} tokens that say something")
        library_ms.append(own.token_s * 1000)
        gateway_ms.append(streamed.token_s * 1000)
        added_cpu_ms.append((streamed.cpu_s - own.cpu_s) / task.tokens * 1000)
    library, gateway = statistics.median(library_ms), statistics.median(gateway_ms)
    low, middle, high = statistics.quantiles([ours - own for ours, own in zip(gateway_ms, library_ms, strict=True)])
    by_library = f"{task.name}: a token by the library"
    return [
        Row(by_library, library, "ms"),
        Row(f"{task.name}: a token by the gateway, streamed", gateway, "ms", by_library, gateway / library),
        Row(f"{task.name}: what the gateway adds to a token", middle, "ms"),
        Row(f"{task.name}: the same, lower quartile of the rounds", low, "ms"),
        Row(f"{task.name}: the same, upper quartile of the rounds", high, "ms"),
        Row(f"{task.name}: what it adds in processor time", statistics.median(added_cpu_ms), "ms"),
    ]


def _chat(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Write a long story about {number} bicycles."}]


def _check_tokens(offer: Offer, http: httpx.Client, task: Task) -> None:
    """See that both choose the same tokens, one by one; it warms both up as well."""
    chat = _chat(1)
    said = {"model": offer.name, "messages": chat, "max_tokens": task.tokens, "temperature": 0, "logprobs": True}
    answer = http.post("/v1/chat/completions", json=said).raise_for_status().json()
    theirs = [one["token"] for one in answer["choices"][0]["logprobs"]["content"]]
    own = [offer.decode([token], skip_special=False) for token in _library(offer, chat, task.tokens)[1]]
    if theirs != own:
        raise SystemExit(f"the gateway chose {theirs}, and the library {own}")


def _library(offer: Offer, chat: list[dict[str, str]], max_tokens: int) -> tuple[Answered, list[int]]:
    tokens_BT = offer.tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    at_s: list[float] = []

    class Clock:
        def put(self, _: Any) -> None:
            at_s.append(time.perf_counter() - began_s)

        def end(self) -> None:
            pass

    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    with offer.model.session(tokens_BT.shape[1] + max_tokens) as session, torch.inference_mode():
        written_BT = offer.model.generate(
            tokens_BT,
            attention_mask=torch.ones_like(tokens_BT),
            session=session,
            streamer=Clock(),
            do_sample=False,
            max_new_tokens=max_tokens,
        )
    cpu_s = time.process_time() - began_cpu_s
    tokens = written_BT[0, tokens_BT.shape[1] :].tolist()
    heard_s = zip(tokens, at_s[1:], strict=True)  # the first thing put is the prompt
    return Answered(offer.decode(tokens), [when_s for token, when_s in heard_s if offer.decode([token])], cpu_s), tokens


def _stream(offer: Offer, http: httpx.Client, chat: list[dict[str, str]], max_tokens: int) -> Answered:
    """Ask, and note when bytes come; what they say is read afterwards, so that reading costs the answer no time."""
    said = {
        "model": offer.name,
        "messages": chat,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began_s, began_cpu_s, began_here_s = time.perf_counter(), time.process_time(), time.thread_time()
    with http.stream("POST", "/v1/chat/completions", json=said) as answer:
        came = [(time.perf_counter() - began_s, some) for some in answer.iter_raw()]
    cpu_s = time.process_time() - began_cpu_s - (time.thread_time() - began_here_s)
    at_s, text, cached, unread = [], "", 0, b""
    for when_s, some in came:
        *lines, unread = (unread + some).split(b"\n")
        for line in lines:
            event = json.loads(line[6:]) if line.startswith(b"data: {") else {"choices": []}
            cached = (event.get("usage") or {}).get("prompt_tokens_details", {}).get("cached_tokens", cached)
            if event["choices"] and event["choices"][0]["delta"].get("content"):
                at_s.append(when_s)
                text += event["choices"][0]["delta"]["content"]
    return Answered(text, at_s, cpu_s, cached)


def _turns(offer: Offer, http: httpx.Client) -> list[Row]:
    first_s, turn_s, shares = [], [], []
    for number in range(3):
        chat = [{"role": "user", "content": f"{number}: {PROMPT}"}]
        first = _stream(offer, http, chat, 8)
        chat += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "Go on."}]
        turn = _stream(offer, http, chat, 8)
        first_s.append(first.at_s[0])
        turn_s.append(turn.at_s[0])
        shares.append(turn.cached_tokens)
    first_ms, turn_ms = statistics.median(first_s) * 1000, statistics.median(turn_s) * 1000
    return [
        Row("first piece of a chat of 370 tokens", first_ms, "ms"),
        Row("first piece of its next turn", turn_ms, "ms", "first piece of a chat of 370 tokens", turn_ms / first_ms),
        Row("tokens of that turn that servers knew", statistics.median(shares), "tokens"),
    ]


if __name__ == "__main__":
    main()
