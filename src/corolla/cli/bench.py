"""``corolla bench``: what this machine would give to a swarm."""

import statistics
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

import anyio
import typer
from rich.filesize import decimal
from rich.table import Table

from corolla.cli.config import OutputConfig
from corolla.cli.console import Output
from corolla.cli.flags import Flag, command
from corolla.cli.progress import show_progress
from corolla.cli.settings import Settings
from corolla.cli.state import with_state
from corolla.engine import EngineConfig
from corolla.hub import HubConfig
from corolla.monitor import look_at_swarm
from corolla.server import ServerConfig
from corolla.swarm import SwarmConfig
from corolla.terms import Precision

if TYPE_CHECKING:
    from corolla.server.trial import Trial

__all__ = ["bench", "server"]

_SESSION_TOKENS: Final = 2048

bench = typer.Typer(
    help="Measure what this machine would give to a swarm.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@bench.callback()
def _bench() -> None:
    """Measure what this machine would give to a swarm."""


@command(
    sections=("server", "engine", "swarm", "hub"),
    flags=(
        Flag("server.model", "MODEL"),
        Flag("server.precision"),
        Flag("server.num_blocks"),
        Flag("server.device"),
        Flag("server.peers", "--peer"),
        Flag("swarm.invite"),
        Flag("engine.threads"),
        Flag("engine.kv_bytes"),
        Flag("hub.offline"),
        Flag("output.json"),
        Flag("output.quiet"),
    ),
)
def server(settings: Settings) -> None:
    """Measure what a server of MODEL on this machine would give, in each precision or the one that is named.

    Some of the model's blocks, four unless --num-blocks says otherwise, are downloaded, loaded and timed. From that
    follows how many blocks would fit, how fast they would be for one session, and how many sessions they could hold.
    With a --peer of a swarm, the time to its servers and back is measured as well. Nothing is announced.

    Examples:

    corolla bench server smollm2

    corolla bench server meta-llama/Llama-3.1-8B --precision nf4 --peer tls://192.0.2.7:31330
    """
    output, config = Output(settings.get(OutputConfig)), settings.get(ServerConfig)
    from corolla.server.trial import try_precision

    with show_progress(output) as report:
        how: dict[str, Any] = {"engine": settings.get(EngineConfig), "hub": settings.get(HubConfig), "report": report}
        trials = [anyio.run(partial(try_precision, config, precision, **how)) for precision in _precisions(config)]
    rtts_s = _rtts_s(with_state(settings.get(SwarmConfig)), config.peers)
    if output.is_json:
        output.json({"model": config.model, "precisions": [_as_data(trial) for trial in trials], "rtts_s": rtts_s})
        return
    output.result(_table(config.model, trials))
    if rtts_s:
        output.result(f"{len(rtts_s)} servers answer in {statistics.median(rtts_s) * 1000:.0f} ms, there and back")
    elif rtts_s is not None:
        output.result("no server of that swarm answers")


def _as_data(trial: "Trial") -> dict[str, object]:
    """Give a trial as data, with the number of sessions that it means."""
    speed = trial.speed and {
        "decode_tokens_per_s": trial.speed.decode_tokens_per_s,
        "prefill_tokens_per_s": trial.speed.prefill_tokens_per_s,
    }
    return {**asdict(trial), "speed": speed, "sessions": trial.sessions_tokens // _SESSION_TOKENS}


def _precisions(config: ServerConfig) -> list[Precision]:
    if config.precision is not None:
        return [config.precision]
    has_nf4 = find_spec("bitsandbytes") is not None
    return ["float32", "bfloat16", "int8", "nf4"] if has_nf4 else ["float32", "bfloat16", "int8"]


def _rtts_s(config: SwarmConfig, peers: tuple[str, ...]) -> list[float] | None:
    if not (peers or config.invite):
        return None
    look = anyio.run(look_at_swarm, config, peers)
    return sorted(look.rtts_s.values())


def _table(model: str, trials: "list[Trial]") -> Table:
    made = Table(title=f"a server of {model} on this machine")
    made.add_column("precision")
    sessions = f"sessions of {_SESSION_TOKENS:,} tokens"
    for heading in ("blocks that fit", "memory", "tokens/s, one session", "prompt tokens/s", sessions):
        made.add_column(heading, justify="right")
    for one in trials:
        if one.speed is None:
            made.add_row(one.precision, "0", "-", "-", "-", "-")
            continue
        made.add_row(
            one.precision,
            f"{one.fitting_blocks} of {one.num_blocks}",
            decimal(one.fitting_bytes),
            f"{one.speed.decode_tokens_per_s:.1f}",
            f"{one.speed.prefill_tokens_per_s:.0f}",
            f"{one.sessions_tokens // _SESSION_TOKENS:,}",
        )
    return made


bench.add_typer(server)
