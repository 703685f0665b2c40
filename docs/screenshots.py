"""Takes the pictures of docs/images anew: a live swarm of SmolLM2, its gateway and its monitor, in Debian's chromium.

``python docs/screenshots.py`` takes a few minutes. It kills a server in the middle of an answer, as the picture shows.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

from corolla.testing import LocalSwarm

IMAGES = Path(__file__).parent / "images"
SPANS = ("0:10", "10:20", "20:30", "10:20")
ARGUMENTS = ("--threads", "1", "--no-lan", "--precision", "float32")
WIDE, NARROW = {"width": 1200, "height": 860}, {"width": 390, "height": 844}
WAIT_MS = 240_000
TITLE = "Explain to a child, with a picture in words, why the sky is blue in the day and red in the evening"
QUESTION = "Write a Python function that says whether a word is a palindrome, and explain how it works."


def main() -> None:
    """Take them all."""
    chromium = shutil.which("chromium") or sys.exit("needs a chromium: apt-get install chromium")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (
            LocalSwarm("smollm2", SPANS, *ARGUMENTS, logs=folder) as swarm,
            _command("monitor", "--peer", swarm.address, "--title", "A swarm on one machine", folder=folder) as monitor,
            _command("gateway", "smollm2", "--peer", swarm.wait_until_online().address, folder=folder) as gateway,
            sync_playwright() as driver,
        ):
            browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
            _chat(browser, gateway, swarm)
            _monitor(browser, monitor)
            browser.close()


@contextmanager
def _command(name: str, *arguments: str, folder: Path) -> Iterator[dict[str, Any]]:
    command = [sys.executable, "-m", "corolla", name, *arguments, "--json", "--port", "0"]
    database = f"{folder}/monitor.sqlite" if name == "monitor" else f"sqlite:///{folder}/keys.sqlite"
    quick = {"COROLLA_MONITOR_SAMPLE_S": "2", "COROLLA_MONITOR_MEASURE_S": "2"} if name == "monitor" else {}
    with subprocess.Popen(
        [*command, "--database", database],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **quick},  # noqa: TID251 - for a process of its own
    ) as process:
        try:
            yield json.loads(process.stdout.readline())
        finally:
            process.terminate()


def _chat(browser: Browser, gateway: dict[str, Any], swarm: LocalSwarm) -> None:
    page = browser.new_page(viewport=WIDE, color_scheme="light", reduced_motion="reduce")
    page.set_default_timeout(WAIT_MS)
    page.goto(f"{gateway['url']}/#key={gateway['key']}")
    page.wait_for_selector("body[data-ready]")
    for name, value in {"temperature": "0", "max_tokens": "60"}.items():
        _set(page, name, value)
    _ask(page, TITLE)
    _wait(page)
    page.get_by_role("button", name="New chat").click()
    _set(page, "max_tokens", "200")
    _ask(page, QUESTION)
    hop = page.locator("article.assistant .hops li").nth(1)
    hop.wait_for()
    peer = (hop.get_attribute("title") or "").split()[1].rstrip(",")
    next(server for server in swarm.servers if server.peer_id == peer).kill()
    page.locator(".events li").wait_for()
    _wait(page)
    page.evaluate("document.getElementById('main').scrollTo(0, 0)")
    _shoot(page, "chat-light")
    page.get_by_role("button", name="Dark theme").click()
    _shoot(page, "chat-dark")
    page.set_viewport_size(NARROW)
    page.get_by_role("button", name="Light theme").click()
    page.evaluate("document.getElementById('main').scrollTo(0, 0)")
    _shoot(page, "chat-narrow")
    page.close()


def _monitor(browser: Browser, monitor: dict[str, Any]) -> None:
    for theme in ("light", "dark"):
        page = browser.new_page(viewport=WIDE, color_scheme=theme, reduced_motion="reduce")
        page.goto(monitor["url"])
        page.wait_for_timeout(4000)
        _shoot(page, f"monitor-{theme}", full_page=True)
        if theme == "light":
            page.set_viewport_size(NARROW)
            page.wait_for_timeout(500)
            _shoot(page, "monitor-narrow", full_page=True)
        page.close()


def _set(page: Page, name: str, value: str) -> None:
    page.get_by_role("button", name="Settings").click()
    page.fill(f"#{name}", value)
    page.get_by_role("button", name="Done").click()


def _ask(page: Page, text: str) -> None:
    page.fill("#question", text)
    page.press("#question", "Enter")
    page.locator("article.assistant").last.wait_for()


def _wait(page: Page) -> None:
    page.locator("#send").wait_for()


def _shoot(page: Page, name: str, **options: Any) -> None:
    page.mouse.move(600, 5)
    page.screenshot(path=IMAGES / f"{name}.png", **options)


if __name__ == "__main__":
    main()
