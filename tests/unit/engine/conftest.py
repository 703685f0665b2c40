"""Tiny blocks to compute with, and a gate that holds the compute thread in the middle of a tick."""

import asyncio
import functools
import threading

import anyio
import pytest

from corolla.blocks import build_tiny, split_model
from corolla.blocks.zoo import default_config
from corolla.terms import Span


@functools.cache
def span_of(family):
    return split_model(build_tiny(default_config(family)), [Span(0, 4)], is_packable=family == "llama")[0]


@pytest.fixture
def span(request):
    """The blocks of ``llama``, or of the family that the test names."""
    return span_of(getattr(request, "param", "llama"))


class Gate:
    """Holds whoever computes the first block, until it is opened; then it may fail instead of going on.

    Attributes:
        entered: Set once the compute thread is held. Belongs to the event loop.
        passed: How many tokens have gone through.
    """

    def __init__(self, span):
        self.entered = anyio.Event()
        self.passed = 0
        self.failure = None
        self._loop = asyncio.get_running_loop()
        self._opened = threading.Event()
        self._hook = span.blocks[0].register_forward_hook(self._hold)

    def _hold(self, _, args, output):
        self._loop.call_soon_threadsafe(self.entered.set)
        assert self._opened.wait(timeout=60)
        if self.failure is not None:
            raise self.failure
        self.passed += args[0].shape[1]

    def open(self):
        self._opened.set()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.open()
        self._hook.remove()


@pytest.fixture
def gate_on():
    """Make a :class:`Gate` before some blocks."""
    return Gate
