"""What people are shown of a snapshot: sums that add up, bounds, and nothing that does not print."""

import msgspec
import pytest

from corolla.monitor import draw
from corolla.monitor.picture import MAX_MODELS, MAX_SERVERS, Picture, model_title, printable
from corolla.terms import Address, Announcement, ModelId, PeerId, Rtt, Snapshot, Span, Speed

DIGITS = "abcdefghijklmnopqrstuvwxyz234567"


def peer(number):
    letters = "".join(DIGITS[number // 32**place % 32] for place in range(8))
    return PeerId(letters + "a" * 44)


def server(number, span, *, decode=10.0, **changes):
    fields = {
        "peer": peer(number),
        "sequence": 1,
        "ttl_s": 20.0,
        "model": ModelId("ab" * 32),
        "model_name": "org/model",
        "num_blocks": 8,
        "span": Span.parse(span),
        "state": "online",
        "precision": "bfloat16",
        "addresses": (Address("tls://192.0.2.1:31330"),),
        "speed": Speed(decode_tokens_per_s=decode, prefill_tokens_per_s=1000.0),
        "free_tokens": 1000,
        "version": "0.1.0",
    }
    return Announcement(**fields | changes)


def picture(*servers, answers=None, **options):
    return draw(Snapshot(announcements=servers), 100.0, answers=answers or {}, since_s={peer(0): 40.0}, **options)


def test_blocks_sum_up_the_servers_online():
    drawn = picture(
        server(0, "0:4", sessions=2),
        server(1, "4:8", sessions=1, free_tokens=300),
        server(2, "2:8", sessions=1),
        server(3, "0:8", state="joining"),
    )
    (model,) = drawn.models
    assert (model.servers_total, model.online) == (4, 3)
    assert model.counts == (1, 1, 2, 2, 2, 2, 2, 2)
    assert model.rates == pytest.approx((10, 10, 20, 20, 20, 20, 20, 20))
    assert (model.missing, model.bottleneck, model.tokens_per_s) == (0, Span(0, 2), 10)
    assert (model.sessions, model.free_tokens) == (3, 1000)
    assert [hop.span for hop in model.chain][-1].stop == 8
    assert model.session_tokens_per_s > 0
    assert [one.seen_s for one in model.servers if one.peer == peer(0)] == [60]


def test_a_gap_is_told_and_one_more_server_would_fill_it():
    (model,) = picture(server(0, "0:4"), server(1, "6:8")).models
    assert (model.missing, model.bottleneck, model.tokens_per_s) == (2, Span(4, 6), 0)
    assert (model.chain, model.session_tokens_per_s) == ((), None)
    assert model.next_server.fills == 2
    assert Span(4, 6) == model.next_server.span
    assert model.next_server.after > model.next_server.before == 0


def test_one_more_server_lifts_the_weakest_blocks_as_placement_would():
    (model,) = picture(server(0, "0:4", decode=10), server(1, "4:8", decode=40)).models
    assert model.next_server.span == Span(0, 4)
    assert (model.next_server.before, model.next_server.after) == (10, 20)


def test_servers_that_load_count_for_the_next_one_and_not_for_now():
    (model,) = picture(server(0, "0:4"), server(1, "4:8", state="joining")).models
    assert model.missing == 4
    assert model.next_server.fills == 0


def test_a_model_of_which_nobody_is_online_can_be_drawn():
    (model,) = picture(server(0, "0:8", state="joining", speed=None)).models
    assert (model.online, model.missing, model.tokens_per_s) == (0, 8, 0)


def test_a_liar_changes_neither_the_number_of_blocks_nor_the_throughput_without_bound():
    honest = [server(number, "0:8") for number in range(3)]
    liars = [server(3, "0:4000", num_blocks=4096), server(4, "0:8", decode=1e12)]
    (model,) = picture(*honest, *liars).models
    assert model.blocks == 8
    assert max(model.rates) <= 3 * 10 + 4 * 10


def test_a_measured_way_shows_and_a_silent_server_too():
    drawn = picture(server(0, "0:8"), server(1, "0:8"), server(2, "0:8"), answers={peer(0): 0.02, peer(1): None})
    said = {one.peer: (one.rtt_s, one.answers) for one in drawn.models[0].servers}
    assert said == {peer(0): (0.02, True), peer(1): (None, False), peer(2): (None, None)}


def test_addresses_are_shown_only_if_asked_for():
    one = server(0, "0:8"), server(1, "0:8", addresses=(Address("relay://192.0.2.9:1/x"),))
    assert b"192.0.2" not in msgspec.json.encode(picture(*one))
    assert [view.reach for view in picture(*one).models[0].servers] == ["direct", "relayed"]
    assert b"192.0.2.1" in msgspec.json.encode(picture(*one, show_addresses=True))


def test_links_are_those_between_servers_that_are_here():
    rtts = (Rtt(peer(1)[:8], 0.03), Rtt("zzzzzzzz", 0.01))
    (model,) = picture(server(0, "0:4", rtts=rtts), server(1, "4:8")).models
    assert [(link.source, link.target, link.rtt_s) for link in model.links] == [(peer(0), peer(1), 0.03)]


def test_however_many_there_are_the_picture_is_bounded():
    crowd = [server(number, "0:8") for number in range(MAX_SERVERS + 100)]
    models = [server(2000 + n, "0:8", model=ModelId(f"{n:064x}")) for n in range(MAX_MODELS + 10)]
    drawn = picture(*crowd, *models)
    assert (len(drawn.models), drawn.models_total) == (MAX_MODELS, MAX_MODELS + 11)
    assert (len(drawn.models[0].servers), drawn.models[0].servers_total) == (MAX_SERVERS, MAX_SERVERS + 100)
    assert drawn.models[0].counts[0] == MAX_SERVERS + 100


def test_what_does_not_print_is_left_out():
    assert printable("a\x1b[31mb\u202ec\n\u200bd") == "a[31mbcd"
    assert len(printable("x" * 1000)) == 64
    named = picture(server(0, "0:8", name="\u202eevil", model_name="\x00m", adapters=("a\nb",), version="\x7f1"))
    assert msgspec.json.decode(msgspec.json.encode(named), type=Picture) == named
    assert (named.models[0].name, named.models[0].servers[0].name) == ("m", "evil")
    assert named.models[0].servers[0].adapters == ("ab",)


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("org/model", "org/model"),
        ("/home/zoe/secret/llama", "llama"),
        ("./llama/", "llama"),
        ("C:\\models\\llama", "llama"),
    ],
)
def test_a_path_on_somebody_elses_disk_is_not_told_on(name, title):
    assert model_title(name) == title
