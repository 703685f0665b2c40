"""What holds for every test: it leaves nothing behind, blocks no event loop, and runs the same each time."""

import asyncio
import functools
import inspect
import logging
import sys
import threading
from collections.abc import Iterator

import anyio.lowlevel
import psutil
import pytest
from blockbuster import blockbuster_ctx
from hypothesis import settings

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("ci")

GRACE_S = 10.0  # for what is already ending when a test returns
KNOWN_THREADS = (
    "AnyIO worker thread",  # idle ones are kept for the next test by the event loop of its module
    "asyncio_",  # the loop's own pool, likewise
    "tqdm",
)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Tests marked ``anyio`` run on asyncio, as Corolla does."""
    return "asyncio"


@pytest.fixture(autouse=True)
def leaves_nothing_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test after which a thread, task, child process or listening socket of its own is still there."""
    if (torch := sys.modules.get("torch")) and torch.get_num_threads() != 1:
        torch.set_num_threads(1)  # the same sums in the same order on every machine
    if inspect.iscoroutinefunction(request.node.obj):
        request.node.obj = watched(request.node.obj)
    before = threads(), processes(), sockets()
    yield
    for thread in threads() - before[0]:
        thread.join(GRACE_S)
    psutil.wait_procs(processes() - before[1], timeout=GRACE_S)
    after = threads(), processes(), sockets()
    stray = [thing for now, then in zip(after, before, strict=True) for thing in now - then]
    assert not stray, f"left behind: {stray}"


@pytest.fixture(autouse=True)
def logging_as_it_comes() -> None:
    """Undo what another test, or a command that it ran in this process, has set up for Corolla's log."""
    root = logging.getLogger("corolla")
    root.handlers, root.propagate = [], True
    root.setLevel(logging.NOTSET)
    for name, known in logging.root.manager.loggerDict.items():
        if name.startswith("corolla") and isinstance(known, logging.Logger):
            known.disabled = False  # as the configuration of some programs leaves it


def watched(test):
    """Make an async test fail if it leaves a task behind or if Corolla's code blocks its event loop."""

    @functools.wraps(test)
    async def run(*args, **kwargs):
        before = asyncio.all_tasks()
        with blockbuster_ctx("corolla"):
            await test(*args, **kwargs)
        await anyio.lowlevel.checkpoint()
        stray = asyncio.all_tasks() - before
        assert not stray, f"left behind: {stray}"

    return run


def threads():
    return {thread for thread in threading.enumerate() if not thread.name.startswith(KNOWN_THREADS)}


def processes():
    return set(psutil.Process().children(recursive=True))


def sockets():
    connections = psutil.Process().net_connections(kind="inet")
    return {tuple(found.laddr) for found in connections if found.status == psutil.CONN_LISTEN}
