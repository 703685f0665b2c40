"""Every request is answered, a refusal with its reason; what a session held comes back however it ends."""

# N packed tokens, D model width

import itertools
import re
import threading
from contextlib import contextmanager

import anyio
import pytest
import torch

from corolla.codec import encode
from corolla.errors import (
    CacheFull,
    CodecError,
    ContextTooLong,
    NotFinite,
    OutdatedView,
    PeerBusy,
    PeerFailed,
    PeerLost,
    PeerTimeout,
    RemoteProtocolError,
    SessionExpired,
    UsageError,
)
from corolla.server.limits import PeerLimits
from corolla.terms import Span
from corolla.wire import (
    Backward,
    Closed,
    CloseSession,
    Done,
    Failure,
    Forward,
    Gradients,
    OpenSession,
    Output,
    Ping,
    Pong,
    SessionOpened,
    Step,
    TensorMeta,
    Timing,
)

pytestmark = pytest.mark.anyio

MODEL = "ab" * 32
WIDTH = 64


def opening(**changes):
    fields = {"model": MODEL, "span": Span(0, 4), "rows": 1, "max_tokens": 32, "codec": "raw"}
    return OpenSession(**fields | changes)


def step(tokens=3, start=0, width=WIDTH, **changes):
    hidden_ND = torch.ones(tokens, width)
    encoded = encode(hidden_ND, "raw")
    fields = {"starts": (start,), "counts": (tokens,), "hidden": encoded.meta, "number": 1}
    return Step(**fields | changes), encoded.buffers


def forward(tokens=3, width=WIDTH, **changes):
    encoded = encode(torch.ones(1, tokens, width), "raw")
    return Forward(**{"model": MODEL, "span": Span(0, 4), "hidden": encoded.meta, "codec": "raw"} | changes), (
        encoded.buffers
    )


async def ask(channel, message, payload=(), expected=Output):
    return await channel.request(message, payload, expected=expected, deadline_s=10.0)


async def test_a_session_is_opened_stepped_closed_and_its_channel_used_again(hosts):
    async with hosts.host() as host, hosts.channel(host) as channel:
        for _ in range(2):
            assert (await ask(channel, opening(), expected=SessionOpened)).message.lease_s == 60.0
            assert host.engine.load.sessions == 1
            output = (await ask(channel, *step())).message
            assert output.tensors[0].shape == (3, WIDTH)
            await ask(channel, CloseSession(), expected=Closed)
            assert host.engine.load.sessions == 0
        await ask(channel, Ping(), expected=Pong)
        assert channel.is_reusable


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"model": "cd" * 32}, OutdatedView, "0:4 of model cdcdcdcdcdcd were .* that has 0:4 of model abababababab"),
        ({"span": Span(2, 6)}, OutdatedView, "2:6 of model abababababab were asked of a server that has 0:4"),
        ({"max_tokens": 300}, ContextTooLong, "300 tokens.*256"),
        ({"max_tokens": 256, "rows": 1000}, CacheFull, "1000 rows of 256 tokens need 4000 KV pages"),
        ({"codec": "gzip"}, CodecError, "no codec 'gzip'; this version knows raw"),
    ],
)
async def test_an_opening_that_cannot_be_is_refused_and_the_channel_stays(hosts, changes, error, words):
    async with hosts.host() as host, hosts.channel(host) as channel:
        with pytest.raises(error, match=words) as caught:
            await ask(channel, opening(**changes), expected=SessionOpened)
        assert caught.value.peer == host.peer
        await ask(channel, opening(), expected=SessionOpened)
        assert host.engine.load.sessions == 1


@pytest.mark.parametrize(
    ("message", "error", "words"),
    [
        (
            step(width=32, number=2),
            UsageError,
            r"shape \[3, 32\] was sent to blocks that take 2 axes, the last of 64 values",
        ),
        (step(tokens=300, number=2), ContextTooLong, "300 tokens.*256"),
        (step(number=2, hidden=TensorMeta("gzip", "float32", (3, WIDTH), 768)), CodecError, "no codec 'gzip'"),
        (
            step(number=2, hidden=TensorMeta("raw", "float32", (3, WIDTH), 700)),
            RemoteProtocolError,
            "700 payload bytes.* 768",
        ),
        (step(number=2, hidden=TensorMeta("int8", "float32", (3, WIDTH), 768)), CodecError, "768"),
    ],
)
async def test_a_refused_step_leaves_the_session_as_it_was(hosts, message, error, words):
    async with hosts.host() as host, hosts.channel(host) as channel:
        await ask(channel, opening(), expected=SessionOpened)
        before = await ask(channel, *step())
        with pytest.raises(error, match=words):
            await ask(channel, *message)
        after = await ask(channel, *step(number=2))  # the same tokens again, from the beginning
        assert bytes(after.payload) == bytes(before.payload)
        assert host.engine.load.sessions == 1


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ((Done(timing=Timing(0.0, 0.0)), ()), "Done does not belong"),
        (step(starts=(0, 0), counts=(1, 2)), "a step for 2 rows in a session of 1"),
        (step(counts=(7,)), "a step of 7 tokens with a tensor of shape"),
        (step(order=(3,)), "an order that does not fit the session's 1 rows"),
        ((Ping(), ()), "Ping does not belong into a session that is open"),
        ((opening(), ()), "OpenSession does not belong"),
    ],
)
async def test_what_breaks_the_session_s_rules_ends_it_with_the_reason(hosts, until, message, words):
    async with hosts.host() as host:
        async with hosts.channel(host) as channel:
            await ask(channel, opening(), expected=SessionOpened)
            with pytest.raises(RemoteProtocolError, match=words):
                await ask(channel, *message)
            await channel.aclose()
        await until(lambda: host.engine.load.sessions == 0)


async def test_a_step_outside_a_session_is_refused(hosts):
    async with hosts.host() as host, hosts.channel(host) as channel:
        with pytest.raises(RemoteProtocolError, match="Step does not begin a conversation"):
            await ask(channel, *step())
        await channel.aclose()


async def test_a_client_that_vanishes_leaves_no_pages_behind(hosts, until):
    async with hosts.host() as host:
        free_tokens = host.engine.load.free_tokens
        async with hosts.channel(host) as channel:
            await ask(channel, opening(max_tokens=128), expected=SessionOpened)
            await ask(channel, *step())
            assert host.engine.load.free_tokens == free_tokens - 128
            await channel.aclose()
        await until(lambda: host.engine.load.free_tokens == free_tokens)
        host.engine.check_integrity()


async def test_a_session_that_says_nothing_is_told_so_and_loses_its_pages(hosts, until):
    async with hosts.host(lease_s=0.05) as host, hosts.channel(host) as channel:
        await ask(channel, opening(), expected=SessionOpened)
        await until(lambda: host.engine.load.sessions == 0)
        with pytest.raises(SessionExpired, match="nothing was heard of the session for 0.05 s"):
            await ask(channel, *step())
        await channel.aclose()


async def test_a_step_of_a_replay_is_answered_without_its_output(hosts):
    async with hosts.host() as host, hosts.channel(host) as channel:
        await ask(channel, opening(), expected=SessionOpened)
        await ask(channel, *step(5))
        loud = await ask(channel, *step(1, start=5, number=2))
        done = await ask(channel, *step(5, number=0), expected=Done)
        assert not done.payload
        assert done.message.timing.compute_s > 0
        again = await ask(channel, *step(1, start=5, number=3))
        assert again.payload == loud.payload


@pytest.mark.parametrize(
    ("number", "words"), [(2, "keep \\[9\\] tokens, but have stored \\[3\\]"), (3, "step 3 came after step 1")]
)
async def test_a_step_that_does_not_follow_is_refused_with_its_number(hosts, number, words):
    """Petals defect E: a position beyond the end was taken."""
    async with hosts.host() as host, hosts.channel(host) as channel:
        await ask(channel, opening(), expected=SessionOpened)
        await ask(channel, *step())
        message, payload = step(start=9, number=number)
        await channel.send(message, payload)
        refused = (await channel.receive()).message
        assert refused.number == number
        assert re.search(words, refused.message)
        await ask(channel, *step(start=3, number=2))


async def test_steps_keep_a_session_alive(hosts):
    async with hosts.host(lease_s=0.5) as host, hosts.channel(host) as channel:
        await ask(channel, opening(), expected=SessionOpened)
        began_s = anyio.current_time()
        for number in itertools.count(1):
            await ask(channel, *step(number=number))
            if anyio.current_time() > began_s + 0.7:
                break


@contextmanager
def held_back(span, method):
    """Let blocks compute nothing until the end of the body."""
    compute, gate = getattr(span, method), threading.Event()
    setattr(span, method, lambda *args, **kwargs: gate.wait(60) and compute(*args, **kwargs))
    try:
        yield
    finally:
        gate.set()


async def test_a_step_that_is_not_done_in_time_ends_the_session(hosts, until):
    async with hosts.host() as host, hosts.channel(host) as channel:
        await ask(channel, opening(max_tokens=256), expected=SessionOpened)
        message, payload = step(tokens=2)
        with held_back(host.engine.span, "forward_packed"):
            await channel.send(message, payload, deadline_s=0.001)
            answer = (await channel.receive(deadline_s=10)).message
        assert isinstance(answer, Failure)
        assert isinstance(answer.error(host.peer), PeerTimeout)
        assert "not done within the 0.001 s" in answer.message
        await until(lambda: host.engine.load.sessions == 0)
        await channel.aclose()


async def test_a_leaving_server_takes_no_new_sessions_but_goes_on_with_old_ones(hosts):
    async with hosts.host() as host, hosts.channel(host) as old, hosts.channel(host) as new:
        await ask(old, opening(), expected=SessionOpened)
        host.handler.is_draining = True
        with pytest.raises(PeerBusy, match="leaving"):
            await ask(new, opening(), expected=SessionOpened)
        await ask(old, *step())


async def test_a_loading_server_says_when_to_come_back(hosts):
    async with hosts.host(is_loaded=False) as host, hosts.channel(host) as channel:
        for request, payload in ((opening(), ()), forward()):
            with pytest.raises(PeerBusy, match="still loading") as caught:
                await ask(channel, request, payload)
            assert caught.value.retry_after_s == 5.0
        await ask(channel, Ping(), expected=Pong)


async def test_a_request_is_answered_and_nothing_is_kept(hosts, until):
    async with hosts.host() as host, hosts.channel(host) as channel:
        message, payload = forward()
        output = await ask(channel, message, payload)
        assert output.message.tensors[0].shape == (1, 3, WIDTH)
        backward = Backward(model=MODEL, span=Span(0, 4), tensors=(message.hidden,) * 2, codec="raw")
        gradients = await ask(channel, backward, [*payload, *payload], expected=Gradients)
        assert gradients.message.tensors[0].shape == (1, 3, WIDTH)
        assert host.engine.load.sessions == 0
        await until(lambda: host.engine.load.waiting == 0)


@pytest.mark.parametrize(
    ("message", "error", "words"),
    [
        (forward(width=32), UsageError, r"shape \[1, 3, 32\] was sent to blocks that take 3 axes, the last of 64"),
        (forward(model="cd" * 32), OutdatedView, "model cdcdcdcdcdcd"),
        (forward(span=Span(3, 5)), OutdatedView, "3:5 of model .* were asked of a server that has 0:4"),
        (forward(codec="gzip"), CodecError, "no codec 'gzip'"),
        (forward(tokens=300), ContextTooLong, "300 tokens.*256"),
        (forward(attention_mask=b"1"), RemoteProtocolError, "1 bytes of torch.uint8 came for 1 x 3 tokens"),
        (forward(taps=(4,)), UsageError, r"outputs of blocks \[4\]"),
    ],
)
async def test_a_request_that_cannot_be_is_refused_and_the_channel_stays(hosts, message, error, words):
    async with hosts.host() as host, hosts.channel(host) as channel:
        with pytest.raises(error, match=words):
            await ask(channel, *message)
        await ask(channel, *forward())


async def test_a_backward_request_needs_a_gradient_for_every_output(hosts):
    async with hosts.host() as host, hosts.channel(host) as channel:
        message, payload = forward()
        backward = Backward(model=MODEL, span=Span(0, 4), tensors=(message.hidden,) * 2, codec="raw", taps=(1,))
        with pytest.raises(RemoteProtocolError, match="1 gradients came for an output and 1 taps"):
            await ask(channel, backward, [*payload, *payload], expected=Gradients)
        await ask(channel, *forward())


async def test_a_request_that_is_not_done_in_time_is_answered_so(hosts):
    async with hosts.host() as host, hosts.channel(host) as channel:
        message, payload = forward(tokens=2)
        with held_back(host.engine.span, "forward"):
            await channel.send(message, payload, deadline_s=0.001)
            answer = (await channel.receive(deadline_s=10)).message
        assert isinstance(answer.error(host.peer), PeerTimeout)
        await ask(channel, *forward())


@pytest.mark.parametrize("none", [float("nan"), float("inf"), float("-inf")])
async def test_numbers_that_are_none_are_refused_and_the_session_stays(hosts, none):
    async with hosts.host() as host, hosts.channel(host) as channel:
        await ask(channel, opening(), expected=SessionOpened)
        hidden_ND = torch.ones(3, WIDTH)
        hidden_ND[1, 5] = none
        encoded = encode(hidden_ND, "raw")
        message = Step(starts=(0,), counts=(3,), hidden=encoded.meta, number=1)
        with pytest.raises(NotFinite, match="1 of 192 numbers of step 1 are nan or infinite"):
            await ask(channel, message, encoded.buffers)
        await ask(channel, *step())


async def test_blocks_that_make_numbers_that_are_none_are_the_server_s_failure(hosts):
    async with hosts.host() as host, hosts.channel(host) as channel:
        huge = encode(torch.full((1, 3, WIDTH), 3e38), "raw")
        run = host.engine.forward

        async def overflow(*args, **kwargs):
            result = await run(*args, **kwargs)
            return result._replace(tensors=tuple(tensor * float("inf") for tensor in result.tensors))

        host.engine.forward = overflow
        request = Forward(model=MODEL, span=Span(0, 4), hidden=huge.meta, codec="raw")
        with pytest.raises(PeerFailed, match="blocks 0:4 in torch.float32 made .* numbers that are nan or infinite"):
            await ask(channel, request, huge.buffers)


async def test_a_client_that_vanishes_in_a_step_leaves_no_pages_behind(hosts, until):
    async with hosts.host() as host:
        async with hosts.channel(host) as channel:
            await ask(channel, opening(max_tokens=256), expected=SessionOpened)
            message, payload = step(tokens=256)
            await channel.send(message, payload)
            await channel.aclose()
            with pytest.raises(PeerLost):
                await channel.receive()
        await until(lambda: host.engine.load.sessions == 0)
        host.engine.check_integrity()


async def prompt(channel, tokens, **changes):
    """Open a session, give it a prompt of so many tokens that are all alike, close it; return the output."""
    await ask(channel, opening(max_tokens=tokens, **changes), expected=SessionOpened)
    output = await ask(channel, *step(tokens))
    await ask(channel, CloseSession(), expected=Closed)
    return output


@pytest.mark.parametrize(("sharing", "found"), [("client", [0, 192, 0]), ("all", [0, 192, 192]), ("nobody", [0, 0, 0])])
async def test_a_prompt_is_computed_once_for_those_who_may_share(hosts, sharing, found):
    """Whose a session is, its channel proves; nothing that a client says makes it another's."""
    async with hosts.host() as host, hosts.channel(host) as channel, hosts.channel(host) as stranger:
        host.handler._limits = PeerLimits(sharing=sharing)
        outputs = [await prompt(one, 200) for one in (channel, channel, stranger)]
        assert [output.message.timing.found_tokens for output in outputs] == found
        same = 192 * WIDTH * 4
        assert len({bytes(output.payload)[:same] for output in outputs}) == 1
        host.engine.check_integrity()


async def test_who_gives_another_codec_or_other_blocks_gets_what_is_right_for_them(hosts):
    async with hosts.host() as host, hosts.channel(host) as channel:
        await prompt(channel, 200)
        half = await prompt(channel, 200, codec="half")
        assert half.message.tensors[0].codec == "fp16"
        assert half.message.timing.found_tokens == 192  # what came in was the same
        part = await prompt(channel, 200, span=Span(1, 4))
        assert part.message.timing.found_tokens == 0
