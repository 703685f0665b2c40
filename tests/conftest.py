"""What holds for every test: it leaves nothing behind, blocks no event loop, and runs the same each time."""

import asyncio
import functools
import importlib.util
import inspect
import itertools
import logging
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import anyio.lowlevel
import psutil
import pytest
from blockbuster import blockbuster_ctx
from hypothesis import settings

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=50)
settings.register_profile("long", deadline=None, max_examples=2000, print_blob=True)  # --hypothesis-profile=long
settings.load_profile("ci")

STARTED_S = 20.0
GRACE_S = 10.0  # for what is already ending when a test returns
DATABASES = itertools.count()
KNOWN_THREADS = (
    "AnyIO worker thread",  # idle ones are kept for the next test by the event loop of its module
    "asyncio_",  # the loop's own pool, likewise
    "tqdm",
)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Tests marked ``anyio`` run on asyncio, as Corolla does."""
    return "asyncio"


@pytest.fixture(scope="session", autouse=True)
def state_of_tests(tmp_path_factory):
    """Remember nothing from one run of the tests to the next, nor in the account of whoever runs them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


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


class Redis:
    """Debian's redis-server on loopback, which writes nothing to disk."""

    def __init__(self, program, directory):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.command = [program, "--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(directory)]
        self.command += ["--save", "", "--appendonly", "no", "--databases", "256"]
        self.process = None

    def start(self):
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL)
        began_s = time.monotonic()
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            except OSError:
                assert time.monotonic() - began_s < STARTED_S
                assert self.process.poll() is None
            else:
                return

    def stop(self):
        self.process.kill()
        self.process.wait()

    def url(self):
        """Name a database that nobody has used."""
        return f"redis://127.0.0.1:{self.port}/{next(DATABASES)}"


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory):
    """A Redis, or the reason why there is none."""
    program = shutil.which("redis-server")
    if program is None:
        yield "redis-server is not installed: apt-get install redis-server"
    elif importlib.util.find_spec("redis") is None:
        yield "the redis package is not installed: pip install 'corolla[redis]'"
    else:
        server = Redis(program, tmp_path_factory.mktemp("redis"))
        server.start()
        yield server
        server.stop()


@pytest.fixture
def redis(redis_server):
    if isinstance(redis_server, str):
        pytest.skip(redis_server)
    return redis_server


@pytest.fixture
def own_redis(redis, tmp_path):
    """A Redis that a test may stop and start."""
    server = Redis(redis.command[0], tmp_path)
    server.start()
    yield server
    server.stop()
