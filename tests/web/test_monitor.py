"""The monitor's page and API, over a live tiny swarm, in a browser."""

import json
from contextlib import ExitStack
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from anyio.from_thread import start_blocking_portal

from corolla.monitor import MonitorConfig, observing
from corolla.swarm import SwarmConfig
from corolla.testing import LocalSwarm, ServerProcess, save_tiny_model

pytest.importorskip("fastapi", reason="needs corolla[monitor]")

HOSTILE = "<img src=x onerror=alert(1)>\x1b[31m\u202eevil"
ARGUMENTS = ("--threads", "1", "--name", HOSTILE, "--metrics-port", "0")
VIEWERS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama"))


@pytest.fixture(scope="module")
def swarm(model, tmp_path_factory):
    logs = tmp_path_factory.mktemp("logs")
    with LocalSwarm(model, ["0:3", "2:4"], *ARGUMENTS, logs=logs) as swarm:
        yield swarm.wait_until_online()


@pytest.fixture(scope="module")
def url(swarm, run_command, tmp_path_factory):
    database = tmp_path_factory.mktemp("monitor") / "monitor.sqlite"
    arguments = ("monitor", "--peer", swarm.address, "--title", "A tiny swarm", "--database", str(database))
    settings = {"COROLLA_MONITOR_SAMPLE_S": "1", "COROLLA_MONITOR_MEASURE_S": "1"}
    return run_command(*arguments, **settings, COROLLA_MONITOR_MAX_VIEWERS=str(VIEWERS))["url"]


@pytest.fixture
def live(page, url):
    page.goto(url)
    page.wait_for_selector("#live.good")
    page.wait_for_selector("#servers tbody tr:nth-child(2)")
    return page


def get(url):
    with urlopen(url, timeout=10) as answer:
        return answer.read()


def test_the_page_shows_the_swarm_and_is_small_and_fast(page, url, assert_light):
    ready = "#servers tbody tr:nth-child(2)"
    assert_light(url, ready)
    page.goto(url)
    page.wait_for_selector(ready)
    assert page.inner_text("#title") == "A tiny swarm"
    assert page.inner_text("#name") == "tiny-llama"
    assert "Every one of 4 blocks has a server." in page.inner_text("#verdict")
    assert page.inner_text("#online") == "2"
    assert page.locator("#strip i").count() == 4
    assert "The bottleneck is" in page.inner_text("#bottleneck")
    page.wait_for_selector("#charts figure .line", state="attached")


def test_what_peers_say_is_shown_as_text(live):
    assert live.inner_text("#servers tbody tr:first-child b") == "<img src=x onerror=alert(1)>[31mevil"
    assert live.locator("main img").count() == 0


@pytest.mark.parametrize("width", [1200, 360])
def test_everybody_can_use_it_in_light_and_dark_on_any_screen(live, assert_accessible, width):
    live.set_viewport_size({"width": width, "height": 900})
    live.wait_for_selector("#charts figure .line", state="attached")
    for theme in ("light", "dark"):
        assert live.evaluate("document.documentElement.dataset.theme") == theme
        assert_accessible(live)
        assert live.evaluate("document.documentElement.scrollWidth <= innerWidth")
        live.click("#theme")


def test_the_keyboard_alone_is_enough(live):
    keyboard = live.keyboard
    keyboard.press("Tab")
    assert live.evaluate("document.activeElement.className") == "skip"
    keyboard.press("Enter")
    keyboard.press("Tab")
    assert live.evaluate("document.activeElement.id") == "strip"
    keyboard.press("End")
    assert live.inner_text("#block").startswith("block 3: 1 server")
    assert live.get_attribute("#strip", "aria-valuetext").startswith("block 3: 1 server")
    keyboard.press("Tab")
    keyboard.press("Tab")
    keyboard.press("Enter")
    assert live.get_attribute("#servers th:first-child", "aria-sort") == "ascending"
    keyboard.press("Enter")
    live.wait_for_timeout(1500)  # an update must not take the focus away
    assert live.get_attribute("#servers th:first-child", "aria-sort") == "descending"
    assert live.evaluate("document.activeElement.textContent") == "server"


def test_a_server_that_joins_is_shown_and_one_that_is_killed_is_missed(live, swarm, model, tmp_path):
    arguments = ("--threads", "1", "--blocks", "0:4", "--name", "short-lived")
    with ServerProcess(model, *arguments, peers=[swarm.address], log=tmp_path / "log") as server:
        server.wait_for("online")
        live.wait_for_selector("#servers b:text('short-lived')")
        live.wait_for_selector("#events li:has-text('short-lived takes sessions')")
        server.kill()
        live.wait_for_selector("#events li.died:has-text('short-lived disappeared')", timeout=60_000)
        live.wait_for_selector("#servers b:text('short-lived')", state="detached")


def test_the_api_tells_programs_the_same_and_no_address(swarm, url):
    said = json.loads(get(f"{url}api/swarm"))
    (model,) = said["models"]
    assert [server["span"] for server in model["servers"]][:2] == [[0, 3], [2, 4]]
    assert model["counts"][2] >= 2
    assert model["next_server"]["after"] >= model["next_server"]["before"]
    assert b"127.0.0.1" not in get(f"{url}api/swarm")
    assert json.loads(get(f"{url}api/about"))["title"] == "A tiny swarm"
    assert json.loads(get(f"{url}healthz"))["sees_swarm"]
    assert f'corolla_swarm_blocks{{gen_ai_request_model="tiny-llama@{model["model"][:12]}"}} 4.0'.encode() in get(
        f"{url}metrics"
    )


def test_whoever_watches_is_shown_the_servers_from_the_first_moment_on(swarm):
    async def watch():
        async with observing(SwarmConfig(), [swarm.address], MonitorConfig()) as observer:
            return observer.picture

    with start_blocking_portal() as portal:  # the browser's event loop is this thread's
        (model,) = portal.call(watch).models
    assert model.counts[2] >= 2


def test_servers_answer_prometheus_as_well(swarm):
    said = get(swarm.servers[0].stages["metrics"]["url"]).decode()
    assert 'corolla_server_state{state="online"} 1.0' in said
    assert "corolla_server_blocks 3.0" in said


@pytest.mark.parametrize(
    ("path", "status"),
    [("api/history/nothing", 422), ("api/events?limit=1000000", 422), ("page/..%2fweb.py", 404), ("nothing", 404)],
)
def test_nonsense_is_refused(url, path, status):
    with pytest.raises(HTTPError) as refused:
        get(f"{url}{path}")
    refused.value.close()
    assert refused.value.code == status


def test_no_more_pages_are_kept_up_to_date_than_the_limit(url):
    def follow_too_often():
        with ExitStack() as stack:
            for _ in range(VIEWERS + 1):  # pages of other tests may still be leaving
                stack.enter_context(urlopen(f"{url}api/live", timeout=10)).readline()

    with pytest.raises(HTTPError) as refused:
        follow_too_often()
    refused.value.close()
    assert refused.value.code == 503
    assert refused.value.headers["Retry-After"] == "10"
