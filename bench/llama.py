"""A swarm of two servers beside llama.cpp's RPC mode with two servers: the same shape, on this machine, in turns.

Needs llama.cpp built with GGML_RPC=ON: ``LLAMA_CPP_BIN`` names the directory with ``llama-bench``, ``llama-quantize``
and ``ggml-rpc-server``; without it there is nothing to compare with, and it says so. The weights that llama.cpp gets
are those of the demo model, but its tokenizer is left out and query and key keep transformers' order, which changes
what it computes and not how fast. llama.cpp counts its head in, and so does a swarm's client.
"""

import json
import os
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from transformers import AutoModelForCausalLM

from bench.report import Row, write_report
from bench.speed import MODEL, NEW_TOKENS, contender, paired, rate_of, swarm_of
from corolla.hub import HubConfig, open_repository
from corolla.terms import Precision

__all__ = ["main"]

PAIRS: dict[str, tuple[Precision, str]] = {
    "fp32": ("float32", "F32"),
    "bf16": ("bfloat16", "BF16"),
    "4-bit": ("nf4", "Q4_1"),
}
HOPS = 2
PROMPT = 512
SESSIONS = 8
ROUNDS = 2
START_S = 30
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attn_output",
    "self_attn.": "attn_",
    "mlp.": "ffn_",
    "_proj.weight": ".weight",
    "model.layers.": "blk.",
}


def main() -> None:
    """Measure each pair of precisions in turns, print the table, write the report."""
    torch.set_num_threads(1)
    binaries = os.environ.get("LLAMA_CPP_BIN")
    if not binaries:
        print("skipped: LLAMA_CPP_BIN does not name a directory with llama.cpp's programs, built with GGML_RPC=ON")
        return
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        plain = write_gguf(Path(scratch) / "F32.gguf")
        for label, (ours, theirs) in PAIRS.items():
            rows += measure(label, ours, Llama(Path(binaries), plain, theirs))
    write_report("llama", rows, f"{MODEL} through {HOPS} servers and llama.cpp's RPC, 1 thread each, {ROUNDS} rounds")


def measure(label: str, precision: Precision, llama: "Llama") -> list[Row]:
    """Let both take turns in one precision."""
    found: dict[str, list[float]] = {}
    with ExitStack() as stack:
        servers = stack.enter_context(llama.servers())
        model, _ = stack.enter_context(swarm_of(HOPS, precision))
        one = contender(label, model, model)
        for _ in track(range(ROUNDS), description=f"{label}: taking turns"):
            for name, value in {
                **{f"llama.cpp {what}": rate for what, rate in llama.rates(servers).items()},
                "decode": one.decode(),
                "prefill": one.prefill(PROMPT),
                "one": rate_of(1, model),
                "several": rate_of(SESSIONS, model),
            }.items():
                found.setdefault(name, []).append(value)
    rows = []
    for what in ("decode", "prefill"):
        base = f"llama.cpp, {what}, {llama.kind}"
        theirs, ours = found[f"llama.cpp {what}"], found[what]
        rows.append(Row(base, statistics.median(theirs), "tokens/s"))
        rows.append(Row(f"{what}, {label}", statistics.median(ours), "tokens/s", base, paired(ours, theirs)))
    base, ratio = f"1 session, {label}", paired(found["several"], found["one"])
    rows.append(Row(base, statistics.median(found["one"]), "tokens/s"))
    rows.append(Row(f"{SESSIONS} sessions, {label}", statistics.median(found["several"]), "tokens/s", base, ratio))
    return rows


class Llama:
    """llama.cpp's programs and a model of theirs.

    Args:
        binaries: Where the programs are.
        plain: The model in 32 bits.
        kind: What to make of it.
    """

    def __init__(self, binaries: Path, plain: Path, kind: str) -> None:
        self.kind = kind
        self._binaries = binaries
        self._model = plain.with_name(f"{kind}.gguf")
        if self._model != plain:
            self._run("llama-quantize", str(plain), str(self._model), kind, "1")

    @contextmanager
    def servers(self) -> Iterator[str]:
        """Keep RPC servers, and give their addresses."""
        ports = [free_port() for _ in range(HOPS)]
        program = str(self._binaries / "ggml-rpc-server")
        processes = [
            subprocess.Popen(
                [program, "-p", str(port), "-t", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            for port in ports
        ]
        try:
            for port in ports:
                wait_for(port)
            yield ",".join(f"127.0.0.1:{port}" for port in ports)
        finally:
            for process in processes:
                process.terminate()
                process.wait()

    def rates(self, servers: str) -> dict[str, float]:
        """Tokens a second of a prompt and of decoding."""
        split = "/".join("1" for _ in range(HOPS))
        lengths = ["-p", str(PROMPT), "-n", str(NEW_TOKENS), "-r", "1"]
        where = ["-rpc", servers, "-ngl", "99", "-ts", split, "-t", "1"]
        text = self._run("llama-bench", "-m", str(self._model), *where, *lengths, "-o", "json")
        runs: list[dict[str, Any]] = json.loads(text)
        return {"prefill" if run["n_prompt"] else "decode": float(run["avg_ts"]) for run in runs}

    def _run(self, program: str, *arguments: str) -> str:
        command = [str(self._binaries / program), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def free_port() -> int:
    """Find a port that nobody listens on; the programs cannot choose one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(port: int) -> None:
    """Wait until a program listens."""
    until_s = time.monotonic() + START_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            if time.monotonic() > until_s:
                raise
            time.sleep(0.1)
        else:
            return


def write_gguf(path: Path) -> Path:
    """Write the demo model in llama.cpp's format, without a tokenizer."""
    import gguf

    directory = open_repository(MODEL, config=HubConfig()).metadata_directory()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    for key, tensor in model.state_dict().items():
        name = key
        for theirs, ours in _NAMES.items():
            name = name.replace(theirs, ours)
        if name != "output.weight":  # the head is the embeddings once more
            writer.add_tensor(name, tensor.numpy())
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return path
