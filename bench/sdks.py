"""SmolLM2 through the gateway by the clients that people have: OpenAI's, LangChain's, and lm-eval's two.

Three server processes share the blocks of SmolLM2-135M. lm-eval scores the same questions through the gateway and by
its own backend, transformers in this process: the scores must be the same. Where lm-eval is not installed its rows are
left out; ``make lm-eval`` installs it.
"""

import importlib
import importlib.util
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import openai
from langchain_openai import ChatOpenAI

from bench.report import Row, write_report
from bench.streams import GatewayProcess, run_gateway
from corolla.hub import HubConfig
from corolla.hub.demo import demo_directory
from corolla.testing import LocalSwarm

__all__ = ["main"]

MODEL = "smollm2"
SPANS = ["0:10", "10:20", "20:30"]
ARGUMENTS = ("--threads", "1", "--no-lan", "--precision", "float32")
CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Egypt": "Cairo", "Spain": "Madrid", "Greece": "Athens",
    "Germany": "Berlin", "Austria": "Vienna", "Poland": "Warsaw", "Russia": "Moscow", "China": "Beijing",
    "Peru": "Lima", "Cuba": "Havana", "Kenya": "Nairobi", "Norway": "Oslo", "Portugal": "Lisbon",
}  # fmt: skip
QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]


def main() -> None:
    """Ask, score, and report."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (
            LocalSwarm(MODEL, SPANS, *ARGUMENTS, logs=folder) as servers,
            run_gateway(MODEL, servers.wait_until_online().address, folder) as gateway,
        ):
            rows = [*openai_rows(gateway), *langchain_rows(gateway)]
            if importlib.util.find_spec("lm_eval") is not None:
                rows += evaluation_rows(gateway, folder)
    write_report("sdks", rows, "SmolLM2-135M over three servers, by other people's clients")


def openai_rows(gateway: GatewayProcess) -> list[Row]:
    """Ask with the official client, whole and streamed."""
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.key, timeout=300) as client:
        whole = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=24)
        pieces = client.chat.completions.create(
            model=MODEL, messages=QUESTION, temperature=0, max_tokens=24, stream=True
        )
        streamed = "".join(piece.choices[0].delta.content or "" for piece in pieces)
        vectors = client.embeddings.create(model=MODEL, input=["Paris", "Rome"]).data
    text = whole.choices[0].message.content or ""
    print(f"openai: {text!r}")
    return [
        Row("openai: the answer names Paris", float("Paris" in text), ""),
        Row("openai: streamed, the same text comes", float(streamed == text), ""),
        Row("openai: embeddings, numbers each", len(vectors[0].embedding), ""),
    ]


def langchain_rows(gateway: GatewayProcess) -> list[Row]:
    """Ask with LangChain's client."""
    options: dict[str, Any] = {"base_url": f"{gateway.url}/v1", "api_key": gateway.key}
    chat = ChatOpenAI(model=MODEL, temperature=0, max_completion_tokens=24, **options)
    whole = str(chat.invoke(QUESTION[0]["content"]).content)
    streamed = "".join(str(piece.content) for piece in chat.stream(QUESTION[0]["content"]))
    print(f"langchain: {whole!r}")
    return [
        Row("langchain: the answer names Paris", float("Paris" in whole), ""),
        Row("langchain: streamed, the same text comes", float(streamed == whole), ""),
    ]


def evaluation_rows(gateway: GatewayProcess, folder: Path) -> list[Row]:
    """Have lm-eval score the gateway, and transformers in this process."""
    os.environ.update(OPENAI_API_KEY=gateway.key, HF_DATASETS_CACHE=str(folder / "datasets"), HF_HUB_OFFLINE="1")
    directory = str(demo_directory(HubConfig()))
    file = folder / "capitals.jsonl"
    names = list(CAPITALS.values())
    questions = [
        {"country": country, "answers": [names[(at + step) % len(names)] for step in range(4)], "right": 0}
        for at, country in enumerate(CAPITALS)
    ]
    file.write_text("\n".join(map(json.dumps, questions)))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}, "test_split": "test"}
    choices = data | {
        "task": "capitals",
        "output_type": "multiple_choice",
        "doc_to_text": "The capital of {{country}} is",
        "doc_to_choice": "{{answers}}",
        "doc_to_target": "right",
        "metric_list": [{"metric": "acc"}],
    }
    named = {"function": "regex", "regex_pattern": f"({'|'.join(names)})"}
    chats = data | {
        "task": "capitals_chat",
        "output_type": "generate_until",
        "doc_to_text": "Name the capital of {{country}} in one word.",
        "doc_to_target": "{{answers[right]}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 12, "temperature": 0, "do_sample": False},
        "filter_list": [{"name": "named", "filter": [named]}],
        "metric_list": [{"metric": "exact_match"}],
    }
    served = {"model": MODEL, "tokenizer_backend": "huggingface", "tokenizer": directory, "max_retries": 1}
    local = {"pretrained": directory, "dtype": "float32", "device": "cpu"}
    found = []
    for task, kind, path in (
        (choices, "local-completions", "/v1/completions"),
        (chats, "local-chat-completions", "/v1/chat/completions"),
    ):
        through = score(kind, served | {"base_url": gateway.url + path, "num_concurrent": 2}, task)
        own = score("hf", local, task)
        found += [
            Row(f"lm-eval hf, {task['task']}", own, "of 1"),
            Row(f"lm-eval {kind}, {task['task']}", through, "of 1", f"lm-eval hf, {task['task']}", through / own),
        ]
    return found


def score(kind: str, arguments: dict[str, Any], task: dict[str, Any]) -> float:
    """Let lm-eval score one task with one of its clients."""
    lm_eval = importlib.import_module("lm_eval")

    found = lm_eval.simple_evaluate(
        model=kind,
        model_args=arguments,
        tasks=[task],
        bootstrap_iters=0,
        apply_chat_template=task["task"].endswith("chat"),
    )["results"][task["task"]]
    return float(next(value for name, value in found.items() if name.split(",")[0] in {"acc", "exact_match"}))


if __name__ == "__main__":
    main()
