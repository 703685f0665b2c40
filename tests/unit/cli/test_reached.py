"""A server says how others reach it, and what to do if they cannot."""

from dataclasses import dataclass

import pytest

from corolla.cli.config import MetricsConfig, OutputConfig
from corolla.cli.console import Output
from corolla.cli.serve import _Run

DIRECT, RELAYED = "tls://192.0.2.7:31330", "relay://192.0.2.9:31330/abc"


@dataclass
class Reached:
    addresses: tuple[str, ...]
    is_hidden: bool


@pytest.mark.parametrize(
    ("server", "words"),
    [
        (Reached((DIRECT,), is_hidden=False), f"reach this server at {DIRECT}"),
        (Reached((DIRECT, RELAYED), is_hidden=True), f"through relays: {RELAYED}"),
        (Reached((DIRECT,), is_hidden=True), "open its port in your router"),
    ],
)
def test_a_server_says_how_others_reach_it(server, words):
    ((line, _),) = _Run(server, MetricsConfig(), Output(OutputConfig()), until_eof=False)._describe("reached")
    assert words in line
