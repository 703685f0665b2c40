"""Servers on one network find each other, by multicasts that stay on the loopback interface here."""

import anyio
import pytest

from corolla.swarm import Contact, Contacts, Identity, LocalNetwork, Neighbour, Topic, is_loopback
from corolla.swarm.finding.lan import _read
from corolla.terms import ModelId

pytest.importorskip("zeroconf", reason="the zeroconf package is not here")
MODEL, OTHER = ModelId("ab" * 32), ModelId("cd" * 32)
SWARM = Identity.generate().peer_id
LOOPBACK = "127.0.0.1"
LIMIT_S = 15.0


def neighbour(topic):
    return Neighbour(Contact(Identity.generate().peer_id, ()), topic.swarm_tag, topic.model_tag or "", "tiny")


def test_a_topic_is_met_by_those_of_its_swarm_and_model_and_names_neither():
    public, private = Topic(None, MODEL), Topic(SWARM, MODEL)
    assert neighbour(public).fits(Topic(None, None))
    assert neighbour(public).fits(public)
    assert not neighbour(Topic(None, OTHER)).fits(public)
    assert not neighbour(public).fits(private)
    assert not neighbour(private).fits(public)
    assert neighbour(private).fits(Topic(SWARM, None))
    assert neighbour(private).fits(Topic(SWARM, OTHER))  # one private swarm may serve several models
    assert private.swarm_tag not in SWARM
    assert len({topic.key for topic in (public, private, Topic(None, OTHER), Topic(SWARM, None))}) == 3


@pytest.mark.parametrize(
    "said",
    [
        {},
        {b"v": b"2", b"m": b"ab" * 8},
        {b"v": b"1", b"m": b"ab"},
        {b"v": b"1", b"m": None},
        {b"v": b"1", b"m": b"\xff" * 16},
        {b"v": b"1", b"m": b"ab" * 8, b"s": b"x"},
    ],
)
def test_who_describes_itself_otherwise_is_no_neighbour(said):
    assert _read(SWARM, [LOOPBACK], 1, said) is None
    assert _read(SWARM, [LOOPBACK], 0, {b"v": b"1", b"m": b"ab" * 8}) is None


def test_what_a_neighbour_says_of_itself_is_bounded():
    read = _read(SWARM, [LOOPBACK] * 99, 7, {b"v": b"1", b"m": b"ab" * 8, b"n": b"n" * 999})
    assert read.contact.addresses == ("tls://127.0.0.1:7",) * 8
    assert len(read.model_name) == 64


@pytest.mark.parametrize(
    ("host", "is_own"), [(LOOPBACK, True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("192.0.2.7", False)]
)
def test_an_interface_that_nobody_else_sees_is_known(host, is_own):
    assert is_loopback(host) == is_own


def test_contacts_met_by_chance_come_after_those_given_and_are_not_taken_for_them():
    contacts = Contacts(["tls://192.0.2.7:1"])
    met = Contact(SWARM, ("tls://192.0.2.8:1",))
    assert [contacts.meet(met), contacts.meet(met)] == [True, False]
    assert contacts.all() == [*contacts.given, met]
    for _ in range(100):
        contacts.meet(Contact(Identity.generate().peer_id, ()))
    assert len(contacts.all()) == 65


@pytest.mark.anyio
async def test_a_server_is_found_and_seen_to_leave():
    identity, topic = Identity.generate(), Topic(SWARM, MODEL)

    def is_it(one):
        return one.contact.peer == identity.peer_id

    async with LocalNetwork(LOOPBACK) as network:
        async with LocalNetwork(LOOPBACK) as other:
            assert await network.look(is_it, 0.1) == []
            await other.announce(identity.peer_id, "0.0.0.0", 31330, topic=topic, model_name="tiny")
            (found,) = await network.look(is_it, LIMIT_S)
        assert found.contact.addresses == ("tls://127.0.0.1:31330",)
        assert found.fits(topic)
        assert found.model_name == "tiny"
        with anyio.fail_after(LIMIT_S):
            while identity.peer_id in network.found:
                await network.wait_for_change()
