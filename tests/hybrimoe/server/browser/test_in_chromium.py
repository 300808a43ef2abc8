"""The page in a browser: by keyboard alone, on a phone, reloaded, in two tabs, with long and with hostile replies."""

import base64
import io
import json
import re

import pytest

from hybrimoe.server.served import Served

pytestmark = pytest.mark.browser
PHONE = {"width": 360, "height": 740}
HOSTILE = """Look:

<script>window.harm = 1</script>
<img src=x onerror="window.harm = 2"> ![x](https://example.org/x.png) ![y](x" onerror="window.harm=3)
[a](javascript:window.harm=4) [b](JaVaScRiPt:window.harm=5) <a href="javascript:window.harm=6">c</a>
[d](data:text/html,x)
<svg onload="window.harm=7"></svg> <iframe srcdoc="<script>parent.harm=8</script>"></iframe>
<style>body{display:none}</style>
<details open ontoggle="window.harm=9"> <b onclick="window.harm=10">bold</b>

[good](https://example.org/)

```html
<script>window.harm = 11</script>
```
"""

NEVER_ENDS = """() => {
    const put = IDBObjectStore.prototype.put;
    IDBObjectStore.prototype.put = function (record) {
        if (record.role !== "assistant" || record.state === "arriving") return put.call(this, record);
        window.ending = true;
        return {};
    };
}"""
"""The page's database takes no ended reply: it goes while the last of it is written."""
TASKS = ["disabled-by-default-devtools.timeline"]
"""Chromium's traces with every task of a page's main thread, with the CPU time that it took."""
FITS = (
    "document.documentElement.scrollWidth <= innerWidth && document.querySelector('#scroll').scrollWidth <= innerWidth"
)
SMALL = """() => [...document.querySelectorAll('button, a')]
    .filter((one) => one.offsetWidth && one.offsetHeight && one.offsetHeight < 28).map((one) => one.outerHTML)"""
LISTENS = """[...document.querySelectorAll('.markdown *')]
    .some((one) => one.getAttributeNames().some((name) => name.startsWith('on')))"""


def send(page, text):
    page.get_by_role("textbox", name="Your message").fill(text)
    page.keyboard.press("Enter")


def replies(page):
    return page.locator(".message.assistant")


def wait_for_text(page, text):
    page.locator("#messages").get_by_text(text).first.wait_for()


def test_a_chat_by_keyboard_alone(visit, site):
    page = visit()
    site.answers("The *first* ", "reply.")
    page.keyboard.type("one")  # the place to write has the focus from the start
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    wait_for_text(page, "reply.")
    assert site.asked[-1]["messages"] == [{"role": "user", "content": "one\ntwo"}]
    assert page.locator(".assistant em").inner_text() == "first"

    page.keyboard.press("ArrowUp")  # edit the last message
    site.answers("The second reply.")
    page.keyboard.press("End")
    page.keyboard.type("!")
    page.keyboard.press("Enter")
    wait_for_text(page, "The second reply.")
    assert site.asked[-1]["messages"] == [{"role": "user", "content": "one\ntwo!"}]

    seen = []  # every control is reached by Tab, has a name, and shows that it has the focus
    for _ in range(40):
        page.keyboard.press("Tab")
        seen.append(
            page.evaluate("""() => {
            const at = document.activeElement, style = getComputedStyle(at);
            return [at.getAttribute('aria-label') || at.textContent.trim(), style.outlineStyle, at.tagName];
        }""")
        )
    names = {name for name, outline, tag in seen if tag != "BODY"}
    wanted = {"New conversation", "Live view", "The version before", "Edit: the conversation goes on from here anew",
              "Another reply", "Add files as text", "Send", "Settings of this conversation"}  # fmt: skip
    assert wanted <= names
    assert all(outline != "none" for name, outline, tag in seen if tag in ("BUTTON", "A"))


def test_branches_keep_every_version(visit, site):
    page = visit()
    site.answers("alpha")
    send(page, "say a word")
    wait_for_text(page, "alpha")
    site.answers("beta")
    page.get_by_role("button", name="Another reply").click()
    wait_for_text(page, "beta")
    assert "alpha" not in page.locator("#messages").inner_text()
    page.get_by_role("button", name="The version before").click()
    wait_for_text(page, "alpha")
    site.answers("gamma")
    send(page, "and on")
    wait_for_text(page, "gamma")
    assert [message["content"] for message in site.asked[-1]["messages"]] == ["say a word", "alpha", "and on"]
    page.reload()
    wait_for_text(page, "gamma")
    assert replies(page).all_inner_texts()[0].startswith("alpha")


def test_escape_stops_a_reply_and_keeps_what_came(visit, site):
    page = visit()
    answer = site.answers("It began ", "and never ended", hold=1)
    send(page, "go")
    wait_for_text(page, "It began")
    page.keyboard.press("Escape")
    page.locator(".facts", has_text="stopped").wait_for()
    answer.go()
    assert "never ended" not in page.locator("#messages").inner_text()
    page.get_by_role("button", name="Send").wait_for()
    page.reload()
    wait_for_text(page, "It began")


def test_a_reload_in_the_middle_of_a_reply_loses_nothing_that_came(visit, site):
    page = visit()
    answer = site.answers("Some words ", "that came late ", "never", hold=2)
    send(page, "go")
    wait_for_text(page, "that came late")
    page.reload()
    answer.go()
    wait_for_text(page, "Some words that came late")
    page.get_by_text("The page was closed while this reply arrived").wait_for()
    site.answers("A new reply.")
    page.get_by_role("button", name="Try again").click()
    wait_for_text(page, "A new reply.")


def test_a_reload_while_the_end_of_a_reply_is_written_loses_nothing(visit, site):
    page = visit()
    page.evaluate(NEVER_ENDS)
    site.answers("Some words ", "and the last")
    send(page, "go")
    page.wait_for_function("() => window.ending")
    page.reload()
    wait_for_text(page, "Some words and the last")
    assert replies(page).locator(".facts").inner_text().startswith("2 tokens"), "complete, with what the server counted"
    assert not page.get_by_text("The page was closed").count()
    site.answers("A second reply.")
    send(page, "and on")
    wait_for_text(page, "A second reply.")
    told = [message["content"] for message in site.asked[-1]["messages"]]
    assert told == ["go", "Some words and the last", "and on"]


def test_two_tabs_do_not_overwrite_each_other(visit, site):
    first = visit()
    site.answers("seen by both")
    send(first, "hello")
    wait_for_text(first, "seen by both")
    second = visit.tab(first)
    wait_for_text(second, "seen by both")

    slow = site.answers("from the first ", "tab", hold=1)
    send(first, "question one")
    wait_for_text(first, "from the first")
    wait_for_text(second, "from the first")  # what arrives in one tab is seen in the other
    site.answers("from the second tab")
    second.get_by_role("link", name="New conversation").click()
    send(second, "question two")
    wait_for_text(second, "from the second tab")
    slow.go()
    wait_for_text(first, "from the first tab")
    first.reload()
    wait_for_text(first, "from the first tab")
    titles = first.locator("#conversations a")
    titles.nth(1).wait_for()
    assert sorted(titles.all_inner_texts()) == ["hello", "question two"]

    second.get_by_role("link", name="hello").click()  # both now write to the same conversation
    wait_for_text(second, "from the first tab")
    slow = site.answers("one ", "whole", hold=1)
    send(first, "from one")
    wait_for_text(first, "one ")
    first.get_by_role("button", name="Stop the reply").wait_for()
    second.get_by_text("from one").wait_for()
    site.answers("another")
    send(second, "from two")
    wait_for_text(second, "another")
    slow.go()
    first.get_by_role("button", name="Send").wait_for()
    first.reload()
    wait_for_text(first, "another")
    text = first.locator("#messages").inner_text()
    assert all(part in text for part in ("from one", "one whole", "from two", "another"))


def test_a_reply_of_50_000_characters_stays_responsive(visit, site):
    page = visit()
    words = "Some *words* of a long reply, with `code` and **more** of it. "
    parts = [words * 3 + "\n\n" if n % 9 else "```python\n" + "x = 1\n" * 20 + "```\n\n" for n in range(290)]
    assert sum(map(len, parts)) > 50_000
    site.answers(*(piece for part in parts for piece in re.findall(r"(?s).{1,12}", part)), "the very end")
    page.context.browser.start_tracing(page=page, categories=TASKS)
    send(page, "at length")
    page.get_by_role("textbox", name="Your message").press_sequentially("typed meanwhile", delay=20)
    wait_for_text(page, "the very end")
    tasks = json.loads(page.context.browser.stop_tracing())["traceEvents"]
    cpu_us = [task.get("tdur", 0) for task in tasks if task["name"] == "RunTask"]
    assert page.get_by_role("textbox", name="Your message").input_value() == "typed meanwhile"
    assert 0 < max(cpu_us) < 300_000, "no frame and no key comes while a task runs"
    assert sum(cpu_us) < 3_000_000, "what stands is made once"
    assert len(page.locator(".assistant .body > .markdown").inner_text()) > 45_000
    assert page.evaluate("document.querySelector('#scroll').scrollTop") > 1000  # it followed to the end


def test_a_block_is_made_once(visit, site):
    page = visit()
    answer = site.answers("First paragraph.\n\nSecond ", "paragraph.\n\n1. one\n", "2. two\n", "\nlast", hold=2)
    send(page, "go")
    wait_for_text(page, "one")
    page.evaluate("document.querySelector('.assistant .block').mark = true")
    answer.go()
    wait_for_text(page, "last")
    assert page.evaluate("document.querySelector('.assistant .block').mark")
    assert page.locator(".assistant ol li").count() == 2


def test_a_list_stays_one_list(visit, site):
    page = visit()
    site.answers("4. four\n\n", "5", ". five\n\n", "6. s", "ix\n\nand *on*")
    send(page, "count")
    page.locator(".assistant em").wait_for()
    listed = page.locator(".assistant ol")
    assert (listed.count(), listed.get_attribute("start"), listed.locator("li").count()) == (1, "4", 3)


def test_what_a_model_writes_does_nothing(visit, site):
    page = visit()
    elsewhere = []
    page.on("request", lambda request: request.url.startswith(site.url) or elsewhere.append(request.url))
    site.answers(*re.findall(r"(?s).{1,7}", HOSTILE), "<script>window.harm = 12</script>")
    send(page, "harm me <script>window.harm = 13</script>")
    page.locator(".facts").wait_for()
    page.reload()
    page.locator(".facts").wait_for()
    assert page.evaluate("window.harm") is None
    assert not elsewhere
    reply = page.locator(".assistant .body > .markdown")
    assert reply.locator("img, script, style, iframe, svg:not([aria-hidden]), form, input").count() == 0
    assert "<script>window.harm = 1</script>" in reply.inner_text()  # shown as it was written
    links = reply.locator("a")
    assert {links.nth(n).get_attribute("href") for n in range(links.count())} <= {
        "https://example.org/", "https://example.org/x.png", None,
    }  # fmt: skip
    good = reply.get_by_role("link", name="good")
    assert (good.get_attribute("rel"), good.get_attribute("target")) == ("noopener noreferrer nofollow", "_blank")
    assert not page.evaluate(LISTENS)


def test_code_is_coloured_and_copied(visit, site):
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    site.answers("```python\ndef f(a):\n", "    return a < 1 and '&'\n```\n")
    send(page, "code")
    page.locator(".code .hljs-keyword").first.wait_for()
    page.get_by_role("button", name="Copy the code").click()
    assert page.evaluate("navigator.clipboard.readText()") == "def f(a):\n    return a < 1 and '&'"
    assert page.locator(".code code").inner_text() == "def f(a):\n    return a < 1 and '&'"


def test_reasoning_is_folded(visit, site):
    page = visit()
    site.answers("42", reasoning="Let me think.")
    send(page, "answer")
    wait_for_text(page, "42")
    thought = page.locator(".reasoning")
    assert not thought.get_by_text("Let me think.").is_visible()
    thought.get_by_text("What the model thought").click()
    assert thought.get_by_text("Let me think.").is_visible()


def test_files_become_text_and_others_are_refused(visit, site, tmp_path):
    (tmp_path / "notes.txt").write_text("line one\n```\nline two", encoding="utf-8")
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\xff\xe0\0\x10JFIF")
    (tmp_path / "report.pdf").write_bytes(b"%PDF-1.7\xff\0")
    (tmp_path / "huge.log").write_bytes(b"x" * (2 << 20))
    page = visit()
    names = ("notes.txt", "photo.jpg", "report.pdf", "huge.log")
    page.locator("#file-input").set_input_files([tmp_path / name for name in names])
    problem = page.locator("#file-problem")
    problem.get_by_text("photo.jpg is an image, and this model takes text only").wait_for()
    assert "report.pdf is not text" in problem.inner_text()
    assert "huge.log has 2.0 MiB; at most 1.0 MiB" in problem.inner_text()
    assert page.locator("#files li").all_inner_texts()[0].startswith("notes.txt")
    site.answers("read")
    send(page, "what is in it?")
    wait_for_text(page, "read")
    assert site.asked[-1]["messages"][0]["content"] == (
        "File notes.txt:\n````\nline one\n```\nline two\n````\n\nwhat is in it?"
    )


def test_images_are_shown_to_a_model_that_sees(visit, site, tmp_path, monkeypatch):
    images = pytest.importorskip("PIL.Image")
    monkeypatch.setattr(Served, "sees", property(lambda served: True))
    images.new("RGB", (40, 20), "red").save(tmp_path / "small.png")
    images.new("RGB", (3000, 1500), "red").save(tmp_path / "large.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    page = visit()
    page.locator("#file-input").set_input_files([tmp_path / f"{name}.png" for name in ("small", "large", "broken")])
    page.locator("#file-problem").get_by_text("broken.png cannot be read as an image").wait_for()
    site.answers("red")
    send(page, "which colour?")
    wait_for_text(page, "red")
    parts = site.asked[-1]["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["image_url", "image_url", "text"]
    assert parts[2]["text"] == "which colour?"
    sizes = []
    for part in parts[:2]:
        data = base64.b64decode(part["image_url"]["url"].partition(",")[2])
        sizes.append(images.open(io.BytesIO(data)).size)
    assert sizes == [(40, 20), (2048, 1024)], "what no model sees at once is not sent"
    page.reload()
    shown = page.locator(".message.user canvas.thumbnail")
    shown.nth(1).wait_for()
    page.wait_for_function("() => document.querySelectorAll('.thumbnail')[1].width === 240")
    site.answers("still red")
    send(page, "and now?")
    wait_for_text(page, "still red")
    assert site.asked[-1]["messages"][0]["content"] == parts
    assert site.asked[-1]["messages"][2]["content"] == "and now?"


def test_settings_are_sent_and_kept(visit, site):
    page = visit()
    page.get_by_role("button", name="Settings of this conversation").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0.5")
    page.get_by_label("Seed").fill("7")
    page.get_by_label("Top p").fill("3")  # not within its range: not sent
    page.keyboard.press("Escape")
    site.answers("ok")
    send(page, "hello")
    wait_for_text(page, "ok")
    asked = site.asked[-1]
    assert asked["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (asked["temperature"], asked["seed"], "top_p" in asked) == (0.5, 7, False)
    page.reload()
    page.get_by_role("button", name="Settings of this conversation").click()
    assert page.get_by_label("Seed").input_value() == "7"


@pytest.mark.parametrize(
    ("refused", "said"),
    [
        ((429, "32 requests are waiting already", {"Retry-After": "3"}), "free in 3 seconds"),
        ((400, "the prompt has 900 tokens; shorten it", {}), "The prompt has 900 tokens; shorten it."),
        ((500, "the server failed: boom", {}), "The server's log says more."),
        ((503, "this server is about to end", {"code": "shutting_down"}), "This server is about to end."),
    ],
)
def test_what_goes_wrong_is_a_sentence(visit, site, refused, said):
    page = visit()
    site.answers(refused=refused)
    send(page, "hello")
    page.get_by_role("alert").get_by_text(said).wait_for()
    again = page.get_by_role("button", name="Try again")
    assert ("in 3 s" in again.inner_text()) == (refused[0] == 429)
    site.answers("now it works")
    again.click()
    wait_for_text(page, "now it works")


def test_a_cut_connection_and_a_server_that_is_gone_are_told(visit, site, site_of):
    own = site_of()
    page = visit(own.url)
    own.answers("half of it", done=False)
    send(page, "hello")
    page.get_by_role("alert").get_by_text("The connection was cut").wait_for()
    wait_for_text(page, "half of it")
    own.close()
    send(page, "still there?")
    page.get_by_role("alert").get_by_text("The server does not answer").wait_for()


def test_a_message_waits_for_a_model_that_is_being_loaded(visit, site):
    page = visit()
    site.answers(refused=(503, "the model is being loaded", {"code": "loading", "Retry-After": "1"}))
    site.answers("loaded now")
    send(page, "hello")
    page.get_by_text("The model is being loaded").wait_for()
    wait_for_text(page, "loaded now")


def test_a_server_with_a_key_asks_for_it(visit, site_of):
    own = site_of(api_keys=["secret"])
    page = visit(own.url)
    page.get_by_role("dialog").wait_for()
    page.get_by_role("textbox", name="API key").fill("wrong")
    page.keyboard.press("Enter")
    page.get_by_role("dialog").get_by_text("does not know this key").wait_for()
    page.get_by_role("textbox", name="API key").fill("secret")
    page.keyboard.press("Enter")
    page.locator(".server-state", has_text="tiny").wait_for()
    own.answers("come in")
    send(page, "hello")
    wait_for_text(page, "come in")


def test_a_phone(visit, site):
    page = visit(viewport=PHONE, has_touch=True, is_mobile=True)
    site.answers(f"A `name_that_does_not_break_{'x' * 80}`\n\n", f"| a | b |\n|-|-|\n| {'w ' * 60}| 2 |\n")
    send(page, "hello " + "y" * 100)
    page.locator(".facts").wait_for()
    assert page.evaluate(FITS)
    assert not page.get_by_role("link", name="New conversation").is_visible()
    page.get_by_role("button", name="Conversations").click()
    page.get_by_role("link", name="New conversation").click()
    page.get_by_role("link", name="New conversation").wait_for(state="hidden")
    page.get_by_role("button", name="Conversations").click()
    page.get_by_role("link", name="Live view").click()
    page.locator("#live .tile").first.wait_for()
    assert page.evaluate(FITS)
    assert not page.evaluate(SMALL)


def test_dark_and_light(visit, site):
    page = visit(color_scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    button = page.get_by_role("button", name="Colours")
    button.click()
    light = page.evaluate(ground)
    assert light != dark
    page.reload()
    assert page.evaluate(ground) == light
    button.click()
    assert page.evaluate(ground) == dark


def test_conversations_are_renamed_and_deleted(visit, site):
    page = visit()
    site.answers("one")
    send(page, "first words")
    wait_for_text(page, "one")
    entry = page.locator("#conversations li")
    entry.hover()
    page.get_by_role("button", name="Rename first words").click()
    page.keyboard.type("a name")
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="a name").wait_for()
    entry.hover()
    page.get_by_role("button", name="Delete a name").click()
    page.get_by_role("button", name="Delete", exact=True).click()
    page.get_by_role("heading", name="New conversation").wait_for()
    assert page.locator("#conversations li").count() == 0


def test_the_model_itself_answers(visit, site):
    """Nothing in its place: the real stream of the real server."""
    page = visit()
    page.get_by_role("button", name="Settings of this conversation").click()
    page.get_by_label("Longest reply").fill("12")
    page.keyboard.press("Escape")
    send(page, "hello")
    page.locator(".facts", has_text="12 tokens").wait_for()
    page.get_by_role("link", name="Live view").click()
    page.get_by_text("everything runs as transformers made it").wait_for()
