"""TLS 1.3 over TCP: the transport for peers that can be dialled. Every stream is a TCP connection of its own.

Both sides show a certificate that their identity signed itself. Before TLS the dialler sends a preamble in the clear::

    magic "CRLT" | version u8 | certificate_bytes u16 | its certificate in DER

so that the listener can ask for just that certificate (``transports/credentials.py`` says why); so whom one dials from
which peer id can be seen by whoever watches the network. All else is encrypted, and no byte of a caller is sent or
handed on before both sides have proved who they are.
"""

import logging
import ssl
import struct
from collections.abc import Sequence
from typing import Final

import anyio
from anyio import to_thread

from corolla.errors import ConfigError, PeerUnreachable, RemoteProtocolError
from corolla.swarm.address import format_address, split_address
from corolla.swarm.config import SwarmConfig
from corolla.swarm.identity import Identity, read_certificate
from corolla.swarm.transports.credentials import MAX_CERTIFICATE_BYTES, Credentials, peer_of
from corolla.swarm.transports.tcp import TcpListener, TcpPipe, connect_pipe, find_local_hosts
from corolla.swarm.transports.transport import Ends, Path, StreamHandler
from corolla.swarm.transports.tunnel import Pipe
from corolla.terms import Address, PeerId

__all__ = ["TlsListener", "TlsStream", "TlsTransport"]

_LOG = logging.getLogger(__name__)
_PREAMBLE: Final = struct.Struct(">4sBH")
_MAGIC: Final = b"CRLT"
_VERSION: Final = 1
_PIECE_BYTES: Final = 1 << 17  # encrypted at once when sending: bounds the memory a send takes


class TlsStream:
    """A :class:`~corolla.swarm.Stream` over a TCP connection, or over another stream.

    Args:
        pipe: The connection.
        context: This side's TLS context.
        is_dialler: Which side of the handshake this is.
        received: Bytes of the handshake that have been received already.
    """

    def __init__(self, pipe: Pipe, context: ssl.SSLContext, *, is_dialler: bool, received: bytes = b"") -> None:
        self._pipe = pipe
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=not is_dialler)
        self._incoming.write(received)
        self._plain = bytearray()  # decrypted ahead of need, when the end was sent
        self._send_lock = anyio.Lock(fast_acquire=True)
        self._has_sent_end = False
        self._unreceived = 0  # receives and sends that have begun and not ended well
        self._unsent = 0
        self.peer = PeerId("")

    @property
    def path(self) -> Path:
        """How the bytes travel."""
        return "direct" if isinstance(self._pipe, TcpPipe) else "relayed"

    @property
    def ends(self) -> Ends | None:
        """Between which ends the bytes travel, if straight over an IP network."""
        return self._pipe.ends if isinstance(self._pipe, TcpPipe) else None

    @property
    def is_quiet(self) -> bool:
        """Whether the stream stands and nothing waits to be received."""
        is_sound = not (self._unreceived or self._unsent or self._plain)
        return is_sound and self._pipe.is_quiet and not self._incoming.pending and not self._tls.pending()

    async def shake_hands(self) -> None:
        """Do the handshake and learn who the other side is.

        Raises:
            RemoteProtocolError: If it fails, or the other side is no peer.
            anyio.BrokenResourceError: If the connection breaks.
        """
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                await self._flush()
                data = await self._pipe.receive()
                if not data:
                    raise RemoteProtocolError("hung up during the handshake") from None
                self._incoming.write(data)
            except ssl.SSLError as error:
                await self._flush()  # the alert that tells the other side why
                raise RemoteProtocolError(f"the TLS handshake failed: {error.reason or error}") from error
        await self._flush()
        self.peer = peer_of(self._tls)

    async def receive(self, max_bytes: int = 65536) -> bytes:
        """Wait for the next bytes; see :meth:`corolla.swarm.Stream.receive`."""
        if self._plain:
            data = bytes(self._plain[:max_bytes])
            del self._plain[:max_bytes]
            return data
        self._unreceived += 1
        while True:
            pieces, is_at_end = self._decrypt(max_bytes)
            if pieces:
                break
            if is_at_end:
                raise anyio.EndOfStream
            data = await self._pipe.receive()
            if not data:  # TCP ended and TLS did not: frames tell whether anything is missing
                raise anyio.EndOfStream
            self._incoming.write(data)
        if self._outgoing.pending:  # TLS itself had something to answer
            async with self._send_lock:
                await self._flush()
        self._unreceived -= 1
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def send(self, data: bytes | bytearray | memoryview) -> None:
        """Send bytes; see :meth:`corolla.swarm.Stream.send`."""
        view = memoryview(data).cast("B")
        self._unsent += 1
        async with self._send_lock:
            if self._has_sent_end:
                raise anyio.ClosedResourceError
            for start in range(0, view.nbytes, _PIECE_BYTES):
                try:
                    self._tls.write(view[start : start + _PIECE_BYTES])
                except ssl.SSLError as error:
                    raise anyio.BrokenResourceError from error
                await self._flush()
        self._unsent -= 1

    def send_now(self, data: bytes) -> bool:
        """Send bytes if nothing is in the way; see :meth:`corolla.swarm.Stream.send_now`."""
        write = self._pipe.writer
        if write is None or self._has_sent_end or self._send_lock.locked():
            return False
        self._unsent += 1
        try:
            self._tls.write(data)
        except ssl.SSLError as error:
            raise anyio.BrokenResourceError from error
        write(self._outgoing.read())
        self._unsent -= 1
        return True

    async def send_eof(self) -> None:
        """Send TLS's and TCP's end; see :meth:`corolla.swarm.Stream.send_eof`."""
        async with self._send_lock:
            if self._has_sent_end:
                return
            self._has_sent_end = True
            # OpenSSL's shutdown looks for the other side's end and stumbles over bytes before it: take those out first.
            self._plain += b"".join(self._decrypt(1 << 30)[0])
            try:
                self._tls.unwrap()
            except (ssl.SSLWantReadError, ssl.SSLSyscallError):
                pass
            except ssl.SSLError as error:
                raise anyio.BrokenResourceError from error
            await self._flush()
            await self._pipe.send_eof()

    async def aclose(self) -> None:
        """Close the connection; see :meth:`corolla.swarm.Stream.aclose`."""
        await self._pipe.aclose(flush=not self._unsent)

    def _decrypt(self, max_bytes: int) -> tuple[list[bytes], bool]:
        """Decrypt what has arrived; say whether the end came after it."""
        pieces: list[bytes] = []
        while max_bytes > 0:
            try:
                piece = self._tls.read(max_bytes)
            except ssl.SSLWantReadError:
                break
            except ssl.SSLZeroReturnError:
                return pieces, True
            except ssl.SSLError as error:
                raise anyio.BrokenResourceError from error
            if not piece:
                return pieces, True
            pieces.append(piece)
            max_bytes -= len(piece)
            if not (self._incoming.pending or self._tls.pending()):  # asking for more would cost an exception
                break
        return pieces, False

    async def _flush(self) -> None:
        if self._outgoing.pending:
            await self._pipe.send(self._outgoing.read())


class TlsListener:
    """A :class:`~corolla.swarm.Listener` on a TCP port; made by :meth:`TlsTransport.listen`.

    Args:
        listener: The port, which belongs to this object from now on.
        addresses: Where it can be dialled.
        credentials: What to show.
        config: The limits.

    Attributes:
        addresses: As above; whoever learns better ones sets them.
    """

    def __init__(
        self, listener: TcpListener, addresses: tuple[Address, ...], credentials: Credentials, config: SwarmConfig
    ) -> None:
        self.addresses = addresses
        self._listener = listener
        self._credentials = credentials
        self._config = config
        self._handshakes = anyio.Semaphore(config.max_handshakes)
        self._connections = 0

    @property
    def port(self) -> int:
        """Where it listens on this machine."""
        return self._listener.port

    async def serve(self, handler: StreamHandler) -> None:
        """Accept streams until cancelled; see :meth:`corolla.swarm.Listener.serve`."""
        async with anyio.create_task_group() as tasks:
            while True:
                pipe = await self._listener.accept()
                tasks.start_soon(self.serve_pipe, pipe, handler)

    async def aclose(self) -> None:
        """Stop listening."""
        await self._listener.aclose()

    async def serve_pipe(self, pipe: Pipe, handler: StreamHandler) -> None:
        """Do the handshake on a connection, however it was made, and hand it on; in the end it is closed.

        Args:
            pipe: The connection, which belongs to this call from now on.
            handler: What to call with the stream.
        """
        self._connections += 1
        try:
            if self._connections > self._config.max_connections:
                _LOG.debug("closed a connection: there are %d already", self._connections - 1)
                return
            stream = await self._accept(pipe)
            if stream is not None:
                try:
                    await handler(stream)
                finally:
                    await stream.aclose()
        finally:
            self._connections -= 1
            await pipe.aclose(flush=False)

    async def _accept(self, pipe: Pipe) -> TlsStream | None:
        reason = "took too long over the handshake"
        with anyio.move_on_after(self._config.handshake_s):
            try:
                certificate, received = await _read_preamble(pipe)
                async with self._handshakes:
                    await self._credentials.prepare()
                    context = self._credentials.accepting(certificate)
                    stream = TlsStream(pipe, context, is_dialler=False, received=received)
                    await stream.shake_hands()
                if stream.peer == read_certificate(certificate):
                    return stream
                reason = "proved to be another peer than it said"
            except RemoteProtocolError as error:
                reason = error.message
            except (anyio.BrokenResourceError, anyio.ClosedResourceError):
                reason = "hung up during the handshake"
        _LOG.debug("turned a connection away: it %s", reason)
        return None


class TlsTransport:
    """The ``tls`` transport of one identity.

    Args:
        identity: Whom to be.
        config: The limits.
    """

    def __init__(self, identity: Identity, config: SwarmConfig) -> None:
        self._config = config
        self._credentials = Credentials(identity)

    @property
    def scheme(self) -> str:
        """What its addresses begin with."""
        return "tls"

    async def listen(self, host: str, port: int, *, announce: Sequence[Address] = ()) -> TlsListener:
        """Open a TCP port; see :meth:`corolla.swarm.Transport.listen`.

        Raises:
            ConfigError: If the port is taken or the address is not this machine's.
        """
        await self._credentials.prepare()
        listener = await TcpListener.open(host, port, self._config)
        hosts = await to_thread.run_sync(find_local_hosts, host)
        found = tuple(format_address(self.scheme, found, listener.port) for found in hosts)
        return TlsListener(listener, tuple(announce) or found, self._credentials, self._config)

    async def dial(self, peer: PeerId | None, address: Address) -> TlsStream:
        """Connect and do the handshake; see :meth:`corolla.swarm.Transport.dial`.

        Raises:
            PeerUnreachable: If nobody answers there in time, or it is another peer; says which.
            ConfigError: If the address is not one of this transport.
        """
        place = split_address(address)
        if place.scheme != self.scheme:
            raise ConfigError(f"{address} is not an address of the {self.scheme} transport")
        with anyio.move_on_after(self._config.handshake_s):
            try:
                pipe = await connect_pipe(place.host, place.port, self._config)
            except OSError as error:
                raise PeerUnreachable(f"{address}: {error.strerror or error}", peer=peer) from error
            return await self.dial_over(pipe, peer, address)
        raise PeerUnreachable(f"{address}: no answer within {self._config.handshake_s:g} s", peer=peer)

    async def dial_over(self, pipe: Pipe, peer: PeerId | None, address: Address) -> TlsStream:
        """Do the handshake on a connection, however it was made.

        Args:
            pipe: The connection, which belongs to the stream from now on, and is closed if there will be none.
            peer: Who must be there; ``None`` for whoever is.
            address: How to call the other side in an error.

        Raises:
            PeerUnreachable: If it is another peer, or none; says which.
        """
        try:
            with anyio.fail_after(self._config.handshake_s):
                await self._credentials.prepare()
                return await self._shake_hands(pipe, peer)
        except BaseException as error:
            await pipe.aclose(flush=False)
            if isinstance(error, RemoteProtocolError):
                raise PeerUnreachable(f"{address}: {error.message}", peer=peer) from error
            if isinstance(error, anyio.BrokenResourceError | anyio.ClosedResourceError):
                raise PeerUnreachable(f"{address}: it hung up during the handshake", peer=peer) from error
            if isinstance(error, TimeoutError):
                reason = f"no answer within {self._config.handshake_s:g} s"
                raise PeerUnreachable(f"{address}: {reason}", peer=peer) from error
            raise

    async def _shake_hands(self, pipe: Pipe, peer: PeerId | None) -> TlsStream:
        certificate = self._credentials.certificate
        await pipe.send(_PREAMBLE.pack(_MAGIC, _VERSION, len(certificate)) + certificate)
        stream = TlsStream(pipe, self._credentials.dialling, is_dialler=True)
        await stream.shake_hands()
        if peer is not None and stream.peer != peer:
            raise RemoteProtocolError(f"expected peer {peer}, found peer {stream.peer}")
        return stream


async def _read_preamble(pipe: Pipe) -> tuple[bytes, bytes]:
    """Take the dialler's certificate off a new connection; give what has come after it as well."""
    received = b""
    needed_bytes = _PREAMBLE.size
    while len(received) < needed_bytes:
        data = await pipe.receive()
        if not data:
            raise RemoteProtocolError(f"hung up after {len(received)} bytes")
        received += data
        if len(received) >= _PREAMBLE.size:
            magic, version, certificate_bytes = _PREAMBLE.unpack_from(received)
            if magic != _MAGIC:
                raise RemoteProtocolError(f"sent {magic.hex(' ')} where a Corolla peer would send its certificate")
            if version != _VERSION:
                raise RemoteProtocolError(f"speaks version {version} of the handshake, not {_VERSION}")
            if certificate_bytes > MAX_CERTIFICATE_BYTES:
                raise RemoteProtocolError(f"announced a certificate of {certificate_bytes} bytes")
            needed_bytes = _PREAMBLE.size + certificate_bytes
    certificate = received[_PREAMBLE.size : needed_bytes]
    read_certificate(certificate)
    return certificate, received[needed_bytes:]
