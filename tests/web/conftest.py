"""A real browser for pages of Corolla: Debian's chromium, driven by Playwright; without either, tests are skipped."""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack

import psutil
import pytest

SERIOUS = ("serious", "critical")
MAX_PAGE_BYTES = 200_000
MAX_LOAD_S = 1.0
LOADS = 8  # other programs may be busy during some of them
LOADED_BYTES = """
["navigation", "resource"].flatMap(kind => performance.getEntriesByType(kind))
.reduce((sum, one) => sum + one.decodedBodySize, 0)
"""


@pytest.fixture(scope="module")
def browser():
    """A browser without a window; its processes are gone when the module's tests are done."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[dev]'")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("needs a chromium on this machine: apt-get install chromium")
    before = set(psutil.Process().children(recursive=True))
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()
    after = set(psutil.Process().children(recursive=True)) - before
    _, stray = psutil.wait_procs(after, timeout=10)
    assert not stray, f"left behind: {stray}"


@pytest.fixture(autouse=True)
def leaves_nothing_behind():
    """Take the place of the check for each test: a browser starts and ends processes as it likes until it is closed."""


@pytest.fixture
def page(browser):
    """A fresh page, 1200 x 900; the test fails if a script of it does, or if it asks another host for anything."""
    problems = []
    context = browser.new_context(viewport={"width": 1200, "height": 900}, reduced_motion="reduce")
    page = context.new_page()
    page.set_default_timeout(30_000)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: problems.append(request.url) if is_foreign(request.url) else None)
    yield page
    context.close()
    assert not problems


def is_foreign(url):
    return not url.startswith(("http://127.0.0.1:", "data:", "blob:"))


@pytest.fixture
def assert_light(browser, record_testsuite_property):
    """Fails if a page brings too many bytes, or is never ready in time, to a browser that has not seen it before."""

    def check(url, ready):
        took_s = []
        while len(took_s) < LOADS and min(took_s, default=MAX_LOAD_S) >= MAX_LOAD_S:
            with browser.new_context() as context:
                page, began_s = context.new_page(), time.perf_counter()
                page.goto(url)
                page.wait_for_selector(ready)
                took_s.append(time.perf_counter() - began_s)
                size_bytes, where = page.evaluate(LOADED_BYTES), page.url
        record_testsuite_property(f"{where} of {size_bytes} bytes, ready after s", took_s)
        assert size_bytes < MAX_PAGE_BYTES
        assert min(took_s) < MAX_LOAD_S

    return check


@pytest.fixture
def assert_accessible():
    """Fails if axe finds a serious fault of accessibility in what a page shows now."""
    Axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe

    def check(page):
        found = Axe().run(page).response["violations"]
        serious = [one for one in found if one["impact"] in SERIOUS]
        told = [f"{one['id']}: {one['help']}: {[node['html'] for node in one['nodes']]}" for one in serious]
        assert not told, "\n".join(told)

    return check


@pytest.fixture(scope="module")
def run_command():
    """Starts commands that serve a page, and gives what they say first as JSON; ends them with the module's tests."""
    with ExitStack() as stack:

        def run(*arguments, **environment):
            command = [sys.executable, "-m", "corolla", *arguments, "--json", "--port", "0"]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, **environment})  # noqa: TID251
            stack.callback(process.stdout.close)
            stack.callback(process.wait, 20)
            stack.callback(process.terminate)
            return json.loads(process.stdout.readline())

        yield run
