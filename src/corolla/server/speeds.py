"""How fast this machine was with a model the last time, kept in a file, so that a restarted server is online at once.

What was measured holds for the same hardware, versions, weights and precision; any other combination has another file.
"""

import contextlib
import hashlib
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import torch

from corolla import __version__
from corolla.hub.disk import write_atomically
from corolla.telemetry import event, logger
from corolla.terms import Speed

if TYPE_CHECKING:
    from corolla.server.loading import Model

__all__ = ["SpeedFile", "scaled"]

_LOG = logger(__name__)


class SpeedFile:
    """The file for one model on this machine.

    Args:
        directory: Where such files are kept.
        model: The model, its precision and its device.
        threads: With how many threads it is computed.
    """

    def __init__(self, directory: Path, model: "Model", threads: int | None) -> None:
        device = torch.cuda.get_device_name() if model.device.startswith("cuda") else platform.processor()
        facts = [
            [device, platform.machine(), platform.node(), os.cpu_count(), threads],
            [__version__, str(torch.__version__), platform.python_version()],
            [model.repository.model_id, model.precision, model.device],
        ]
        self._path = directory / f"{hashlib.sha256(msgspec.json.encode(facts)).hexdigest()[:32]}.json"

    def recall(self) -> Speed | None:
        """Read how fast the whole model would be; ``None`` if that was never measured here. Blocks."""
        with contextlib.suppress(OSError, msgspec.DecodeError):
            speed = msgspec.json.decode(self._path.read_bytes(), type=Speed)
            if speed.decode_tokens_per_s > 0 and speed.prefill_tokens_per_s > 0:
                return speed
        return None

    def remember(self, speed: Speed) -> None:
        """Write down how fast the whole model would be; failing costs a measurement next time. Blocks."""
        try:
            write_atomically(self._path, msgspec.json.encode(speed))
        except OSError as error:
            event(_LOG, "speed not remembered", path=self._path, error=error)


def scaled(speed: Speed, ratio: float) -> Speed:
    """Say how fast so many times less to compute would be."""
    return Speed(
        decode_tokens_per_s=speed.decode_tokens_per_s * ratio, prefill_tokens_per_s=speed.prefill_tokens_per_s * ratio
    )
