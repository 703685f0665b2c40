"""The chat page of the gateway, over a live tiny swarm, in a browser."""

import json
import re

import pytest

from corolla.testing import LocalSwarm, save_tiny_model

pytest.importorskip("fastapi", reason="needs corolla[gateway]")
expect = pytest.importorskip("playwright.sync_api").expect

WAIT_MS = 60_000


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama", context_tokens=8192))


@pytest.fixture(scope="module")
def swarm(model, tmp_path_factory):
    logs = tmp_path_factory.mktemp("logs")
    with LocalSwarm(model, ["0:2", "2:4", "2:4"], "--threads", "1", "--no-lan", logs=logs) as swarm:
        yield swarm.wait_until_online()


@pytest.fixture(scope="module")
def said(swarm, model, run_command, tmp_path_factory):
    database = tmp_path_factory.mktemp("keys") / "keys.sqlite"
    return run_command("gateway", model, "--peer", swarm.address, "--database", f"sqlite:///{database}")


@pytest.fixture
def chat(page, said):
    """The page with a key, and with settings under which the tiny model goes on for as long as it may."""
    page.goto(f"{said['url']}/#key={said['key']}")
    page.wait_for_selector("body[data-ready]")
    settle(page, max_tokens="12")
    return page


def settle(page, **values):
    page.get_by_role("button", name="Settings").click()
    for name, value in ({"temperature": "1", "seed": "5"} | values).items():
        page.fill(f"#{name}", value)
    page.get_by_role("button", name="Done").click()


def ask(page, text):
    page.fill("#question", text)
    page.press("#question", "Enter")


def answered(page, count=1):
    expect(page.locator("article.assistant")).to_have_count(count, timeout=WAIT_MS)
    expect(page.locator("#send")).to_be_visible(timeout=WAIT_MS)
    return page.locator("article.assistant").last.locator(".text").inner_text()


def test_the_page_is_small_and_fast_and_asks_nobody_else(page, said, assert_light):
    address = f"{said['url']}/#key={said['key']}"
    assert_light(address, "body[data-ready]")
    page.goto(address)
    page.wait_for_selector("body[data-ready]")
    assert page.url == f"{said['url']}/"  # the key is not left in the address
    expect(page.locator("#model option")).to_have_count(1)


def test_an_answer_streams_with_its_chain_beside_it_and_survives_a_reload(chat, swarm):
    ask(chat, "Hello <b>there</b>")
    text = answered(chat)
    expect(chat.locator("article.user .said")).to_have_text("Hello <b>there</b>")
    hops = chat.locator("article.assistant .hops li")
    expect(hops).to_have_count(2)
    assert re.search(r"blocks 0–1 · [\d.]+ ms", hops.first.inner_text())
    expect(chat.locator(".strip p")).to_contain_text("tokens/s")
    chat.reload()
    chat.wait_for_selector("body[data-ready]")
    expect(chat.locator("article.assistant .text")).to_have_text(text.strip(), use_inner_text=True)
    assert chat.title()
    ask(chat, "More")
    answered(chat, 2)
    expect(chat.locator(".strip p").last).to_contain_text("known already")


def test_an_answer_is_stopped_made_anew_and_edited_as_branches(chat):
    settle(chat, max_tokens="3000")
    ask(chat, "Go on")
    expect(chat.locator("article.assistant .hops li")).to_have_count(2, timeout=WAIT_MS)
    chat.keyboard.press("Escape")
    answered(chat)
    expect(chat.locator("article.assistant .tools")).to_contain_text("stopped")
    settle(chat, max_tokens="12", seed="6")
    chat.get_by_role("button", name="Answer again").click()
    second = answered(chat)
    expect(chat.locator(".branch")).to_contain_text("2 / 2")
    chat.get_by_role("button", name="Earlier answer").click()
    expect(chat.locator(".branch")).to_contain_text("1 / 2")
    chat.get_by_role("button", name="Later answer").click()
    assert chat.locator("article.assistant .text").inner_text() == second
    chat.locator("article.user").hover()
    chat.get_by_role("button", name="Edit", exact=True).click()
    chat.get_by_label("Edit your message").fill("Something else")
    chat.keyboard.press("Enter")
    answered(chat)
    expect(chat.locator("article.user .said")).to_have_text("Something else")
    chat.get_by_role("button", name="Earlier version").click()
    expect(chat.locator("article.user .said")).to_have_text("Go on")


def test_a_server_that_dies_is_shown_while_the_answer_goes_on(chat, swarm):
    settle(chat, max_tokens="4000")
    ask(chat, "Go on")
    hop = chat.locator("article.assistant .hops li").nth(1)
    expect(hop).to_be_visible(timeout=WAIT_MS)
    peer = hop.get_attribute("title").split()[1].rstrip(",")
    next(server for server in swarm.servers if server.peer_id == peer).kill()
    expect(chat.locator(".events li")).to_contain_text(f"{peer[:8]} was lost after", timeout=WAIT_MS)
    expect(chat.locator("article.assistant .hops li.fresh")).to_have_count(1)
    text = chat.locator("article.assistant .text")
    expect(text).not_to_have_text(text.inner_text(), use_inner_text=True, timeout=WAIT_MS)
    chat.get_by_role("button", name="Stop the answer").click()
    answered(chat)


@pytest.mark.parametrize("width", [1200, 900, 390])
def test_a_long_question_pushes_nothing_off_the_page(chat, width):
    chat.set_viewport_size({"width": width, "height": 760})
    ask(chat, "a long question without an end " * 8)
    answered(chat)
    for control in ("#theme", "#send", "article.user .said"):
        box = chat.locator(control).bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width


def test_chats_are_kept_exported_and_deleted(chat):
    ask(chat, "First chat")
    answered(chat)
    chat.get_by_role("button", name="Export this chat").click()
    with chat.expect_download() as download:
        chat.get_by_role("button", name="JSON").click()
    kept = json.loads(download.value.path().read_text())
    assert [node["role"] for node in kept["nodes"].values()] == ["user", "assistant"]
    chat.get_by_role("button", name="Export this chat").click()
    with chat.expect_download() as download:
        chat.get_by_role("button", name="Markdown").click()
    assert download.value.suggested_filename == "First-chat.md"
    assert "**You**\n\nFirst chat" in download.value.path().read_text()
    chat.get_by_role("button", name="New chat").click()
    settle(chat, system="Be brief.")
    ask(chat, "Second chat")
    answered(chat)
    expect(chat.locator("#chats li")).to_have_count(2)
    chat.get_by_role("button", name="First chat", exact=True).click()
    expect(chat.locator("article.user .said")).to_have_text("First chat")
    chat.on("dialog", lambda dialog: dialog.accept())
    chat.locator("#chats li.now").hover()
    chat.get_by_role("button", name="Delete First chat").click()
    expect(chat.locator("#chats li")).to_have_count(1)
    expect(chat.locator("#title")).to_have_text("Second chat")


def test_a_wrong_key_is_said_and_asked_for(page, said):
    page.goto(f"{said['url']}/#key=ck-wrong")
    page.wait_for_selector("body[data-ready]")
    expect(page.get_by_role("alert")).to_contain_text("API key is unknown")
    page.get_by_label("API key").fill(said["key"])
    page.get_by_role("button", name="Done").click()
    expect(page.locator("#model option")).to_have_count(1)
    expect(page.locator("#notice")).to_be_hidden()


def test_all_of_it_is_reached_by_keyboard(chat):
    expect(chat.locator("#settings")).to_be_focused()  # where the dialog was opened from
    chat.focus("body")
    for _ in range(12):
        chat.keyboard.press("Tab")
        if chat.evaluate("document.activeElement.id") == "question":
            break
    chat.keyboard.type("By keyboard")
    chat.keyboard.press("Enter")
    answered(chat)
    expect(chat.locator("#question")).to_be_focused()
    reached = set()
    for _ in range(16):
        chat.keyboard.press("Shift+Tab")
        reached.add(chat.evaluate("document.activeElement.getAttribute('aria-label') || document.activeElement.id"))
    assert {"Copy", "Answer again", "Edit", "Dark theme", "Settings", "Export this chat", "model", "new"} <= reached


def test_markdown_becomes_elements_and_nothing_in_it_runs(chat):
    text = (
        "# One\n\nTwo **three** _four_ `five` [six](https://example.org) [bad](javascript:alert(1)) snake_case_name\n\n"
        "- a\n- b\n  1. c\n\n> said\n\n| x | y |\n|---|---|\n| 1 | 2 |\n\n<img src=x onerror=alert(1)>\n\n"
        "```python\ndef f():\n    return '**'\n```\n\nhttps://example.org/a_b."
    )
    found = chat.evaluate(
        """async (text) => {
            const { drawMarkdown } = await import("./page/markdown.js");
            const whole = document.createElement("div"), grown = document.createElement("div");
            drawMarkdown(whole, text);
            for (let end = 1; end <= text.length; end += 1) drawMarkdown(grown, text.slice(0, end));
            return [whole.innerHTML, grown.innerHTML];
        }""",
        text,
    )
    whole, grown = found
    assert whole == grown
    for part in (
        "<h3>One</h3>",
        "<strong>three</strong>",
        "<em>four</em>",
        "<code>five</code>",
        '<a href="https://example.org"',
        "[bad](javascript:alert(1))",
        "snake_case_name",
        "<ul><li>a</li><li>b<ol><li>c</li></ol></li></ul>",
        "<blockquote><p>said</p></blockquote>",
        "<th>x</th>",
        "<td>2</td>",
        "&lt;img src=x onerror=alert(1)&gt;",
        "return '**'",
        '<a href="https://example.org/a_b"',
    ):
        assert part in whole, part
    assert "<img" not in whole


@pytest.mark.parametrize("width", [1200, 360])
def test_nobody_is_shut_out(chat, assert_accessible, width):
    chat.set_viewport_size({"width": width, "height": 760})
    ask(chat, "Hello")
    answered(chat)
    for theme in ("light", "dark"):
        assert chat.evaluate("document.documentElement.dataset.theme") == theme
        assert_accessible(chat)
        assert chat.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        chat.locator("#theme").click()
    chat.get_by_role("button", name="Settings").click()
    assert_accessible(chat)
    chat.keyboard.press("Escape")
    if width < 760:
        chat.get_by_role("button", name="Chats").click()
        expect(chat.locator("#new")).to_be_focused()
        assert_accessible(chat)
        chat.keyboard.press("Escape")
        expect(chat.locator("#drawer")).to_be_hidden()
