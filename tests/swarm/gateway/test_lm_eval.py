"""lm-eval's clients of OpenAI's API against the gateway; runs where lm-eval is installed: ``make lm-eval``."""

import json

import pytest

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval, which is large: make lm-eval")

QUESTIONS = [
    {"question": "ab", "answers": ["c", "d"], "right": 0},
    {"question": "xy", "answers": ["z", "w"], "right": 1},
]


@pytest.fixture
def offline(monkeypatch, tmp_path, running):
    monkeypatch.setenv("OPENAI_API_KEY", running.key)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, QUESTIONS)))
    return {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}, "test_split": "test"}


def evaluate(running, kind, path, task, **more):
    arguments = {"model": running.model, "base_url": running.url + path, "num_concurrent": 1, "max_retries": 1}
    found = lm_eval.simple_evaluate(
        model=kind,
        model_args=arguments | {"tokenizer_backend": "huggingface", "tokenizer": running.model},
        tasks=[task],
        bootstrap_iters=0,
        **more,
    )
    return found["results"][task["task"]]


@pytest.mark.filterwarnings("default")
def test_local_completions_scores_answers(running, offline):
    task = offline | {
        "task": "choices",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{answers}}",
        "doc_to_target": "right",
        "metric_list": [{"metric": "acc"}],
    }
    assert evaluate(running, "local-completions", "/v1/completions", task)["acc,none"] in (0, 0.5, 1)


@pytest.mark.filterwarnings("default")
def test_local_chat_completions_generates_answers(running, offline):
    task = offline | {
        "task": "chats",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answers[right]}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 8, "temperature": 0},
        "metric_list": [{"metric": "exact_match"}],
    }
    found = evaluate(running, "local-chat-completions", "/v1/chat/completions", task, apply_chat_template=True)
    assert 0 <= found["exact_match,none"] <= 1
