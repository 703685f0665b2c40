"""Finding peers on the local network by multicast DNS (RFC 6762, RFC 6763), if the zeroconf package is there.

A server says that it is here: who it is, its port, the beginning of its model's id, the name of the model, and a tag of
its private swarm. Whoever looks believes none of it: it only learns whom to dial, and the handshake tells who that is.
"""

import importlib
import ipaddress
import logging
import re
import socket
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

import anyio
from anyio import to_thread

from corolla.swarm.address import format_address
from corolla.swarm.finding.contacts import Contact
from corolla.swarm.finding.rendezvous import Topic
from corolla.terms import PEER_ID_PATTERN, PeerId

if TYPE_CHECKING:
    from anyio.abc import TaskGroup

__all__ = ["LocalNetwork", "Neighbour", "is_loopback"]

_LOG = logging.getLogger(__name__)
_SERVICE: Final = "_corolla._tcp.local."
_TAG: Final = re.compile(r"[0-9a-f]{16}")
_MAX_FOUND: Final = 256
_MAX_ADDRESSES: Final = 8
_MAX_NAME: Final = 64
_RESOLVE_S: Final = 1.0


class Neighbour(NamedTuple):
    """A server on the local network, as it describes itself.

    Args:
        contact: Who and where.
        swarm_tag: Of its private swarm; nothing if it is in a public one.
        model_tag: The beginning of its model's id.
        model_name: How its owner calls the model; anything may stand there.
    """

    contact: Contact
    swarm_tag: str
    model_tag: str
    model_name: str

    def fits(self, topic: Topic) -> bool:
        """Say whether it is one of those whom the topic means."""
        is_model = topic.swarm is not None or topic.model_tag in (None, self.model_tag)
        return self.swarm_tag == topic.swarm_tag and is_model


class LocalNetwork:
    """One peer's view of the local network, and its own presence there. An async context manager.

    Where the zeroconf package is missing, or the system does not let multicasts through, nobody is found.

    Args:
        interface: The address of the one interface to use; ``None`` for all.

    Attributes:
        found: The servers that were seen and not seen to leave, by their ids.
    """

    def __init__(self, interface: str | None = None) -> None:
        self._interface = interface
        self.found: dict[PeerId, Neighbour] = {}
        self._changed = anyio.Event()
        self._tasks: TaskGroup | None = None
        self._network: Any = None
        self._browser: Any = None

    async def __aenter__(self) -> Self:
        self._tasks = await anyio.create_task_group().__aenter__()
        try:
            zeroconf = await to_thread.run_sync(importlib.import_module, "zeroconf.asyncio")
            only = {"interfaces": [self._interface]} if self._interface else {}
            self._network = zeroconf.AsyncZeroconf(**only)
        except ModuleNotFoundError:
            _LOG.info("the local network cannot be searched: pip install 'corolla[lan]'")
        except OSError as error:
            _LOG.warning("the local network cannot be searched: %s", error)
        else:
            self._browser = zeroconf.AsyncServiceBrowser(self._network.zeroconf, _SERVICE, handlers=[self._notice])
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tasks is not None:
            self._tasks.cancel_scope.cancel()
            await self._tasks.__aexit__(None, None, None)
        with anyio.CancelScope(shield=True):
            if self._browser is not None:
                await self._browser.async_cancel()
            if self._network is not None:
                await self._network.async_close()

    @property
    def is_open(self) -> bool:
        """Whether there is any way to look."""
        return self._network is not None

    async def look(self, accept: Callable[[Neighbour], bool], limit_s: float) -> list[Neighbour]:
        """Wait for the first server that is wanted, and give all that are known then.

        Args:
            accept: Says which are wanted.
            limit_s: How long to wait, in seconds.
        """
        with anyio.move_on_after(limit_s if self.is_open else 0.0):
            while not any(map(accept, self.found.values())):
                await self.wait_for_change()
            await anyio.sleep(min(0.2, limit_s / 4))  # others answer at about the same time
        return [one for one in self.found.values() if accept(one)]

    async def wait_for_change(self) -> None:
        """Wait until a server was found or has left."""
        await self._changed.wait()

    async def announce(self, peer: PeerId, host: str, port: int, *, topic: Topic, model_name: str) -> None:
        """Say that a server is here, until the context is left. Takes about a second.

        Args:
            peer: Who.
            host: The interface that it listens on.
            port: And the port.
            topic: Its private swarm, if it is in one, and its model.
            model_name: How its owner calls the model.
        """
        if not self.is_open:
            return
        from zeroconf import Error as ZeroconfError
        from zeroconf.asyncio import AsyncServiceInfo

        addresses = [socket.inet_pton(_family(one), one) for one in self._hosts(host)]
        said = {"v": "1", "m": topic.model_tag or "", "n": model_name[-_MAX_NAME:], "s": topic.swarm_tag}
        service = AsyncServiceInfo(
            _SERVICE,
            f"{peer}.{_SERVICE}",
            port=port,
            addresses=addresses,
            properties=said,
            server=f"corolla-{peer[:16]}.local.",
        )
        try:
            await (await self._network.async_register_service(service))
        except (ZeroconfError, OSError) as error:
            _LOG.warning("the local network cannot be told of this server: %s", error)

    def _hosts(self, host: str) -> list[str]:
        """Give the addresses of this machine under which a listener can be reached from the local network."""
        import ifaddr  # zeroconf is made of it

        if self._interface is not None:
            return [self._interface]
        if host not in ("0.0.0.0", "::", ""):
            return [host]
        found = [one.ip for adapter in ifaddr.get_adapters() for one in adapter.ips]
        with_six = [one if isinstance(one, str) else one[0] for one in found if isinstance(one, str) or host == "::"]
        return [one for one in with_six if not is_loopback(one)][:_MAX_ADDRESSES]

    def _notice(self, zeroconf: object, service_type: str, name: str, state_change: Any) -> None:  # noqa: ANN401
        """Called by zeroconf, on the event loop, when a service comes, changes or goes."""
        peer = name.removesuffix(f".{_SERVICE}")
        if self._tasks is None or not re.fullmatch(PEER_ID_PATTERN, peer):
            return
        if state_change.name == "Removed":
            if self.found.pop(PeerId(peer), None) is not None:
                self._ring()
        elif len(self.found) < _MAX_FOUND:
            self._tasks.start_soon(self._resolve, PeerId(peer), name)

    async def _resolve(self, peer: PeerId, name: str) -> None:
        from zeroconf import Error as ZeroconfError
        from zeroconf.asyncio import AsyncServiceInfo

        service = AsyncServiceInfo(_SERVICE, name)
        with suppress(ZeroconfError, OSError):
            if await service.async_request(self._network.zeroconf, _RESOLVE_S * 1000):
                neighbour = _read(peer, service.parsed_addresses(), service.port, service.properties)
                if neighbour is not None:
                    self.found[peer] = neighbour
                    self._ring()

    def _ring(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()


def is_loopback(host: str) -> bool:
    """Say whether an interface is seen by this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _read(peer: PeerId, hosts: list[str], port: int | None, properties: dict[bytes, bytes | None]) -> Neighbour | None:
    """Take what a service says of itself, from anyone, for a neighbour, if it is one."""
    said = {key: (value or b"").decode(errors="replace") for key, value in properties.items()}
    swarm_tag, model_tag = said.get(b"s", ""), said.get(b"m", "")
    if said.get(b"v") != "1" or not port or not _TAG.fullmatch(model_tag):
        return None
    if swarm_tag and not _TAG.fullmatch(swarm_tag):
        return None
    addresses = tuple(format_address("tls", host, port) for host in hosts[:_MAX_ADDRESSES])
    return Neighbour(Contact(peer, addresses), swarm_tag, model_tag, said.get(b"n", "")[:_MAX_NAME])


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
