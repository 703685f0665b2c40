"""Every error can be named on the wire, answered over HTTP, retried, banned and revived."""

import math
import typing

import pytest

from corolla import errors

PEER = "a" * 52
OUR_BUGS = (errors.Error, errors.InternalError, errors.LocalProtocolError)


def below(cls: type[errors.Error]) -> list[type[errors.Error]]:
    return [cls, *(found for child in cls.__subclasses__() for found in below(child))]


ALL = below(errors.Error)
each = pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)


def test_codes_are_unique():
    assert len({cls.code for cls in ALL}) == len(ALL)


def test_errors_are_defined_on_one_page():
    assert {cls.__module__ for cls in ALL} == {"corolla.errors"}


@each
def test_an_error_is_exported_and_drawn_in_the_tree(cls):
    assert cls.__name__ in errors.__all__
    assert f" {cls.__name__} " in errors.__doc__.replace("\n", " ")


@each
def test_an_error_says_how_to_treat_it(cls):
    assert "code" in vars(cls)
    assert 400 <= cls.http_status <= 599
    assert cls.retry in typing.get_args(errors.Retry)
    assert math.isfinite(cls.ban_s)
    assert cls.ban_s >= 0


@pytest.mark.parametrize("cls", below(errors.UsageError), ids=lambda cls: cls.__name__)
def test_the_callers_own_mistake_is_not_retried_and_bans_nobody(cls):
    assert (cls.retry, cls.ban_s) == ("never", 0)
    assert 400 <= cls.http_status <= 499


@each
def test_an_error_survives_the_wire(cls):
    revived = errors.revive(cls.code, "no room for 7 tokens", peer=PEER)
    assert type(revived) is (errors.PeerFailed if cls in OUR_BUGS else cls)
    assert str(revived) == revived.message == "no room for 7 tokens"


@pytest.mark.parametrize("cls", below(errors.PeerError), ids=lambda cls: cls.__name__)
def test_a_peers_failure_names_the_peer(cls):
    assert errors.revive(cls.code, "failed", peer=PEER).peer == PEER


def test_a_busy_peer_says_when_to_come_back():
    assert errors.revive("peer_busy", "full", peer=PEER, retry_after_s=2.5).retry_after_s == 2.5


def test_an_error_of_a_newer_peer_is_that_peers_failure():
    revived = errors.revive("not_invented_yet", "?", peer=PEER)
    assert type(revived) is errors.PeerFailed
    assert revived.peer == PEER
