"""Whom a command turns to: the peers that it was told of, or else those on the local network."""

from collections.abc import Sequence

import anyio

from corolla.cli.config import ChatConfig
from corolla.cli.console import Output, without_controls
from corolla.cli.settings import Settings
from corolla.errors import UsageError
from corolla.swarm import Invite, LocalNetwork, Neighbour, SwarmConfig, Topic

__all__ = ["find_peers"]

_MISSING = "no peer of a swarm is given: add --peer tls://host:port, as corolla serve prints it, or an --invite"


def find_peers(settings: Settings, output: Output) -> tuple[str, ...]:
    """Give the addresses of peers of the swarm that a command is to use.

    Args:
        settings: What the command was told.
        output: Hears which swarm was found, if it was told of none.

    Raises:
        UsageError: If none is given and none is found, or several are and nothing says which is meant.
    """
    config, swarm = settings.get(ChatConfig), settings.get(SwarmConfig)
    invite = None if swarm.invite is None else Invite.read(swarm.invite)
    if config.peers or (invite and invite.peers):
        return config.peers
    if not swarm.lan:
        raise UsageError(_MISSING)
    found = anyio.run(_look, swarm, Topic(invite.grant.swarm if invite else None, None))
    if not found:
        raise UsageError(f"{_MISSING}; none was found on the local network")
    chosen = _choose(found, config.model)
    name = without_controls(chosen[0].model_name)
    peers = tuple(f"{address}/{one.contact.peer}" for one in chosen for address in one.contact.addresses)
    output.note(f"found {len(chosen)} servers of {name} on the local network, the first at {peers[0]}", "dim")
    return peers


async def _look(config: SwarmConfig, topic: Topic) -> list[Neighbour]:
    async with LocalNetwork(config.lan_interface) as network:
        return await network.look(lambda one: one.fits(topic), config.lan_s)


def _choose(found: Sequence[Neighbour], model: str | None) -> list[Neighbour]:
    """Take the servers of one model: the one that is named, or the only one."""
    tags = {one.model_tag for one in found if model in (None, one.model_name)} or {one.model_tag for one in found}
    if len(tags) > 1:
        names = sorted({without_controls(one.model_name) for one in found})
        raise UsageError(f"servers of {len(tags)} models are on the local network; name one of: {', '.join(names)}")
    return [one for one in found if one.model_tag in tags]
