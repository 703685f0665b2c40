"""Snapshots for the tests of this folder."""

from corolla.routing import Demand
from corolla.terms import Announcement, ModelId, PeerId, Snapshot, Span, Speed

MODEL = ModelId("0" * 64)
BLOCKS = 8
LETTERS = "abcdefghijklmnopqrstuvwxyz234567"


def peer(number):
    return PeerId("".join(LETTERS[number // 32**place % 32] for place in range(3)).ljust(52, "a"))


def server(number, span=f"0:{BLOCKS}", tokens_per_s=10.0, **changes):
    fields = {
        "peer": peer(number),
        "sequence": 1,
        "ttl_s": 10.0,
        "model": MODEL,
        "model_name": "",
        "num_blocks": BLOCKS,
        "span": Span.parse(span),
        "state": "online",
        "precision": "float32",
        "addresses": (),
        "speed": Speed(decode_tokens_per_s=tokens_per_s, prefill_tokens_per_s=10 * tokens_per_s),
        "free_tokens": 1000,
    }
    return Announcement(**fields | changes)


def snapshot(*servers):
    return Snapshot(announcements=tuple(servers))


def demand(**changes):
    return Demand(**{"model": MODEL, "span": Span(0, BLOCKS)} | changes)
