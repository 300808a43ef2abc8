"""The requests in the docs of the server are answered as they stand there."""

import re
import shlex
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[3] / "docs"
PAGES = [DOCS / f"{name}.md" for name in ("server", "agents", "several-models", "monitoring")]


def requests():
    """(path, body) of each curl command of the pages."""
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    blocks = [block for text in texts for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)]
    commands = [command for block in blocks for command in re.split(r"^curl ", block, flags=re.MULTILINE)[1:]]
    words = [shlex.split(command) for command in commands]
    return [(one[0].removeprefix("http://127.0.0.1:8000"), one[2] if len(one) > 1 else None) for one in words]


def test_requests_were_found():
    assert len(requests()) > 10


@pytest.mark.parametrize(("path", "body"), requests(), ids=[path for path, _ in requests()])
def test_a_documented_request_is_answered(call, path, body):
    pytest.importorskip("llguidance", reason="structured replies need the extra serve")
    answer = (
        call("GET", path)
        if body is None
        else call("POST", path, body.replace('"model": "demo"', '"model": "tiny"').encode())
    )
    assert answer.status_code == 200, answer.text
