"""A peer is its key, and the key stays where it is."""

import os

import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from corolla.errors import ConfigError, RemoteProtocolError
from corolla.swarm import Identity, format_address, parse_address, public_key_of, split_address, verify


def test_an_identity_is_the_same_after_it_was_written(tmp_path):
    path = tmp_path / "new" / "identity.pem"
    made = Identity.load_or_create(path)
    assert Identity.load_or_create(path).peer_id == made.peer_id
    assert os.name != "posix" or path.stat().st_mode & 0o777 == 0o600
    assert [found.name for found in path.parent.iterdir()] == ["identity.pem"]


def test_a_file_without_a_usable_key_is_a_config_error_that_names_it(tmp_path):
    rsa = generate_private_key(65537, 2048).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for content in (b"", b"nonsense", rsa):
        path = tmp_path / "identity.pem"
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"identity\.pem"):
            Identity.load_or_create(path)
    with pytest.raises(ConfigError, match="cannot be used"):
        Identity.load_or_create(tmp_path)


def test_a_signature_holds_for_its_peer_and_its_bytes_alone():
    one, other = Identity.generate(), Identity.generate()
    signature = one.sign(b"data")
    assert verify(one.peer_id, b"data", signature)
    assert not verify(one.peer_id, b"Data", signature)
    assert not verify(other.peer_id, b"data", signature)
    assert not verify(one.peer_id, b"data", signature[:-1])
    assert not verify("no peer id", b"data", signature)


def test_each_key_has_one_peer_id():
    peer = Identity.generate().peer_id
    assert len(peer) == 52
    public_key_of(peer)
    last = "abcdefghijklmnopqrstuvwxyz234567"
    twin = peer[:-1] + last[last.index(peer[-1]) ^ 1]  # other spare bits, same key
    for wrong in (twin, peer[:-1], peer.upper(), "", peer + "a", "é" * 52):
        with pytest.raises(RemoteProtocolError):
            public_key_of(wrong)


def test_no_secret_is_in_the_repr():
    identity = Identity.generate()
    assert repr(identity) == f"Identity({identity.peer_id})"


def test_addresses_are_read_as_they_are_written():
    peer = Identity.generate().peer_id
    for text, address in (
        ("tls://192.0.2.7:4001", "tls://192.0.2.7:4001"),
        ("tls://[2001:DB8::1]:4001", "tls://[2001:DB8::1]:4001"),
        (" tls://host.example:1/ ", "tls://host.example:1"),
    ):
        assert parse_address(text) == (None, address)
        assert format_address(*split_address(address)[:3]) == address
    assert parse_address(f"tls://h:1/{peer}") == (peer, "tls://h:1")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "host:1",
        "tls://host",
        "tls://host:0",
        "tls://host:65536",
        "tls://2001:db8::1:1",
        "tls://h:1/peer",
        "tls://:1",
        "tls://h:1/a/b",
    ],
)
def test_what_is_no_address_is_a_config_error(text):
    with pytest.raises(ConfigError, match="address"):
        parse_address(text)
