"""A browser, and a server whose chats a test may answer in the model's place.

The browser is the system's Chromium, driven by Playwright (extra `browser`). Where one of both is missing, the tests
are skipped and say so.
"""

import json
import os
import shutil
import socket
import threading
from collections import deque

import pytest
import uvicorn
from starlette.responses import JSONResponse, StreamingResponse

from hybrimoe.server.app import create_app
from hybrimoe.server.served import Served

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DESK = {"width": 1280, "height": 800}
SECONDS = 20


class Answer:
    """An answer to a chat: `pieces` of text, of which `hold` waits before the rest until the test says `go()`.

    done: with the end that a complete stream has. refused: (status, message, headers) in place of a reply.
    """

    def __init__(self, *pieces, hold=None, done=True, reasoning="", refused=None):
        self.pieces, self.hold, self.done, self.reasoning, self.refused = pieces, hold, done, reasoning, refused
        self.going = threading.Event()

    def go(self):
        self.going.set()

    def events(self):
        if self.reasoning:
            yield self._delta(reasoning_content=self.reasoning)
        for number, piece in enumerate(self.pieces):
            if number == self.hold:
                assert self.going.wait(SECONDS)
            yield self._delta(content=piece)
        if self.done:
            yield self._event(choices=[], usage={"prompt_tokens": 9, "completion_tokens": max(2, len(self.pieces))})
            yield "data: [DONE]\n\n"

    def _delta(self, **delta):
        return self._event(choices=[{"index": 0, "delta": delta, "finish_reason": None}])

    @staticmethod
    def _event(**data):
        return f"data: {json.dumps(data)}\n\n"


class Scripted:
    """The application, but for chats to which `answers` has an answer. `asked`: all chats, as they were asked."""

    def __init__(self, app):
        self.app, self.answers, self.asked = app, deque(), []

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http" or scope["path"] != "/v1/chat/completions":
            await self.app(scope, receive, send)
            return
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        self.asked.append(json.loads(body))
        if self.answers:
            await self._answered(self.answers.popleft())(scope, receive, send)
            return
        first = [{"type": "http.request", "body": body, "more_body": False}]

        async def replayed():
            return first.pop() if first else await receive()

        await self.app(scope, replayed, send)

    @staticmethod
    def _answered(answer):
        if answer.refused is None:
            return StreamingResponse(answer.events(), media_type="text/event-stream")
        status, message, headers = answer.refused
        code = headers.pop("code", None)
        return JSONResponse({"error": {"message": message, "code": code}}, status, headers)


class Site:
    """A running server: `url`, and what a test makes of its answers."""

    def __init__(self, app):
        self.script = Scripted(app)
        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        self._server = uvicorn.Server(uvicorn.Config(self.script, log_level="error", timeout_graceful_shutdown=1))
        self._thread = threading.Thread(target=self._server.run, args=([listener],), daemon=True)
        self._thread.start()

    def answers(self, *pieces, **how):
        """The next chat gets this answer."""
        answer = Answer(*pieces, **how)
        self.script.answers.append(answer)
        return answer

    @property
    def asked(self):
        return self.script.asked

    def close(self):
        self._server.should_exit = True
        self._thread.join(SECONDS)


@pytest.fixture(scope="module")
def site_of(generator):
    """Makes servers of the tiny model: `site_of(**settings of the application)`."""
    opened = []

    def make(loaded=True, **settings):
        served = Served("tiny")
        if loaded:
            served.open(generator)
        site = Site(create_app(served, **settings))
        opened.append((served, site))
        return site

    yield make
    for served, site in opened:
        site.close()
        served.close()


@pytest.fixture(scope="module")
def shared_site(site_of):
    return site_of()


@pytest.fixture
def site(shared_site):
    """A server that no other test has left an answer in."""
    shared_site.script.answers.clear()
    shared_site.asked.clear()
    return shared_site


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright: install the extra `browser`")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (Debian and Ubuntu: apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        as_root = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=[*as_root, "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, site):
    """Opens pages, each in a browser of its own: `visit()`, `visit(url, viewport=...)`; `visit.tab(page)`: another tab
    of a page's browser. None may raise an error."""
    visitor = Visitor(chromium, site.url)
    yield visitor
    for context in visitor.contexts:
        context.close()
    assert not visitor.errors


class Visitor:
    """See `visit`."""

    def __init__(self, browser, url):
        self._browser, self._url = browser, url
        self.contexts, self.errors = [], []

    def __call__(self, url=None, **settings):
        context = self._browser.new_context(**{"viewport": DESK, **settings})
        context.set_default_timeout(1000 * SECONDS)
        context.on("weberror", lambda error: self.errors.append(str(error.error)))
        self.contexts.append(context)
        return self._opened(context, url or self._url)

    def tab(self, page):
        return self._opened(page.context, page.url)

    @staticmethod
    def _opened(context, url):
        page = context.new_page()
        page.goto(url)
        page.wait_for_selector("html[data-ready]")
        return page
