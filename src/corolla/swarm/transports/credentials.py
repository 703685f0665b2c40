"""What a peer shows in a TLS handshake and what it accepts: contexts of the ``ssl`` module, made of an identity.

Python's ``ssl`` module asks for a client's certificate only if it trusts an authority that could have made it, and here
everyone is their own authority. So the dialler shows its certificate before the handshake, in the clear, and the
listener adds it to those that it trusts; the handshake then proves that the dialler has the key. To be trusted means no
more here than to be allowed to prove that: who the peer is, is read from the certificate that the proof was made for.
"""

import secrets
import ssl
import tempfile
from pathlib import Path
from typing import Final

from anyio import to_thread

from corolla.errors import InternalError, RemoteProtocolError
from corolla.swarm.identity import Identity, read_certificate
from corolla.terms import PeerId

__all__ = ["ALPN", "MAX_CERTIFICATE_BYTES", "MAX_TRUSTED", "Credentials", "peer_of"]

ALPN: Final = "corolla"
MAX_CERTIFICATE_BYTES: Final = 1024
"""Those of peers have about 330 bytes."""

MAX_TRUSTED: Final = 4096
"""Certificates that one context comes to trust before it is replaced, as it cannot forget any: about 2 KB each."""


class Credentials:
    """The TLS contexts of one identity. Making them reads and writes a file, which :meth:`prepare` does in a thread.

    Args:
        identity: Whose.
        max_trusted: How many certificates to trust at once.

    Attributes:
        certificate: What the identity shows, in DER.
    """

    def __init__(self, identity: Identity, *, max_trusted: int = MAX_TRUSTED) -> None:
        self._identity = identity
        self._max_trusted = max_trusted
        self._trusted: set[bytes] = set()
        self._accepting: ssl.SSLContext | None = None
        self._dialling: ssl.SSLContext | None = None
        self.certificate: Final = identity.certificate_der()

    async def prepare(self) -> None:
        """Make the contexts if they are missing, and replace the accepting one if it trusts too many to remember."""
        if self._dialling is None:
            self._dialling = await to_thread.run_sync(_make_context, self._identity, ssl.PROTOCOL_TLS_CLIENT)
        if self._accepting is None or len(self._trusted) >= self._max_trusted:
            self._accepting = await to_thread.run_sync(_make_context, self._identity, ssl.PROTOCOL_TLS_SERVER)
            self._trusted = set()

    @property
    def dialling(self) -> ssl.SSLContext:
        """The context for streams that this side opens; whom it met there must be checked with :func:`peer_of`."""
        if self._dialling is None:
            raise InternalError("credentials were used before they were prepared")
        return self._dialling

    def accepting(self, certificate: bytes) -> ssl.SSLContext:
        """Give the context for streams that others open.

        Args:
            certificate: What the dialler showed, in DER; its form has been checked.
        """
        if self._accepting is None:
            raise InternalError("credentials were used before they were prepared")
        if certificate not in self._trusted:
            try:
                self._accepting.load_verify_locations(cadata=certificate)
            except ssl.SSLError as error:
                raise RemoteProtocolError(f"the certificate cannot be used for TLS: {error}") from error
            self._trusted.add(certificate)
        return self._accepting


def peer_of(tls: ssl.SSLObject) -> PeerId:
    """Say who is on the other side of a finished handshake.

    The other side has signed the handshake with the key of its certificate, or the handshake would have failed: TLS 1.3
    checks that (RFC 8446, section 4.4.3) whatever else is checked of the certificate.

    Raises:
        RemoteProtocolError: If it showed no certificate of a peer, or speaks another protocol over TLS.
    """
    if tls.selected_alpn_protocol() != ALPN:
        raise RemoteProtocolError("a TLS server that is not a Corolla peer")
    certificate = tls.getpeercert(binary_form=True)
    if certificate is None:
        raise RemoteProtocolError("a TLS peer without a certificate")
    return read_certificate(certificate)


def _make_context(identity: Identity, side: int) -> ssl.SSLContext:
    context = ssl.SSLContext(side)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.set_alpn_protocols([ALPN])
    if side == ssl.PROTOCOL_TLS_SERVER:
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN
        context.num_tickets = 0  # streams are pooled, not resumed
    else:
        context.verify_mode = ssl.CERT_NONE
    # The module reads keys from files only; this one exists for a moment, encrypted with a word that is nowhere.
    password = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="corolla-") as folder:
        path = Path(folder, "identity.pem")
        path.write_bytes(identity.certificate_pem(password.encode()))
        context.load_cert_chain(path, password=password)
    return context
