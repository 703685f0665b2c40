"""``corolla swarm``: how a swarm is, and the private swarms of this account: their keys and their invites."""

import math
import time
from collections import Counter
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import anyio
import typer
from platformdirs import user_config_path
from rich.table import Table
from rich.text import Text

from corolla.cli.config import InviteConfig, OutputConfig
from corolla.cli.console import Output, without_controls
from corolla.cli.finding import find_peers
from corolla.cli.flags import FINDING_FLAGS, Flag, command
from corolla.cli.servers import count_servers, server_as_data, show_servers
from corolla.cli.settings import Settings
from corolla.cli.state import with_state
from corolla.errors import Error, UsageError
from corolla.monitor import Look, look_at_swarm, watching
from corolla.swarm import Endpoint, Identity, Invite, Revocations, SwarmConfig
from corolla.swarm.members.invite import describe_time
from corolla.swarm.members.owner import Issued, OwnedSwarm
from corolla.terms import Announcement

__all__ = ["invite", "list_", "new", "revoke", "status", "swarm"]

_OWN_S = 3600  # for how long the owner's own commands are let in
_INVITE_FLAGS = (
    Flag("invite.allows", "--for"),
    Flag("invite.expires_s", "--expires"),
    Flag("invite.name"),
    Flag("invite.peers", "--peer"),
    Flag("output.json"),
    Flag("output.quiet"),
)

swarm = typer.Typer(
    help="Look at a swarm; make a private one, and invites to it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@command(
    sections=("chat", "swarm"),
    flags=(
        *FINDING_FLAGS,
        Flag("output.json"),
        Flag("output.quiet"),
    ),
)
def status(settings: Settings) -> None:
    """Show how a swarm is: which blocks have servers, who they are, how fast, how far, and what is wrong.

    It is seen from a --peer of it, by an --invite to it, or else from a server on the local network.

    Examples:

    corolla swarm status --peer tls://192.0.2.7:31330

    corolla swarm status --invite invite.txt --json
    """
    output, config = Output(settings.get(OutputConfig)), with_state(settings.get(SwarmConfig))
    look = anyio.run(look_at_swarm, config, find_peers(settings, output))
    models = [
        (model, sorted(servers, key=lambda one: (one.span, one.peer)))
        for model, servers in groupby(sorted(look.snapshot.announcements, key=_model_of), key=_model_of)
    ]
    if output.is_json:
        output.json(
            {
                "swarm": Invite.read(config.invite).grant.swarm if config.invite else None,
                "models": [_model_as_data(servers, look) for _, servers in models],
                "dropped": look.dropped,
            }
        )
        return
    for model, servers in models:
        output.result(f"{without_controls(servers[0].model_name)}  {model[:12]}", style="bold")
        show_servers(servers, servers[0].num_blocks, output, look.rtts_s)
        if problems := _problems(servers, look):
            output.result(
                "problems: " + ", ".join(f"{count} {what}" for what, count in problems.items()), style="yellow"
            )
        output.result("")
    if not models:
        output.result("the swarm has no server")
    if look.dropped:
        reasons = ", ".join(f"{count} {why}" for why, count in sorted(look.dropped.items()))
        output.result(f"dropped announcements: {reasons}", style="yellow")


@command(sections=("invite",), flags=(Flag("invite.swarm", "NAME"), *_INVITE_FLAGS))
def new(settings: Settings) -> None:
    """Make a private swarm: its key, and a first invite, which is all that is written to standard output.

    Only peers with an invite can serve or use it. Whoever has the key can invite.

    Examples:

    corolla swarm new > invite.txt

    corolla swarm new lab --expires 90d --name "everybody in the lab"
    """
    output, config = Output(settings.get(OutputConfig)), settings.get(InviteConfig)
    owned = OwnedSwarm.create(_home(), config.swarm or "home")
    output.note(f"made the private swarm {owned.name!r}, {owned.id}")
    output.note(f"its key is in {owned.key_path}: whoever has it can let anyone in; keep a copy in a safe place")
    _issue(owned, config, output)
    output.note("to start it:      corolla serve MODEL --invite INVITE", style="bold")
    output.note(f"to let others in: corolla swarm invite --swarm {owned.name} --peer ADDRESS", style="bold")


@command(sections=("invite",), flags=(Flag("invite.swarm"), *_INVITE_FLAGS))
def invite(settings: Settings) -> None:
    """Make an invite to a private swarm of this account, and write it to standard output: one line, to be sent on.

    It may be used by several peers of its holder. Addresses of peers in it make it enough to join by itself.

    Examples:

    corolla swarm invite --peer tls://192.0.2.7:31330

    corolla swarm invite --for use --expires 12h --name Ada
    """
    config = settings.get(InviteConfig)
    _issue(OwnedSwarm.open(_home(), config.swarm), config, Output(settings.get(OutputConfig)))


@command(
    sections=("invite", "swarm"),
    flags=(
        Flag("invite.id", "INVITE-ID"),
        Flag("invite.swarm"),
        Flag("invite.peers", "--peer"),
        Flag("output.json"),
        Flag("output.quiet"),
    ),
)
def revoke(settings: Settings) -> None:
    """Revoke an invite: peers that came by it are cut off, and the swarm tells it on.

    The swarm is told at a --peer of it, or at the addresses in its invites. Doing it again tells it again.

    Examples:

    corolla swarm revoke 3f9a1c2b
    """
    output, config = Output(settings.get(OutputConfig)), settings.get(InviteConfig)
    if config.id is None:
        raise UsageError("say which invite to revoke; corolla swarm list shows them")
    owned = OwnedSwarm.open(_home(), config.swarm)
    revoked = owned.revoke(config.id)
    revocations = owned.revocations(time.time())
    peers = config.peers or tuple(dict.fromkeys(peer for one in owned.issued() for peer in one.peers))
    own = replace(with_state(settings.get(SwarmConfig)), invite=owned.own_invite(round(time.time()) + _OWN_S).line)
    _remember(own, revocations)
    told, problem = anyio.run(_tell, own, peers, revocations) if peers else (0, "no address of a peer is known")
    if output.is_json:
        output.json({"invite": revoked.id, "swarm": owned.id, "told": told, "problem": problem})
        return
    output.result(f"revoked invite {revoked.id[:8]}{f' of {revoked.name}' if revoked.name else ''}")
    if problem is None:
        output.note(f"servers told: {told}; they tell all others")
    else:
        output.note(f"the swarm does not know it yet: {problem}", style="yellow")
        output.note(
            f"to tell it: corolla swarm revoke {revoked.id[:8]} --swarm {owned.name} --peer ADDRESS", style="bold"
        )


@command(sections=("invite",), flags=(Flag("invite.swarm"), Flag("output.json"), Flag("output.quiet")))
def list_(settings: Settings) -> None:
    """List the private swarms of this account, and the invites that were made to them.

    Examples:

    corolla swarm list --json
    """
    output, config = Output(settings.get(OutputConfig)), settings.get(InviteConfig)
    names = [config.swarm] if config.swarm else OwnedSwarm.names(_home())
    swarms = [OwnedSwarm.open(_home(), name) for name in names]
    if output.is_json:
        output.json(
            [{"swarm": one.id, "name": one.name, "key": str(one.key_path), "invites": one.issued()} for one in swarms]
        )
        return
    for owned in swarms:
        output.result(f"{owned.name}  {owned.id}", style="bold")
        table = Table("invite", "for", "allows", "until", "", box=None, header_style="dim")
        for one in owned.issued():
            cells = [one.id[:8], one.name, one.allows, _until(one.expires_s), _state(one)]
            table.add_row(*(Text(without_controls(cell)) for cell in cells))
        output.result(table)
    if not swarms:
        output.note("this account owns no swarm; make one with: corolla swarm new")


for _command in (status, new, invite, revoke, list_):
    swarm.add_typer(_command)


def _home() -> Path:
    return user_config_path("corolla", appauthor=False) / "swarms"


def _issue(owned: OwnedSwarm, config: InviteConfig, output: Output) -> None:
    expires_s = None if math.isinf(config.expires_s) else round(time.time() + config.expires_s)
    made = owned.invite(allows=config.allows, expires_s=expires_s, name=config.name, peers=config.peers)
    start = made.grant.invite[:8]
    if output.is_json:
        output.json({"invite": made.line, "id": made.grant.invite, "swarm": owned.id, "expires_s": expires_s})
        return
    output.note(f"invite {start} for {_ALLOWED[config.allows]}, until {_until(expires_s)}; keep it like a password")
    output.result(made.line)
    output.note(f"to take it back: corolla swarm revoke {start} --swarm {owned.name}")


_ALLOWED = {"serve": "serving only", "use": "using only", "both": "serving and using"}


def _until(expires_s: int | None) -> str:
    return "it is revoked" if expires_s is None else describe_time(expires_s)


def _state(issued: Issued) -> str:
    if issued.is_revoked:
        return "revoked"
    return "expired" if issued.expires_s is not None and time.time() > issued.expires_s else ""


def _remember(config: SwarmConfig, revocations: Revocations) -> None:
    """Write the list down where servers on this machine look for it when they start."""
    membership = Endpoint(Identity.generate(), [], config).membership
    if membership is not None:
        membership.hear(revocations.encode())
        membership.save()


async def _tell(config: SwarmConfig, peers: tuple[str, ...], revocations: Revocations) -> tuple[int, str | None]:
    """Bring the list of revoked invites to all servers that can be seen; count them, or say what is in the way."""
    try:
        async with watching(config, peers) as (endpoint, watcher):
            if endpoint.membership is not None:
                endpoint.membership.hear(revocations.encode())
            told = 0
            for server in watcher.snapshot().announcements:
                try:
                    await endpoint.greet(server.peer, server.addresses)
                    told += 1
                except Error:
                    continue
            return told, None
    except Error as error:
        return 0, error.message


def _model_of(server: Announcement) -> str:
    return server.model


def _model_as_data(servers: list[Announcement], look: Look) -> dict[str, object]:
    one = servers[0]
    return {
        "model": one.model,
        "name": one.model_name,
        "blocks": one.num_blocks,
        "servers_of_block": count_servers(servers, one.num_blocks),
        "problems": _problems(servers, look),
        "servers": [server_as_data(server, look.rtts_s) for server in servers],
    }


def _problems(servers: list[Announcement], look: Look) -> dict[str, int]:
    """Count what is not as it should be."""
    versions = Counter(server.version for server in servers)
    found = {
        "blocks without a server": count_servers(servers, servers[0].num_blocks).count(0),
        "servers that did not answer": sum(server.peer not in look.rtts_s for server in servers),
        "servers that are joining": sum(server.state == "joining" for server in servers),
        "servers that are leaving": sum(server.state == "draining" for server in servers),
        "servers of another version than most": len(servers) - versions.most_common(1)[0][1],
    }
    return {what: count for what, count in found.items() if count}
