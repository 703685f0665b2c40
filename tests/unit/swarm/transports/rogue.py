"""A TLS 1.3 server that may show a certificate without having its key, which no TLS library lets one do (RFC 8446).

Just enough of the protocol: X25519, AES-128-GCM, SHA-256, Ed25519.
"""

import hashlib
import hmac
import os
import struct

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

HANDSHAKE, ALERT = 22, 21
CIPHER, X25519, ED25519 = 0x1301, 0x001D, 0x0807


def extract(salt, secret):
    return hmac.digest(salt, secret, "sha256")


def expand(secret, label, context, length):
    label = b"tls13 " + label
    info = struct.pack(">HB", length, len(label)) + label + bytes([len(context)]) + context
    return hmac.digest(secret, info + b"\x01", "sha256")[:length]


def message(kind, body):
    return bytes([kind]) + len(body).to_bytes(3, "big") + body


def vector(width, body):
    return len(body).to_bytes(width, "big") + body


def key_share_of(hello):
    """Find the dialler's X25519 key in its ClientHello."""
    at = 4 + 2 + 32
    session = hello[at + 1 : at + 1 + hello[at]]
    at += 1 + len(session)
    at += 2 + int.from_bytes(hello[at : at + 2], "big")
    at += 1 + hello[at] + 2
    while at < len(hello):
        kind, size = struct.unpack_from(">HH", hello, at)
        if kind == 51:
            share = hello[at + 6 : at + 4 + size]
            while share:
                group, length = struct.unpack_from(">HH", share)
                if group == X25519:
                    return session, share[4 : 4 + length]
                share = share[4 + length :]
        at += 4 + size
    raise AssertionError("the dialler offered no X25519")


async def impersonate(receive_exactly, send, certificate, sign):
    """Play the server up to its Finished; say whether the dialler took it for the certificate's owner.

    Args:
        receive_exactly: Gives n bytes from the dialler.
        send: Sends bytes to it.
        certificate: What to show, in DER.
        sign: What makes the signature of the handshake; honest if it has the certificate's key.
    """
    _, _, size = struct.unpack(">BHH", await receive_exactly(5))
    hello = await receive_exactly(size)
    session, share = key_share_of(hello)
    own = X25519PrivateKey.generate()
    own_share = own.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    extensions = struct.pack(">HHH", 43, 2, 0x0304)
    extensions += struct.pack(">HHHH", 51, 4 + 32, X25519, 32) + own_share
    answer = b"\x03\x03" + os.urandom(32) + vector(1, session) + struct.pack(">HB", CIPHER, 0) + vector(2, extensions)
    transcript = hello + (server_hello := message(2, answer))

    empty = hashlib.sha256().digest()
    early = extract(bytes(32), bytes(32))
    shared = own.exchange(X25519PublicKey.from_public_bytes(share))
    secret = extract(expand(early, b"derived", empty, 32), shared)
    traffic = expand(secret, b"s hs traffic", hashlib.sha256(transcript).digest(), 32)

    alpn = vector(2, struct.pack(">H", 16) + vector(2, vector(2, vector(1, b"corolla"))))
    flight = message(8, alpn)
    flight += message(11, vector(1, b"") + vector(3, vector(3, certificate) + vector(2, b"")))
    signed = b" " * 64 + b"TLS 1.3, server CertificateVerify\0" + hashlib.sha256(transcript + flight).digest()
    flight += message(15, struct.pack(">H", ED25519) + vector(2, sign(signed)))
    finished = expand(traffic, b"finished", b"", 32)
    flight += message(20, hmac.digest(finished, hashlib.sha256(transcript + flight).digest(), "sha256"))

    inner = flight + bytes([HANDSHAKE])
    head = struct.pack(">BHH", 23, 0x0303, len(inner) + 16)
    sealed = AESGCM(expand(traffic, b"key", b"", 16)).encrypt(expand(traffic, b"iv", b"", 12), inner, head)
    await send(struct.pack(">BHH", HANDSHAKE, 0x0303, len(server_hello)) + server_hello + head + sealed)

    while True:  # an alert in the clear means no; anything encrypted is the dialler's own Finished
        kind, _, size = struct.unpack(">BHH", await receive_exactly(5))
        body = await receive_exactly(size)
        if kind in (ALERT, 23):
            return kind == 23 and not is_alert(body, secret, transcript)


def is_alert(sealed, secret, transcript):
    """Decrypt the dialler's first record and say whether it is an alert."""
    traffic = expand(secret, b"c hs traffic", hashlib.sha256(transcript).digest(), 32)
    head = struct.pack(">BHH", 23, 0x0303, len(sealed))
    inner = AESGCM(expand(traffic, b"key", b"", 16)).decrypt(expand(traffic, b"iv", b"", 12), sealed, head)
    return inner.rstrip(b"\0")[-1] == ALERT
