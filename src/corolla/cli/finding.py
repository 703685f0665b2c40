"""Whom a command turns to: the peers that it was told of, or else those that it finds by itself."""

from collections.abc import Sequence

import anyio

from corolla.cli.config import ChatConfig
from corolla.cli.console import Output, without_controls
from corolla.cli.settings import Settings
from corolla.errors import UsageError
from corolla.swarm import Invite, LocalNetwork, MainlineDht, Neighbour, SwarmConfig, Topic
from corolla.terms import Address

__all__ = ["find_peers", "is_told", "seek_peers"]


def find_peers(settings: Settings, output: Output, models: Sequence[str] = ()) -> tuple[str, ...]:
    """Give the addresses of peers of the swarm that a command is to use.

    Args:
        settings: What the command was told.
        output: Hears which swarm was found, if it was told of none.
        models: Which models it is to have; none for the one in the settings, if there is one.

    Raises:
        UsageError: If none is given and none is found, or several models are and none is named.
        ConfigError: If the DHT is wanted and libtorrent is not there.
    """
    config, swarm = settings.get(ChatConfig), settings.get(SwarmConfig)
    if config.peers or is_told(swarm):
        return config.peers
    if found := seek_peers(settings, output, models[0] if models else config.model):
        return found
    places = [name for name, is_on in (("on the local network", swarm.lan), ("in the DHT", swarm.dht)) if is_on]
    nowhere = f"; none was found {' or '.join(places)}" if places else ""
    raise UsageError(
        "no peer of a swarm is given: add --peer tls://host:port, as corolla serve prints it, or an --invite" + nowhere
    )


def is_told(swarm: SwarmConfig) -> bool:
    """Say whether the settings of the swarm lead to peers by themselves: a store, or an invite that names some."""
    return swarm.directory is not None or bool(swarm.invite and Invite.read(swarm.invite).peers)


def seek_peers(settings: Settings, output: Output, model: str | None, *, is_one_model: bool = True) -> tuple[str, ...]:
    """Look for peers on the local network, then in the DHT, as far as the settings allow.

    Args:
        settings: What the command was told.
        output: Hears who was found.
        model: Which model they are to have; ``None`` for whichever there is.
        is_one_model: Whether all of them have to serve the same one.

    Returns:
        Their addresses; none if nobody was found.

    Raises:
        UsageError: If several models are found and none is named.
        ConfigError: If the DHT is wanted and libtorrent is not there.
    """
    swarm = settings.get(SwarmConfig)
    members = None if swarm.invite is None else Invite.read(swarm.invite).grant.swarm
    topic = Topic(members, None)
    if swarm.lan and (neighbours := anyio.run(_look_nearby, swarm, topic)):
        return _choose(neighbours, model, output, is_one_model=is_one_model)
    if not swarm.dht:
        return ()
    if members is None and model:
        from corolla.hub import HubConfig, open_repository  # a monitor has no model's files, nor what reads them

        topic = Topic(None, open_repository(model, config=settings.get(HubConfig)).model_id)
    found = anyio.run(_look_anywhere, swarm, topic)
    if found:
        output.note(f"found {len(found)} addresses in the DHT, the first {found[0]}", "dim")
    return tuple(found)


async def _look_nearby(config: SwarmConfig, topic: Topic) -> list[Neighbour]:
    async with LocalNetwork(config.lan_interface) as network:
        return await network.look(lambda one: one.fits(topic), config.lan_s)


async def _look_anywhere(config: SwarmConfig, topic: Topic) -> list[Address]:
    async with MainlineDht(config) as dht:
        return await dht.look(topic, config.dht_s)


def _choose(found: Sequence[Neighbour], model: str | None, output: Output, *, is_one_model: bool) -> tuple[str, ...]:
    """Take the servers of one model, the one that is named or the only one, or else all."""
    tags = {one.model_tag for one in found if model in (None, one.model_name)} or {one.model_tag for one in found}
    if is_one_model and len(tags) > 1:
        names = sorted({without_controls(one.model_name) for one in found})
        raise UsageError(f"servers of {len(tags)} models are on the local network; name one of: {', '.join(names)}")
    chosen = [one for one in found if one.model_tag in tags]
    peers = tuple(f"{address}/{one.contact.peer}" for one in chosen for address in one.contact.addresses)
    name = without_controls(chosen[0].model_name)
    output.note(f"found {len(chosen)} servers of {name} on the local network, the first at {peers[0]}", "dim")
    return peers
