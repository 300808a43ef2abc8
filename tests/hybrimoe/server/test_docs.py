"""The requests in the docs of the server are answered as they stand there."""

import re
import shlex
from pathlib import Path

import pytest

from hybrimoe.server.slots import SlotFiles

DOCS = Path(__file__).resolve().parents[3] / "docs"
PAGES = [DOCS / f"{name}.md" for name in ("server", "agents", "several-models", "monitoring")]


def requests():
    """(path, body) of each curl command of the pages."""
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    blocks = [block for text in texts for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)]
    commands = [command for block in blocks for command in re.split(r"^curl ", block, flags=re.MULTILINE)[1:]]
    words = [shlex.split(command) for command in commands]
    return [(one[0].removeprefix("http://127.0.0.1:8000"), sent(one)) for one in words]


def sent(words):
    """The body of a command; None: it is a GET."""
    if len(words) == 1:
        return None
    return "" if words[1:] == ["-X", "POST"] else words[2]


ALONE = [(path, body) for path, body in requests() if not path.startswith("/slots/")]
OF_SLOTS = [(path, body) for path, body in requests() if path.startswith("/slots/") or "id_slot" in (body or "")]


def test_requests_were_found():
    assert len(requests()) > 10


@pytest.mark.parametrize(("path", "body"), ALONE, ids=[path for path, _ in ALONE])
def test_a_documented_request_is_answered(call, path, body):
    pytest.importorskip("llguidance", reason="structured replies need the extra serve")
    answer = ask(call, path, body)
    assert answer.status_code == 200, answer.text


def test_what_is_documented_of_slots_is_answered_in_its_order(application, calling, tmp_path):
    call = calling(application(slot_files=SlotFiles(tmp_path, "this model"))[0])
    assert [path.partition("=")[2] for path, _ in OF_SLOTS] == ["", "save", "erase", "restore"]
    for path, body in OF_SLOTS:
        answer = ask(call, path, body)
        assert answer.status_code == 200, answer.text
    assert answer.json()["n_restored"] > 0


def ask(call, path, body):
    if body is None:
        return call("GET", path)
    return call("POST", path, body.replace('"model": "demo"', '"model": "tiny"').encode() or None)
