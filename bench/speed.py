"""How fast a swarm on this machine is, beside transformers on the same machine with the same threads.

SmolLM2-135M-Instruct, greedy, one thread for each process: the local reference and the swarms of one, two and three
servers take turns, so that a change of the machine's mood meets all of them. Prompts are counted through the whole
model with the head for the last token only; decoding is counted from the first new token on.
"""

# B batch, T tokens

import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.progress import track
from transformers import AutoModelForCausalLM as LocalModel
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from bench.report import Row, write_report
from corolla.blocks import compute_dtype, weight_format
from corolla.client import AutoModelForCausalLM, Session, Swarm
from corolla.hub import HubConfig, open_repository
from corolla.server.limits import Sharing
from corolla.terms import DType, Precision
from corolla.testing import LocalSwarm

__all__ = ["main"]

MODEL = "smollm2"
BLOCKS = 30
DTYPES: dict[str, DType] = {"fp32": "float32", "bf16": "bfloat16"}
HOPS = (1, 2, 3)
SESSIONS = (4, 8)
PROMPTS = (512, 2048)
NEW_TOKENS = 48
ROUNDS = 3
OPENINGS = 20
CONTEXT = 2304


class Clock(BaseStreamer):  # type: ignore[misc]  # transformers has no types
    """Notes when each token comes, and what it cost where, if a session tells."""

    def __init__(self, session: Any = None) -> None:
        self.times_s: list[float] = []
        self.shares: list[float] = []
        self._session = session

    def put(self, value: torch.Tensor) -> None:
        """Take a token; the first call brings the prompt."""
        self.times_s.append(time.perf_counter())
        timings = self._session.timings if self._session is not None else ()
        if timings:
            total_s = sum(hop.total_s for hop in timings)
            self.shares.append(sum(hop.network_s for hop in timings) / total_s)

    def end(self) -> None:
        """Take note of the end."""

    @property
    def tokens_per_s(self) -> float:
        """The rate from the first new token to the last."""
        return (len(self.times_s) - 2) / (self.times_s[-1] - self.times_s[1])


@dataclass
class Contender:
    """One of those that take turns: how it decodes and how it takes a prompt."""

    name: str
    decode: Callable[[], float]
    prefill: Callable[[int], float]
    decoded: list[float] = field(default_factory=list)
    prefilled: dict[int, list[float]] = field(default_factory=dict)


def main() -> None:
    """Measure both precisions, print the table, write the report."""
    torch.set_num_threads(1)
    rows: list[Row] = []
    for label, dtype in DTYPES.items():
        rows += measure(label, dtype)
    write_report("speed", rows, f"{MODEL} on one machine, 1 thread a process, medians of {ROUNDS} rounds in turns")


def measure(label: str, dtype: DType) -> list[Row]:
    """Measure one precision: local, and through one, two and three servers."""
    directory = open_repository(MODEL, config=HubConfig()).metadata_directory()
    local = LocalModel.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()
    with ExitStack() as stack:
        remote = {hops: stack.enter_context(swarm_of(hops, dtype)) for hops in HOPS}
        models = {hops: model for hops, (model, _) in remote.items()}
        contenders = [contender(f"local {label}", local, None)]
        contenders += [contender(f"{hops} hops {label}", model, model) for hops, model in models.items()]
        for _ in track(range(ROUNDS), description=f"{label}: taking turns"):
            for one in contenders:
                one.decoded.append(one.decode())
                for tokens in PROMPTS:
                    one.prefilled.setdefault(tokens, []).append(one.prefill(tokens))
        rows = speeds(contenders)
        rows += together(label, models[max(HOPS)])
        rows += overheads(label, models[max(HOPS)], remote[max(HOPS)][1])
    return rows


@contextmanager
def swarm_of(hops: int, precision: Precision, sharing: Sharing = "nobody") -> Iterator[tuple[Any, LocalSwarm]]:
    """Start servers that share the blocks evenly, and load a client's model.

    Args:
        hops: How many servers.
        precision: What they hold weights in.
        sharing: Whose sessions are spared what was computed before; for nobody's, as prompts come round after round.
    """
    cuts = [round(BLOCKS * hop / hops) for hop in range(hops + 1)]
    spans = [f"{start}:{stop}" for start, stop in zip(cuts, cuts[1:], strict=False)]
    with tempfile.TemporaryDirectory() as logs:
        arguments = ("--precision", precision, "--threads", "1", "--kv-bytes", "1GiB", "--sharing", sharing)
        with LocalSwarm(MODEL, spans, *arguments, logs=Path(logs)) as servers, Swarm(servers.address) as swarm:
            servers.wait_until_online()
            edges = compute_dtype(weight_format(precision))
            yield AutoModelForCausalLM.from_pretrained(MODEL, swarm=swarm, dtype=edges), servers


def contender(name: str, model: Any, remote: Any) -> Contender:
    """Wrap a model, local or of a swarm, for taking turns."""
    prompt_BT = tokens_of(model, 32)

    def decode() -> float:
        with ExitStack() as stack:
            session = stack.enter_context(remote.session(CONTEXT)) if remote else None
            clock = Clock()
            extra = {"session": session} if session else {}
            generate(model, prompt_BT, clock, **extra)
            return clock.tokens_per_s

    def prefill(tokens: int) -> float:
        tokens_BT = tokens_of(model, tokens)
        with ExitStack() as stack, torch.inference_mode():
            cache = stack.enter_context(remote.session(CONTEXT)) if remote else DynamicCache(config=model.config)
            if remote:
                model(tokens_BT[:, :1], past_key_values=cache)  # opens the session
                cache.position = 0
            started_s = time.perf_counter()
            model(tokens_BT, past_key_values=cache, logits_to_keep=1)
            return tokens / (time.perf_counter() - started_s)

    return Contender(name, decode, prefill)


def generate(model: Any, prompt_BT: torch.Tensor, clock: Clock, **extra: Any) -> None:
    """Decode greedily for as long as is measured."""
    model.generate(
        prompt_BT, do_sample=False, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, streamer=clock, **extra
    )


def tokens_of(model: Any, count: int) -> torch.Tensor:
    """Make a prompt, always the same."""
    generator = torch.Generator().manual_seed(count)
    return torch.randint(3, model.config.vocab_size, (1, count), generator=generator)


def speeds(contenders: list[Contender]) -> list[Row]:
    """Compare decoding and prompts with the first contender."""
    rows: list[Row] = []
    base = contenders[0]
    for one in contenders:
        versus = None if one is base else f"decode, {base.name}"
        ratio = None if one is base else paired(one.decoded, base.decoded)
        rows.append(Row(f"decode, {one.name}", statistics.median(one.decoded), "tokens/s", versus, ratio))
    for tokens in PROMPTS:
        for one in contenders:
            versus = None if one is base else f"prefill {tokens}, {base.name}"
            ratio = None if one is base else paired(one.prefilled[tokens], base.prefilled[tokens])
            value = statistics.median(one.prefilled[tokens])
            rows.append(Row(f"prefill {tokens}, {one.name}", value, "tokens/s", versus, ratio))
    return rows


def paired(values: list[float], base: list[float]) -> float:
    """The median of the ratios of the same round."""
    return statistics.median(value / other for value, other in zip(values, base, strict=True))


def together(label: str, model: Any) -> list[Row]:
    """Decode with one session, then with several at once, on the same swarm; all sessions share one client process."""
    rates = {count: [] for count in (1, *SESSIONS)}  # type: dict[int, list[float]]
    for _ in track(range(ROUNDS), description=f"{label}: several sessions"):
        for count, found in rates.items():
            found.append(rate_of(count, model))
    base = f"1 session, {label}"
    rows = [Row(base, statistics.median(rates[1]), "tokens/s")]
    for count in SESSIONS:
        value = statistics.median(rates[count])
        rows.append(Row(f"{count} sessions, {label}", value, "tokens/s", base, paired(rates[count], rates[1])))
    return rows


def rate_of(count: int, model: Any) -> float:
    """The tokens per second of so many sessions in all, while all of them decode."""
    clocks = [Clock() for _ in range(count)]
    prompt_BT = tokens_of(model, 32)
    threads = [threading.Thread(target=generate, args=(model, prompt_BT, clock)) for clock in clocks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    started_s = max(clock.times_s[1] for clock in clocks)
    ended_s = min(clock.times_s[-1] for clock in clocks)
    tokens = sum(started_s < at_s <= ended_s for clock in clocks for at_s in clock.times_s)
    return tokens / (ended_s - started_s)


def own_bytes(pid: int) -> int:
    """What a process holds for itself: its anonymous memory, and what it has mapped of files with weights.

    The rest of what is resident are pages of libraries, which all processes of the machine share.
    """
    folder = Path(f"/proc/{pid}")
    if not folder.is_dir():  # only Linux tells them apart
        return int(psutil.Process(pid).memory_info().rss)
    held_kib, is_weights = 0, False
    for line in (folder / "smaps").read_text(encoding="utf-8").splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            is_weights = line.endswith(".safetensors")
        elif name == "Anonymous:" or (name == "Rss:" and is_weights):
            held_kib += int(rest[0])
    return held_kib * 1024


def overheads(label: str, model: Any, servers: LocalSwarm) -> list[Row]:
    """Measure what is not computing: opening a session, network and codec in a step, memory beyond the weights."""
    times_ms = []
    for _ in range(OPENINGS):
        session = Session(model.swarm.core, model.blocks.target, rows=1, max_tokens=CONTEXT)
        started_s = time.perf_counter()
        model.swarm.call(session.open)
        times_ms.append(1000 * (time.perf_counter() - started_s))
        model.swarm.call(session.close)
    with model.session(CONTEXT) as session:
        clock = Clock(session)
        generate(model, tokens_of(model, 32), clock, session=session)
    rows = [
        Row(f"open a session, 3 hops, {label}", statistics.median(times_ms), "ms"),
        Row(f"network and codec in a decode step, 3 hops, {label}", statistics.median(clock.shares[1:]), "of the step"),
    ]
    weights_bytes = 3_540_096 * (BLOCKS // max(HOPS)) * getattr(torch, DTYPES[label]).itemsize
    for index, server in enumerate(servers.servers):
        resident_bytes = psutil.Process(server.process.pid).memory_info().rss
        held_bytes = own_bytes(server.process.pid)
        name = f"server {index + 1} of 3, {label}"
        spare_mib = (held_bytes - 1.3 * weights_bytes) / 2**20
        rows.append(Row(f"resident memory, {name}", resident_bytes / 2**20, "MiB"))
        rows.append(Row(f"memory of its own beyond 1.3 x its weights, {name}", spare_mib, "MiB"))
    return rows
