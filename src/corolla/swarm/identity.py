"""Who a peer is: an Ed25519 key, the peer id made of its public half, and signatures. Knows no socket and no clock."""

import base64
import datetime
import logging
import os
import secrets
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from corolla.errors import ConfigError, RemoteProtocolError
from corolla.terms import PeerId

__all__ = ["Identity", "public_key_of", "read_certificate", "verify"]

_LOG = logging.getLogger(__name__)

# Clocks must not matter: a certificate here only carries a key, and a key does not expire.
_BEGIN: Final = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_END: Final = datetime.datetime(9999, 12, 31, tzinfo=datetime.UTC)


class Identity:
    """An Ed25519 key pair: whoever holds it is this peer.

    Args:
        key: The private key.

    Attributes:
        peer_id: The public key in lower-case base32 without padding, 52 characters.
    """

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.peer_id = _peer_id(key.public_key())

    def __repr__(self) -> str:
        return f"Identity({self.peer_id})"

    @classmethod
    def generate(cls) -> "Identity":
        """Make a new identity that no file knows of."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load_or_create(cls, path: Path) -> "Identity":
        """Read the identity in a file, or make one and write it there, readable by its owner alone. Blocks on the disk.

        Args:
            path: A PEM file with an unencrypted PKCS #8 key. Its folder is made if need be.

        Raises:
            ConfigError: If the file cannot be read or written, or holds no Ed25519 key.
        """
        try:
            if not path.exists():
                _write_new(path, cls.generate()._pem(NoEncryption()))
            pem = path.read_bytes()
            if os.name == "posix" and path.stat().st_mode & 0o077:
                _LOG.warning("other users can read the identity in %s; run: chmod 600 %s", path, path)
        except OSError as error:
            raise ConfigError(f"the identity file {path} cannot be used: {error.strerror or error}") from error
        try:
            key = load_pem_private_key(pem, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise ConfigError(
                f"{path} holds no private key that can be read ({error}); move it away and a new identity is made"
            ) from error
        if not isinstance(key, Ed25519PrivateKey):
            raise ConfigError(
                f"{path} holds a key of another kind than Ed25519; move it away and a new identity is made"
            )
        return cls(key)

    def sign(self, data: bytes) -> bytes:
        """Sign bytes; the signature has 64 bytes."""
        return self._key.sign(data)

    def certificate_der(self) -> bytes:
        """Make the self-signed certificate that carries the public key into TLS; always the same bytes."""
        return self._certificate().public_bytes(Encoding.DER)

    def certificate_pem(self, password: bytes) -> bytes:
        """Lay out the certificate and the key, the key encrypted, as TLS libraries want to read them.

        Args:
            password: What decrypts the key.
        """
        return self._certificate().public_bytes(Encoding.PEM) + self._pem(BestAvailableEncryption(password))

    def _certificate(self) -> x509.Certificate:
        name = _certificate_name(self.peer_id)
        builder = x509.CertificateBuilder(issuer_name=name, subject_name=name, public_key=self._key.public_key())
        return builder.serial_number(1).not_valid_before(_BEGIN).not_valid_after(_END).sign(self._key, None)

    def _pem(self, encryption: KeySerializationEncryption) -> bytes:
        return self._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)


def public_key_of(peer_id: PeerId) -> Ed25519PublicKey:
    """Take the public key out of a peer id.

    Raises:
        RemoteProtocolError: If it is no peer id.
    """
    try:
        raw = base64.b32decode(peer_id.upper() + "====")
        key = Ed25519PublicKey.from_public_bytes(raw)
    except ValueError as error:
        raise RemoteProtocolError(f"{peer_id!r} is not a peer id, which has 52 characters of base32") from error
    if _peer_id(key) != peer_id:
        raise RemoteProtocolError(f"{peer_id!r} is not how its peer id is written")
    return key


def verify(peer_id: PeerId, data: bytes, signature: bytes) -> bool:
    """Say whether a peer signed these bytes."""
    try:
        public_key_of(peer_id).verify(signature, data)
    except (RemoteProtocolError, InvalidSignature):
        return False
    return True


def read_certificate(der: bytes) -> PeerId:
    """Take the peer id out of a certificate, once it is sure to be one that :meth:`Identity.certificate_der` can make.

    It proves nothing about who presents it: that is for the TLS handshake to prove.

    Raises:
        RemoteProtocolError: If it is no self-signed certificate of a peer.
    """
    try:
        certificate = x509.load_der_x509_certificate(der)
        key = certificate.public_key()
        if not isinstance(key, Ed25519PublicKey):
            raise RemoteProtocolError("the certificate's key is not Ed25519")
        key.verify(certificate.signature, certificate.tbs_certificate_bytes)
        peer_id = _peer_id(key)
        if not certificate.subject == certificate.issuer == _certificate_name(peer_id):
            raise RemoteProtocolError("the certificate's name is not its peer id")
    except (ValueError, TypeError, x509.InvalidVersion, UnsupportedAlgorithm, InvalidSignature) as error:
        raise RemoteProtocolError(f"{len(der)} bytes are not the certificate of a peer: {error!r}") from error
    return peer_id


def _peer_id(key: Ed25519PublicKey) -> PeerId:
    raw = key.public_bytes(Encoding.Raw, PublicFormat.Raw)
    return PeerId(base64.b32encode(raw).decode().rstrip("=").lower())


def _certificate_name(peer_id: PeerId) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, peer_id)])


def _write_new(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; if another process made it meanwhile, leave that one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(draft, path)
        except FileExistsError:
            return
        except OSError:  # a file system without links
            draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
