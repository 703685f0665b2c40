"""``corolla hub``: adapters that are published, found and pulled."""

import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import msgspec
import typer
from platformdirs import user_config_path
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from corolla.cli.config import OutputConfig, ShareConfig
from corolla.cli.console import Output, without_controls
from corolla.cli.finding import find_peers
from corolla.cli.flags import FINDING_FLAGS, Flag, command
from corolla.cli.settings import Settings
from corolla.cli.state import with_state
from corolla.errors import BadAdapter, UsageError
from corolla.hub import HubConfig, open_repository
from corolla.sharing import AdapterFiles, Card, Shelf, Store, describe_files, find_files, open_store
from corolla.swarm import Identity, SwarmConfig

__all__ = ["hub", "pull", "push", "search", "show"]

_SECTIONS = ("share", "hub", "chat", "client", "swarm")
_OUTPUT = (Flag("hub.endpoint"), Flag("output.json"), Flag("output.quiet"))

hub = typer.Typer(
    help="Publish adapters, find those of others, and bring them here.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@command(
    sections=_SECTIONS,
    flags=(
        Flag("share.adapter", "ADAPTER"),
        Flag("share.place", "--to"),
        Flag("share.base"),
        Flag("share.name"),
        Flag("share.data"),
        Flag("share.metrics", "--metric"),
        Flag("share.licence"),
        Flag("share.parent"),
        Flag("share.identity"),
        *FINDING_FLAGS,
        *_OUTPUT,
    ),
)
def push(settings: Settings) -> None:
    """Publish an adapter: write and sign its card, and put both where others find them.

    The card binds the adapter to the exact weights that it is for, and says who made it, from what, and how good it is.
    It is put on this machine's shelf in any case. An adapter that has a card already is passed on as it is.

    Examples:

    corolla hub push run/adapter --base smollm2 --data "10,605 film reviews" --metric accuracy=0.83 --licence MIT

    corolla hub push run/adapter --to hf:me/reviews

    corolla hub push reviews --to swarm --peer tls://192.0.2.7:31330
    """
    output, share, config = Output(settings.get(OutputConfig)), settings.get(ShareConfig), settings.get(HubConfig)
    shelf = Shelf(config.adapters)
    files = find_files(_named(share), shelf)
    card = files.card or _write_card(files, share, config, shelf)
    kept = shelf.put(files, card)
    names = [card.id]
    if share.place is not None:
        with _store(settings, share.place, output) as store:
            names.append(store.push(kept, card))
    if output.is_json:
        output.json({"id": card.id, "label": card.label, "pushed_to": names[1:], "directory": str(kept.directory)})
        return
    output.result(card.id)
    output.note(f"published {card.label}, {decimal(card.size_bytes)}" + (f", as {names[1]}" if names[1:] else ""))


@command(
    sections=_SECTIONS,
    flags=(Flag("share.words", "WORDS"), Flag("share.place", "--in"), Flag("share.base"), *FINDING_FLAGS, *_OUTPUT),
)
def search(settings: Settings) -> None:
    """Find adapters by words of their cards.

    Examples:

    corolla hub search reviews --base smollm2

    corolla hub search --in swarm --peer tls://192.0.2.7:31330
    """
    output, share, config = Output(settings.get(OutputConfig)), settings.get(ShareConfig), settings.get(HubConfig)
    base = None if share.base is None else open_repository(share.base, config=config).model_id
    with _store(settings, share.place or str(config.adapters), output) as store:
        cards = store.search(share.words, base)
    if output.is_json:
        output.json([_as_data(card) for card in cards])
        return
    table = Table("adapter", "for", "how", "licence", "size", "by", box=None, header_style="dim")
    for card in cards:
        cells = [card.label, card.base_name, card.method, card.licence, decimal(card.size_bytes), card.author[:8]]
        table.add_row(*(Text(without_controls(cell), overflow="fold") for cell in cells))
    if cards:
        output.result(table)
    else:
        output.note("no adapter was found")


@command(
    sections=_SECTIONS,
    flags=(
        Flag("share.adapter", "ADAPTER"),
        Flag("share.place", "--from"),
        Flag("share.out"),
        *FINDING_FLAGS,
        *_OUTPUT,
    ),
)
def pull(settings: Settings) -> None:
    """Bring a published adapter here, and check that it is what its card says.

    Without --from, a name like owner/name is of the Hugging Face hub. What it prints is a directory in PEFT's format.

    Examples:

    corolla hub pull me/reviews

    corolla hub pull 3f1c09a2be77 --from swarm --peer tls://192.0.2.7:31330 --out adapter
    """
    output, share, config = Output(settings.get(OutputConfig)), settings.get(ShareConfig), settings.get(HubConfig)
    name = _named(share)
    place = share.place or ("hf" if "/" in name else str(config.adapters))
    with _store(settings, place, output) as store:
        files = store.pull(name, Shelf(config.adapters))
    directory = files.directory
    if share.out is not None:
        if share.out.exists():
            raise UsageError(f"{share.out} is there already; name a directory that is not")
        shutil.copytree(directory, share.out)
        directory = share.out
    if output.is_json:
        output.json({"directory": str(directory), "id": files.card.id if files.card else None})
        return
    output.result(str(directory))


@command(sections=_SECTIONS, flags=(Flag("share.adapter", "ADAPTER"), *_OUTPUT))
def show(settings: Settings) -> None:
    """Show the card of an adapter that lies here, after checking all of it.

    Examples:

    corolla hub show reviews
    """
    output, share, config = Output(settings.get(OutputConfig)), settings.get(ShareConfig), settings.get(HubConfig)
    files = find_files(_named(share), Shelf(config.adapters))
    if files.card is None:
        raise BadAdapter(f"the adapter in {files.directory} has no card; corolla hub push writes one")
    if output.is_json:
        output.json(_as_data(files.card))
        return
    _show(files.card, files.directory, output)


for _command in (push, search, pull, show):
    hub.add_typer(_command)


def _named(share: ShareConfig) -> str:
    if share.adapter is None:
        raise UsageError("say which adapter: a directory, or the id or name of a published one")
    return share.adapter


def _write_card(files: AdapterFiles, share: ShareConfig, config: HubConfig, shelf: Shelf) -> Card:
    base = share.base or files.settings.get("base_model_name_or_path")
    if not base:
        raise UsageError(f"the adapter in {files.directory} does not say what it is for; say --base MODEL")
    repository = open_repository(base, config=config)
    key = share.identity or user_config_path("corolla", appauthor=False) / "author.pem"
    parent = None if share.parent is None else shelf.find(share.parent).id
    card = describe_files(
        files,
        repository,
        name=share.name or files.directory.resolve().name,
        data=share.data,
        metrics=share.numbers,
        licence=share.licence,
        parent=parent,
    ).sign(Identity.load_or_create(key))
    return Card.read(card.encode())


@contextmanager
def _store(settings: Settings, place: str, output: Output) -> Iterator[Store]:
    """Open a store; that of a swarm for as long as this peer is in it."""
    if place != "swarm":
        yield open_store(place, settings.get(HubConfig))
        return
    from corolla.client import ClientConfig, Swarm, SwarmStore

    peers = find_peers(settings, output)
    swarm = Swarm(peers, config=settings.get(ClientConfig), swarm_config=with_state(settings.get(SwarmConfig)))
    with closing(swarm):
        yield SwarmStore(swarm)


def _as_data(card: Card) -> dict[str, object]:
    return {"id": card.id, **msgspec.to_builtins(card)}


def _show(card: Card, directory: Path, output: Output) -> None:
    rows = {
        "adapter": card.label,
        "id": card.id,
        "for": f"{card.base_name} ({card.base})" + (f" at {card.base_revision}" if card.base_revision else ""),
        "method": card.method,
        "trained on": card.data or "not said",
        "metrics": ", ".join(f"{name} {value:g}" for name, value in card.metrics.items()) or "none",
        "licence": card.licence or "not said",
        "parent": card.parent or "none",
        "signed by": card.author,
        "size": decimal(card.size_bytes),
        "directory": str(directory),
    }
    table = Table(box=None, show_header=False)
    for name, value in rows.items():
        table.add_row(Text(name, "bold"), Text(without_controls(value), overflow="fold"))
    output.result(table)
