"""A server keeps what clients send for its blocks: as long as there is room, and only what fits."""

# R ranks, I inputs, O outputs

from contextlib import ExitStack

import pytest
import torch

from corolla.codec import AdapterParts, encode_adapter
from corolla.errors import AdapterMissing, CapacityError, CodecError, RemoteProtocolError, UsageError
from corolla.server.adapters import AdapterStore
from corolla.terms import ModelId, Span
from corolla.wire import Adapt

pytestmark = pytest.mark.anyio

MODEL = ModelId("ab" * 32)


@pytest.fixture(scope="module")
def span():
    from corolla.blocks import build_tiny, split_model
    from corolla.blocks.zoo import default_config

    return split_model(build_tiny(default_config("llama")), [Span(0, 4)], is_packable=True)[0]


def pair(name="self_attn.q_proj", ranks=2, inputs=64, outputs=64, seed=0, scaling=1.0):
    generator = torch.Generator().manual_seed(seed)
    down_RI = torch.randn(ranks, inputs, generator=generator)
    return name, down_RI, torch.randn(outputs, ranks, generator=generator), scaling


def sent(*parts, blocks=None):
    encoded = [encode_adapter(one) for one in parts]
    message = Adapt(model=MODEL, blocks=blocks or tuple(range(len(parts))), metas=tuple(one.meta for one in encoded))
    payload = b"".join(bytes(buffer) for one in encoded for buffer in one.buffers)
    return message, memoryview(bytearray(payload)), [one.hash for one in encoded]


def lora(seed=0, **changes):
    return AdapterParts([pair(seed=seed, **changes)], None)


async def test_what_was_sent_is_lent_by_its_hash(span):
    store = AdapterStore(1 << 20)
    message, payload, hashes = sent(lora(0), lora(1))
    await store.take(span, message, payload)
    with store.lend(span, Span(0, 3), (*hashes, b"")) as adapter:
        assert sorted(adapter.blocks) == [0, 1]
        assert torch.equal(adapter.blocks[1].pairs[0].down_RI, pair(seed=1)[1])
    with store.lend(span, Span(0, 3), ()) as adapter:
        assert adapter is None


async def test_sending_the_same_again_takes_no_more_room(span):
    store = AdapterStore(1 << 20)
    for _ in range(3):
        message, payload, _ = sent(lora())
        await store.take(span, message, payload)
    assert store.used_bytes == 2 * 64 * 2 * 4


async def test_nobody_can_put_something_else_in_the_place_of_a_hash(span):
    store = AdapterStore(1 << 20)
    message, payload, (name,) = sent(lora())
    payload[0] ^= 1
    await store.take(span, message, payload)
    with (
        pytest.raises(AdapterMissing, match=r"adapters of blocks \[0\] are not here"),
        store.lend(span, Span(0, 1), (name,)),
    ):
        pass


async def test_the_longest_unused_leaves_first_and_what_is_lent_stays(span):
    store = AdapterStore(2 * 1024)
    names = []
    for seed in range(2):
        message, payload, (name,) = sent(lora(seed))
        await store.take(span, message, payload)
        names.append(name)
    with ExitStack() as lending:
        lending.enter_context(store.lend(span, Span(0, 1), (names[0],)))
        for seed in (2, 3):
            await store.take(span, *sent(lora(seed))[:2])
        lending.enter_context(store.lend(span, Span(0, 1), (names[0],)))
        with pytest.raises(AdapterMissing), store.lend(span, Span(0, 1), (names[1],)):
            pass
        with pytest.raises(CapacityError, match="2048 lent to adapters 1024 are in use"):
            await store.take(span, *sent(lora(4, ranks=4))[:2])
    await store.take(span, *sent(lora(4, ranks=4))[:2])


async def test_what_a_server_hosts_never_leaves(span):
    store = AdapterStore(1024)
    store.host(span, "mine", {2: encode_adapter(lora())})
    with pytest.raises(CapacityError):
        await store.take(span, *sent(lora(1))[:2])
    with store.lend(span, Span(2, 3), (encode_adapter(lora()).hash,)) as adapter:
        assert sorted(adapter.blocks) == [2]
    assert store.hosted == ("mine",)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (lora(name="self_attn.r_proj"), "layer 'self_attn.r_proj', which block 0 does not have.*self_attn.q_proj"),
        (lora(name="mlp"), "layer 'mlp', which block 0 does not have"),
        (
            lora(inputs=32),
            r"shapes \[2, 32\] and \[64, 2\]; in block 0 it takes 64 numbers to 64: was the adapter made",
        ),
        (lora(outputs=65), r"in block 0 it takes 64 numbers to 64"),
        (AdapterParts([], (torch.zeros(3, 5, 16),) * 2), "prefix of block 0 has 3 heads of 16 .* stores"),
        (AdapterParts([pair(scaling=float("nan"))], None), "infinite or none at all"),
        (AdapterParts([(*pair()[:1], torch.full((2, 64), torch.inf), *pair()[2:])], None), "infinite or none at all"),
    ],
)
async def test_what_does_not_fit_a_block_is_refused_by_name(span, parts, words):
    store = AdapterStore(1 << 20)
    with pytest.raises(UsageError, match=words):
        await store.take(span, *sent(parts)[:2])
    assert store.used_bytes == 0


async def test_a_hash_may_be_used_only_for_blocks_that_it_fits(span):
    store = AdapterStore(1 << 20)
    message, payload, (name,) = sent(lora(), blocks=(3,))
    await store.take(span, message, payload)
    with store.lend(span, Span(1, 2), (name,)) as adapter:
        assert sorted(adapter.blocks) == [1]


async def test_messages_that_do_not_add_up_are_refused(span):
    store = AdapterStore(1 << 20)
    message, payload, (name,) = sent(lora())
    with pytest.raises(RemoteProtocolError, match="1 adapters came for 2 blocks"):
        await store.take(span, Adapt(model=MODEL, blocks=(0, 1), metas=message.metas), payload)
    with pytest.raises((CodecError, RemoteProtocolError)):
        await store.take(span, message, payload[:-4])
    with (
        pytest.raises(RemoteProtocolError, match="1 adapters were named for 2 blocks"),
        store.lend(span, Span(0, 2), (name,)),
    ):
        pass


async def test_prefixes_of_different_lengths_cannot_be_run_together(span):
    store = AdapterStore(1 << 20)
    heads, width = span.kv_shapes[0].heads, span.kv_shapes[0].key_width
    parts = [AdapterParts([], (torch.zeros(heads, tokens, width),) * 2) for tokens in (2, 3)]
    message, payload, names = sent(*parts)
    await store.take(span, message, payload)
    with pytest.raises(UsageError, match=r"prefixes of \[2, 3\] tokens"), store.lend(span, Span(0, 2), names):
        pass
