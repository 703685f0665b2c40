"""Strategies for every message that peers may send."""

from hypothesis import strategies as st

from corolla.terms import Span
from corolla.wire import (
    Accept,
    Ack,
    Adapt,
    AdapterMeta,
    Backward,
    Closed,
    CloseSession,
    Connect,
    Connected,
    DialBack,
    DialedBack,
    Done,
    Expect,
    Failure,
    Feed,
    Forward,
    Gradients,
    Greeting,
    HandedOver,
    HandOver,
    Incoming,
    Leaving,
    Load,
    News,
    Observe,
    Observed,
    OpenSession,
    Output,
    PairMeta,
    Ping,
    Pong,
    PrefixMeta,
    Publish,
    Punch,
    Punched,
    Record,
    Redirect,
    Redirected,
    Reserve,
    Reserved,
    Restore,
    Restored,
    Resume,
    SessionOpened,
    Step,
    Subscribe,
    Successor,
    Suspicion,
    TensorMeta,
    Timing,
)
from corolla.wire.shelves import FetchPiece, FindAdapters, FoundAdapters, OfferAdapter, Piece, PutPiece, Wanted

COUNT = st.integers(0, 2**53)
WHOLE = st.integers(-(2**63), 2**64 - 1)  # those that MessagePack knows
TOKENS = st.integers(0, 1 << 20)
SECONDS = st.floats(0, 1e9)
NAME = st.text(max_size=32)
MODEL = st.text("0123456789abcdef", min_size=64, max_size=64)
ADAPTER_FILE = st.sampled_from(["adapter_config.json", "adapter_model.safetensors"])
SPAN = st.builds(lambda start, size: Span(start, start + size), st.integers(0, 4000), st.integers(1, 96))
SHAPE = st.lists(st.integers(1, 2**31 - 1), min_size=1, max_size=4).map(tuple)
TENSOR = st.builds(TensorMeta, NAME, st.sampled_from(["float32", "bfloat16", "float16"]), SHAPE, COUNT)
TIMING = st.builds(Timing, SECONDS, SECONDS)
LOAD = st.builds(Load, COUNT, COUNT)
PEER = st.text("abcdefghijklmnopqrstuvwxyz234567", min_size=52, max_size=52)
SIGNATURE = st.binary(min_size=64, max_size=64)
KEY = st.binary(min_size=32, max_size=32)
RECORD = st.builds(Record, st.binary(max_size=64), SIGNATURE, SECONDS, st.none() | st.binary(max_size=64))
SUSPICION = st.builds(Suspicion, KEY, COUNT, KEY, SIGNATURE)
IDS = st.binary(max_size=64)


TICKET = st.binary(min_size=16, max_size=16)
KNOCKS = st.lists(NAME, max_size=2).map(tuple)


def some(element, least=0):
    return st.lists(element, min_size=least, max_size=4).map(tuple)


def tensors(least, most=4):
    return st.lists(TENSOR, min_size=least, max_size=most).map(tuple)


TOKEN = st.binary(min_size=16, max_size=16)
SUCCESSOR = st.builds(Successor, PEER, some(st.text(max_size=16)), TOKEN, st.booleans())
RAW = st.none() | st.binary(max_size=16)
HASHES = some(st.binary(max_size=32))
SIZE = st.integers(1, 2**24)
PAIR = st.builds(PairMeta, st.text(min_size=1, max_size=32), SIZE, SIZE, SIZE, SECONDS)
ADAPTER = st.builds(AdapterMeta, some(PAIR), st.none() | st.builds(PrefixMeta, SIZE, SIZE, SIZE, SIZE))
RUN = {
    "model": MODEL,
    "span": SPAN,
    "codec": NAME,
    "attention_mask": RAW,
    "position_ids": RAW,
    "taps": some(COUNT),
    "adapters": HASHES,
}
PLAIN = (Ack, Redirected, Ping, Pong, CloseSession, Closed, Subscribe, Observe, Reserve, Reserved, Connected)
MESSAGES = {
    **{kind: st.builds(kind) for kind in PLAIN},
    Failure: st.builds(
        Failure, code=NAME, message=st.text(max_size=64), retry_after_s=st.none() | SECONDS, number=COUNT
    ),
    Greeting: st.builds(
        Greeting, proof=st.binary(max_size=512), number=st.integers(-1, 2**53), revoked=st.none() | st.binary()
    ),
    OpenSession: st.builds(
        OpenSession,
        model=MODEL,
        span=SPAN,
        rows=st.integers(1, 1024),
        max_tokens=st.integers(1, 1 << 20),
        codec=NAME,
        token=st.none() | TOKEN,
        successor=st.none() | SUCCESSOR,
        key=st.none() | TOKEN,
        adapters=HASHES,
    ),
    SessionOpened: st.builds(SessionOpened, lease_s=SECONDS, taken=COUNT),
    Resume: st.builds(Resume, key=TOKEN, done=COUNT),
    Leaving: st.builds(Leaving, left_s=SECONDS),
    HandOver: st.builds(HandOver, heir=SUCCESSOR),
    HandedOver: st.builds(HandedOver, problem=st.text(max_size=64)),
    Restore: st.builds(Restore, row=st.integers(0, 1023), start=TOKENS, tensors=tensors(2), logged=st.none() | TENSOR),
    Restored: st.builds(Restored, lengths=some(TOKENS, 1), number=COUNT),
    Step: st.builds(
        Step,
        starts=some(TOKENS, 1),
        counts=some(TOKENS, 1),
        hidden=TENSOR,
        order=st.none() | some(st.integers(0, 1023)),
        taps=some(COUNT),
        number=COUNT,
        settled=COUNT,
    ),
    Output: st.builds(Output, tensors=tensors(1), timing=TIMING, number=COUNT, load=st.none() | LOAD),
    Done: st.builds(Done, timing=TIMING, number=COUNT, load=st.none() | LOAD),
    Expect: st.builds(Expect, token=TOKEN),
    Redirect: st.builds(Redirect, successor=SUCCESSOR),
    Feed: st.builds(Feed, token=TOKEN),
    Forward: st.builds(Forward, hidden=TENSOR, **RUN),
    Backward: st.builds(Backward, tensors=tensors(2), trains=st.booleans(), **RUN),
    Gradients: st.builds(Gradients, tensors=tensors(1, 2), timing=TIMING),
    FindAdapters: st.builds(FindAdapters, model=st.none() | MODEL, words=st.text(max_size=128)),
    FoundAdapters: st.builds(FoundAdapters, cards=some(st.binary(max_size=64))),
    FetchPiece: st.builds(FetchPiece, adapter=MODEL, file=st.none() | ADAPTER_FILE, start=COUNT),
    Piece: st.just(Piece()),
    OfferAdapter: st.builds(OfferAdapter, card=st.binary(max_size=64)),
    Wanted: st.builds(Wanted, is_wanted=st.booleans()),
    PutPiece: st.builds(PutPiece, file=ADAPTER_FILE),
    Adapt: st.builds(Adapt, model=MODEL, blocks=some(st.integers(0, 4095), 1), metas=some(ADAPTER, 1)),
    News: st.builds(
        News,
        ids=IDS,
        wanted=IDS,
        bodies=IDS,
        gone=IDS,
        records=some(RECORD),
        suspicions=some(SUSPICION),
        sums=IDS,
        listing=st.none() | st.dictionaries(st.integers(0, 1023), IDS, max_size=3),
        is_last=st.booleans(),
    ),
    Publish: st.builds(Publish, records=some(RECORD), suspicions=some(SUSPICION), is_whole=st.booleans()),
    Observed: st.builds(Observed, host=st.text(max_size=64), port=st.integers(0, 65535), unix_s=SECONDS),
    DialBack: st.builds(DialBack, port=st.integers(1, 65535)),
    DialedBack: st.builds(DialedBack, address=NAME, is_reached=st.booleans(), problem=NAME),
    Incoming: st.builds(Incoming, ticket=TICKET, peer=PEER),
    Connect: st.builds(Connect, peer=PEER),
    Accept: st.builds(Accept, ticket=TICKET),
    Punch: st.builds(Punch, addresses=KNOCKS),
    Punched: st.builds(Punched, addresses=KNOCKS),
}
