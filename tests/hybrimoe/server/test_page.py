"""The page's files: headers, references, the vendored libraries' checksums, the option that leaves the page out."""

import hashlib
import json
import re

import pytest

from hybrimoe.server.page.files import ASSETS, FOLDER, read_files

FILES = read_files()
REFERENCES = re.compile(r'(?:href|src)="page/([^"#]+)"|from "(\.[^"]+)"|import\("(\.[^"]+)"\)')
OWN = sorted(path for path in ASSETS.rglob("*.js") if path.parent.name != "vendor")


def test_the_page_comes_with_a_policy_that_lets_nothing_from_elsewhere_in(call):
    page = call("GET", "/")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"].split("; ")
    assert "default-src 'self'" in policy
    assert not any("unsafe" in part or "*" in part or "http" in part for part in policy)


def test_nothing_in_the_page_breaks_its_own_policy():
    page = FILES["index.html"].content.decode()
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)[^>]*>", page)
    for path in OWN:
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|\beval\(|document\.write", path.read_text()), path


def test_what_files_refer_to_is_there(call):
    found = {
        ((ASSETS / name).parent / target).resolve().relative_to(ASSETS).as_posix()
        for name, file in FILES.items()
        if not name.startswith("vendor/")
        for match in REFERENCES.finditer(file.content.decode())
        for target in filter(None, match.groups())
    }
    assert len(found) > 20
    for path in sorted(found):
        answer = call("GET", FOLDER + path)
        assert (answer.status_code, answer.content) == (200, FILES[path].content), path


def test_own_scripts_say_what_they_are():
    assert len(OWN) > 15
    silent = [path.name for path in OWN if not path.read_text(encoding="utf-8").startswith("// ")]
    assert not silent


def test_an_unchanged_file_is_not_sent_again(calling, application):
    app, _ = application()
    first = calling(app)("GET", "/page/js/main.js")
    assert first.headers["cache-control"] == "no-cache"
    again = _with(app, "/page/js/main.js", {"if-none-match": f'"other", W/{first.headers["etag"]}'})
    assert (again.status_code, again.content) == (304, b"")
    assert _with(app, "/page/js/main.js", {"if-none-match": '"other"'}).status_code == 200


@pytest.mark.parametrize("path", ["/page/../app.py", "/page/%2e%2e/files.py", "/page/js", "/page/none.js"])
def test_nothing_but_the_page_is_served(call, path):
    assert call("GET", path).status_code == 404


def test_files_need_no_key_and_data_does(calling, application):
    app, _ = application(api_keys=["secret"])
    call = calling(app)
    assert [call("GET", path).status_code for path in ("/", "/page/js/main.js")] == [200, 200]
    data = ("/v1/models", "/hybrimoe/state", "/hybrimoe/experts", "/metrics")
    assert {call("GET", path).status_code for path in data} == {401}
    assert call("POST", "/hybrimoe/settings", {"slots": 1}).status_code == 401
    assert _with(app, "/hybrimoe/state", {"authorization": "Bearer secret"}).status_code == 200


def test_without_the_page_there_is_none(calling, application):
    call = calling(application(page=False)[0])
    assert [call("GET", path).status_code for path in ("/", "/page/js/main.js", "/health")] == [404, 404, 200]


def test_vendored_libraries_are_those_that_are_listed():
    listed = json.loads(FILES["vendor/vendored.json"].content)
    expected = {
        f"vendor/{name}": file["sha256"] for library in listed.values() for name, file in library["files"].items()
    }
    found = {
        name: hashlib.sha256(file.content).hexdigest()
        for name, file in FILES.items()
        if name.startswith("vendor/") and name != "vendor/vendored.json"
    }
    assert found == expected, "run `python benchmarks/page_vendor.py`, or undo the change"
    for name, library in listed.items():
        assert library["version"], name
        assert library["licence"], name
        assert any("LICENSE" in file["from"] for file in library["files"].values()), name


def _with(app, path, headers):
    from starlette.testclient import TestClient

    return TestClient(app).get(path, headers=headers)
