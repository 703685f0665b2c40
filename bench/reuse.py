"""What a session takes that begins like another: a system prompt that many share, and the second turn of a chat.

SmolLM2-135M-Instruct through three servers in processes of their own, one thread each. Each round has texts of its own,
and asks for one token: with a prompt that is new, with one that differs from it in the question only, and with the
whole of the first, its answer and another question, as the second turn of a chat does in a new session.
"""

# B batch, T tokens

import statistics
import time
from typing import Any

import torch

from bench.report import Row, write_report
from bench.speed import BLOCKS, MODEL, swarm_of

__all__ = ["main"]

SYSTEM_TOKENS = 1024
QUESTION_TOKENS = 40
ANSWER_TOKENS = 48
ROUNDS = 3
HOPS = 3


def main() -> None:
    """Measure, print the table, write the report."""
    taken: dict[str, list[tuple[int, float, int]]] = {}
    with swarm_of(HOPS, "float32", sharing="client") as (model, _):
        first_token(model, texts(model, 0, 64))  # the first step sets things up
        for round_ in range(1, ROUNDS + 1):
            system = texts(model, 10 * round_, SYSTEM_TOKENS)
            questions = [texts(model, 10 * round_ + one, QUESTION_TOKENS) for one in (1, 2, 3)]
            first = torch.cat((system, questions[0]), 1)
            taken.setdefault("a new prompt", []).append(first_token(model, first))
            second = torch.cat((system, questions[1]), 1)
            taken.setdefault("its system prompt, another question", []).append(first_token(model, second))
            answer = model.generate(first, max_new_tokens=ANSWER_TOKENS, min_new_tokens=ANSWER_TOKENS, do_sample=False)
            third = torch.cat((answer, questions[2]), 1)
            taken.setdefault("the second turn of its chat", []).append(first_token(model, third))
    rows: list[Row] = []
    for name, runs in taken.items():
        tokens, seconds, computed = (statistics.median(column) for column in zip(*runs, strict=True))
        versus = None if not rows else rows[1].metric
        base_s = seconds if not rows else rows[1].value
        rows.append(Row(f"{name}: tokens", tokens, "tokens"))
        rows.append(Row(f"{name}: until the first token", seconds, "s", versus, seconds / base_s if versus else None))
        rows.append(Row(f"{name}: computed by each server", computed, "tokens"))
    title = f"{MODEL}, {BLOCKS} blocks on {HOPS} servers of 1 thread, float32, medians of {ROUNDS} rounds"
    write_report("reuse", rows, title)


def first_token(model: Any, prompt_BT: torch.Tensor) -> tuple[int, float, int]:
    """Ask for a token in a new session; tell the prompt's tokens, when it came, and how many each server computed."""
    with model.session(prompt_BT.shape[1] + 1) as session:
        began_s = time.perf_counter()
        model.generate(prompt_BT, session=session, max_new_tokens=1, do_sample=False)
        elapsed_s = time.perf_counter() - began_s
        found = {timing.found_tokens for timing in session.timings}
        if len(found) != 1:
            raise RuntimeError(f"servers have found different beginnings: {found}")
    return prompt_BT.shape[1], elapsed_s, prompt_BT.shape[1] - found.pop()


def texts(model: Any, seed: int, tokens: int) -> torch.Tensor:
    """Make up a text."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(100, model.config.vocab_size, (1, tokens), generator=generator)
