"""``corolla info``: what a model is, whether it can be served, and who serves it."""

from typing import TypedDict, get_args

import anyio
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from corolla.cli.config import ChatConfig, OutputConfig
from corolla.cli.console import Output, without_controls
from corolla.cli.finding import is_told, seek_peers
from corolla.cli.flags import FINDING_FLAGS, Flag, command
from corolla.cli.progress import show_progress
from corolla.cli.servers import server_as_data, show_servers
from corolla.cli.settings import Settings
from corolla.cli.state import with_state
from corolla.errors import UsageError
from corolla.hub import HubConfig, Progress, open_repository
from corolla.monitor import look_at_swarm
from corolla.swarm import SwarmConfig
from corolla.terms import ModelId, Precision

__all__ = ["info"]


class _Model(TypedDict):
    """What is known of a model from its files."""

    name: str
    model_id: ModelId
    family: str
    is_supported: bool
    is_packable: bool
    can_rewind: bool
    reason: str
    blocks: int
    hidden_size: int
    context_tokens: int | None
    block_bytes: dict[str, int]
    files: list[str]


@command(
    sections=("chat", "client", "swarm", "hub"),
    flags=(
        Flag("chat.model", "MODEL"),
        *FINDING_FLAGS,
        Flag("output.json"),
        Flag("output.quiet"),
    ),
)
def info(settings: Settings) -> None:
    """Show what a model is, and who serves it.

    Who serves it is seen from a --peer of the swarm, or from whoever is found; without MODEL, it is the only model that
    the swarm has.

    Examples:

    corolla info meta-llama/Llama-3.1-70B-Instruct

    corolla info --peer tls://192.0.2.7:31330 --json
    """
    output, config = Output(settings.get(OutputConfig)), settings.get(ChatConfig)
    swarm = with_state(settings.get(SwarmConfig))
    peers = config.peers
    if not peers and not is_told(swarm):
        peers = seek_peers(settings, output, config.model, is_one_model=config.model is None)
    look = anyio.run(look_at_swarm, swarm, peers) if peers or is_told(swarm) else None
    name = config.model
    if name is None and look is not None:
        from corolla.client import only_model

        name = only_model(look.snapshot)
    if name is None:
        raise UsageError("name a model, or a peer of a swarm that serves one: corolla info MODEL, or --peer ADDRESS")
    with show_progress(output) as report:
        model = _describe(name, settings.get(HubConfig), report)
    servers = [one for one in look.snapshot.announcements if one.model == model["model_id"]] if look else []
    if output.is_json:
        seen = [server_as_data(one, look.rtts_s) for one in servers] if look else None
        output.json({**model, "servers": seen, "dropped": look.dropped if look else None})
        return
    _show_model(model, output)
    if look is not None:
        show_servers(servers, model["blocks"], output, look.rtts_s)


def _describe(name: str, hub: HubConfig, report: Progress) -> _Model:
    """Read a model's small files and test its family."""

    from corolla.blocks import (
        block_bytes,
        check_family,
        context_tokens,
        hidden_size,
        load_config,
        num_blocks,
        weight_format,
    )

    repository = open_repository(name, config=hub, report=report)
    config = load_config(repository.metadata_directory())
    family = check_family(config)
    blocks = num_blocks(config)
    middle = blocks // 2  # the first and the last are special in some families
    return _Model(
        name=repository.name,
        model_id=repository.model_id,
        family=config.model_type,
        is_supported=family.is_supported,
        is_packable=family.is_packable,
        can_rewind=family.can_rewind,
        reason=family.reason,
        blocks=blocks,
        hidden_size=hidden_size(config),
        context_tokens=context_tokens(config),
        block_bytes={
            precision: block_bytes(config, weight_format(precision))[middle] for precision in get_args(Precision)
        },
        files=sorted(set(repository.weight_map.values())),
    )


def _show_model(model: _Model, output: Output) -> None:
    support = "yes" if model["is_supported"] else f"no: {model['reason']}"
    if model["is_supported"] and not model["is_packable"]:
        support += f", each session by itself ({model['reason']})"
    files = model["files"]
    rows = {
        "model": model["name"],
        "id": model["model_id"],
        "family": model["family"],
        "can be served": support,
        "blocks": str(model["blocks"]),
        "width": str(model["hidden_size"]),
        "context": f"{model['context_tokens']} tokens" if model["context_tokens"] else "no limit stated",
        "a block": ", ".join(f"{decimal(size)} in {precision}" for precision, size in model["block_bytes"].items()),
        "weight files": files[0] + (f" ... {files[-1]} ({len(files)})" if len(files) > 1 else ""),
    }
    table = Table(box=None, show_header=False)
    for name, value in rows.items():
        table.add_row(Text(name, "bold"), Text(without_controls(value), overflow="fold"))
    output.result(table)
