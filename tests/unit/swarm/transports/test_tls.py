"""What only holds for TLS over TCP: who can pass for whom, and what strangers on the port can do."""

import contextlib
import datetime
import gc
import logging
import struct

import anyio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from corolla.errors import PeerUnreachable, RemoteProtocolError
from corolla.swarm import Identity, SwarmConfig, TlsTransport, split_address
from corolla.swarm.identity import read_certificate
from corolla.swarm.transports.credentials import Credentials
from corolla.swarm.transports.tcp import find_local_hosts

from ..conftest import echo, receive_exactly
from .rogue import impersonate

pytestmark = pytest.mark.anyio
DEADLINE_S = 20


def preamble(certificate):
    return struct.pack(">4sBH", b"CRLT", 1, len(certificate)) + certificate


async def connect(address):
    place = split_address(address)
    return await anyio.connect_tcp(place.host, place.port)


async def hung_up(stream):
    """Wait until the other side has closed the stream."""
    with anyio.fail_after(DEADLINE_S), contextlib.suppress(anyio.EndOfStream, anyio.BrokenResourceError):
        while True:
            await stream.receive()


@contextlib.asynccontextmanager
async def rogue(certificate, sign):
    """Have a server that shows a certificate and signs with whatever it likes; yields its address and its verdicts."""
    taken = []

    async def serve(stream):
        async with stream:
            buffered = b""

            async def take(nbytes):
                nonlocal buffered
                while len(buffered) < nbytes:
                    buffered += await stream.receive()
                taken_bytes, buffered = buffered[:nbytes], buffered[nbytes:]
                return taken_bytes

            _, _, size = struct.unpack(">4sBH", await take(7))
            await take(size)
            taken.append(await impersonate(take, stream.send, certificate, sign))

    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, serve)
        yield f"tls://127.0.0.1:{listener.extra(anyio.abc.SocketAttribute.local_port)}", taken
        tasks.cancel_scope.cancel()


async def test_a_listener_cannot_pass_for_a_peer_whose_certificate_it_stole():
    victim, thief = Identity.generate(), Identity.generate()
    async with rogue(victim.certificate_der(), thief.sign) as (address, taken):
        with pytest.raises(PeerUnreachable, match="handshake failed"):
            await TlsTransport(Identity.generate(), SwarmConfig()).dial(victim.peer_id, address)
        with anyio.fail_after(DEADLINE_S):
            while not taken:
                await anyio.lowlevel.checkpoint()
        assert taken == [False]


async def test_the_owner_of_the_certificate_passes_the_same_way():
    owner = Identity.generate()  # so the test before fails for the right reason
    async with rogue(owner.certificate_der(), owner.sign) as (address, taken):
        stream = await TlsTransport(Identity.generate(), SwarmConfig()).dial(owner.peer_id, address)
        assert stream.peer == owner.peer_id
        with anyio.fail_after(DEADLINE_S):
            while not taken:
                await anyio.lowlevel.checkpoint()
        assert taken == [True]
        await stream.aclose()


async def test_a_dialler_cannot_pass_for_a_peer_whose_certificate_it_stole(tls_net, caplog):
    served = []

    async def note(stream):
        served.append(stream.peer)

    async with tls_net.listening(note) as (listener, peer):
        for is_known in (False, True):  # whether the listener has met the thief under its own name
            thief = TlsTransport(Identity.generate(), SwarmConfig())
            if is_known:
                await (await thief.dial(peer, listener.addresses[0])).aclose()
            thief._credentials.certificate = Identity.generate().certificate_der()
            with caplog.at_level(logging.DEBUG, "corolla"), contextlib.suppress(PeerUnreachable):
                stream = await thief.dial(peer, listener.addresses[0])
                await hung_up(stream)
                await stream.aclose()
        assert len(served) <= 1
        assert "turned a connection away" in caplog.text


async def test_strangers_cost_only_their_own_connection(tls_net, caplog):
    der = Identity.generate().certificate_der()
    garbage = [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01" + bytes(600),
        b"CRLT\x02" + bytes(100),
        b"CRLT\x01\xff\xff" + bytes(100),
        preamble(b"not a certificate"),
        preamble(der[:-1] + bytes([der[-1] ^ 1])),
        preamble(der) + b"this is no handshake" * 50,
    ]
    async with tls_net.listening(echo) as (listener, peer):
        address = listener.addresses[0]
        with caplog.at_level(logging.DEBUG, "corolla"):
            for sent in garbage:
                async with await connect(address) as stranger:
                    await stranger.send(sent)
                    await hung_up(stranger)
        assert len([record for record in caplog.records if "turned" in record.message]) == len(garbage)
        assert all(record.levelno == logging.DEBUG for record in caplog.records if record.name.startswith("corolla"))
        stream = await tls_net.dial(peer, address)
        await stream.send(b"still here")
        assert await receive_exactly(stream, 10) == b"still here"
        await stream.aclose()


async def test_the_silent_and_the_slow_are_turned_away_in_time(tls_net):
    der = Identity.generate().certificate_der()
    config = SwarmConfig(handshake_s=0.3)
    async with tls_net.listening(echo, config) as (listener, _):
        for sent in (b"", b"CRLT", preamble(der)[:-5], preamble(der)):
            async with await connect(listener.addresses[0]) as stranger:
                if sent:
                    await stranger.send(sent)
                await hung_up(stranger)


async def test_a_silent_listener_is_given_up_in_time():
    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener:
        address = f"tls://127.0.0.1:{listener.extra(anyio.abc.SocketAttribute.local_port)}"
        with anyio.fail_after(DEADLINE_S), pytest.raises(PeerUnreachable, match=r"within 0\.3 s"):
            await TlsTransport(Identity.generate(), SwarmConfig(handshake_s=0.3)).dial(None, address)


async def test_dials_that_are_cancelled_at_any_point_leave_no_socket(tls_net):
    async with tls_net.listening(echo) as (listener, peer), tls_net.endpoint() as client:
        for tenths_ms in range(60):
            with anyio.move_on_after(tenths_ms / 10_000):
                async with client.channel(peer, listener.addresses):
                    pass
        gc.collect()  # a socket that was lost would speak up here


async def test_connections_over_the_limit_are_closed_at_once(tls_net):
    async with tls_net.listening(echo, SwarmConfig(max_connections=2)) as (listener, peer):
        address = listener.addresses[0]
        kept = [await tls_net.dial(peer, address) for _ in range(2)]
        with pytest.raises(PeerUnreachable):
            await tls_net.dial(peer, address)
        await kept[0].aclose()
        with anyio.fail_after(DEADLINE_S):
            while True:
                with contextlib.suppress(PeerUnreachable):
                    kept[0] = await tls_net.dial(peer, address)
                    break
        for stream in kept:
            await stream.aclose()


async def test_certificates_that_were_met_are_forgotten_in_time():
    credentials = Credentials(Identity.generate(), max_trusted=2)
    contexts = []
    for _ in range(5):
        await credentials.prepare()
        contexts.append(credentials.accepting(Identity.generate().certificate_der()))
        assert contexts[-1].cert_store_stats()["x509"] <= 2
    assert contexts[0] is contexts[1] is not contexts[2] is contexts[3] is not contexts[4]


def certificate_with(key, *, name, signer=None, hash_with=None):
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    begin, end = (datetime.datetime(year, 1, 1, tzinfo=datetime.UTC) for year in (2000, 2100))
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, begin, end)
    return builder.sign(signer or key, hash_with).public_bytes(Encoding.DER)


def test_only_a_peers_own_certificate_names_it():
    identity = Identity.generate()
    key, other = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    curve = generate_private_key(SECP256R1())
    assert read_certificate(identity.certificate_der()) == identity.peer_id
    assert identity.certificate_der() == identity.certificate_der()
    for wrong in (
        b"",
        identity.certificate_der() + b"\0",
        certificate_with(key, name="someone else"),
        certificate_with(key, name=Identity(key).peer_id, signer=other),
        certificate_with(curve, name="x", hash_with=SHA256()),
    ):
        with pytest.raises(RemoteProtocolError):
            read_certificate(wrong)


def test_a_wildcard_is_announced_as_addresses_that_can_be_dialled():
    assert find_local_hosts("192.0.2.7") == ("192.0.2.7",)
    for wildcard in ("0.0.0.0", "::"):
        found = find_local_hosts(wildcard)
        assert found
        assert wildcard not in found
