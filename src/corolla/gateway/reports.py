"""What is told beside an answer: whose it is, where it was computed, how fast, and what was survived on the way."""

import secrets
import time
from typing import Any

from corolla.gateway.generation import Answer
from corolla.terms import Hop

__all__ = ["chain_report", "head", "report", "server_timing", "usage"]

_LETTERS = 8  # of a peer's id, as people know it


def head(prefix: str, kind: str, model: str) -> dict[str, Any]:
    """Make what every body and every event of an answer begins with.

    Args:
        prefix: Of its id.
        kind: What OpenAI calls such an object.
        model: Which model was asked for.
    """
    return {"id": f"{prefix}-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": model}


def report(answer: Answer) -> dict[str, Any]:
    """Tell of an answer: OpenAI's API has no field for it, so it is one of Corolla's.

    Args:
        answer: The answer, which is over.
    """
    return {
        "chain": chain_report(answer),
        "first_token_s": round(answer.first_s, 4),
        "tokens_per_s": round((answer.tokens - 1) / answer.rest_s, 2) if answer.rest_s and answer.tokens > 1 else None,
        "cached_tokens": answer.cached_tokens,
        "replays": [
            {**_hop(replay.hop), "tokens": replay.tokens, "elapsed_s": round(replay.elapsed_s, 4)}
            for replay in answer.replays
        ],
    }


def chain_report(answer: Answer) -> list[dict[str, Any]]:
    """Tell which servers compute an answer, and where the time of its latest step went.

    Args:
        answer: The answer so far.
    """
    timings = {} if answer.session is None else {one.hop: one for one in answer.session.timings}
    chain = []
    for hop in answer.chain.hops if answer.chain else ():
        told = _hop(hop)
        if hop in timings:
            for name in ("compute", "queue", "network"):
                told[f"{name}_ms"] = round(getattr(timings[hop], f"{name}_s") * 1000, 2)
        chain.append(told)
    return chain


def server_timing(answers: list[Answer]) -> str:
    """Write the ``Server-Timing`` header of some answers, which browsers show."""
    parts = []
    for answer in answers:
        said = report(answer)
        parts += [f"first;dur={answer.first_s * 1000:.1f}", f"rest;dur={answer.rest_s * 1000:.1f}"]
        for hop in said["chain"]:
            took = sum(hop.get(f"{name}_ms", 0.0) for name in ("compute", "queue", "network"))
            parts.append(f'hop;desc="{hop["peer"][:_LETTERS]} {hop["span"][0]}:{hop["span"][1]}";dur={took:.1f}')
        parts += [f'speed;desc="{said["tokens_per_s"]} tokens/s"', f'replays;desc="{len(said["replays"])}"']
    return ", ".join(parts)


def usage(answers: list[Answer], prompt_tokens: int) -> dict[str, Any]:
    """Count the tokens of some answers.

    Args:
        answers: The answers.
        prompt_tokens: How many their prompts have, each counted once.
    """
    written = sum(answer.tokens for answer in answers)
    cached = max((answer.cached_tokens for answer in answers), default=0)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": written,
        "total_tokens": prompt_tokens + written,
        "prompt_tokens_details": {"cached_tokens": min(cached, prompt_tokens)},
    }


def _hop(hop: Hop) -> dict[str, Any]:
    return {"peer": hop.peer, "span": [hop.span.start, hop.span.stop]}
