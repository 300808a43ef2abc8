"""Slots that are saved, erased and restored as llama-server's clients ask for it, also over a restart."""

import asyncio
import resource
import time

import pytest

from hybrimoe.amounts import Amount
from hybrimoe.errors import ConfigError
from hybrimoe.generation.prefix.budget import DiskSettings, PrefixSettings
from hybrimoe.generation.saved.states_file import write_states
from hybrimoe.server.slots import SlotFiles

PROMPT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 6
ASK = {"prompt": PROMPT, "n_predict": 9, "temperature": 0}
NONE = PrefixSettings(Amount("none"))
SOME = PrefixSettings(Amount("bytes", 64 << 20))


@pytest.fixture
def files(tmp_path):
    return SlotFiles(tmp_path / "slots", "this model", "tiny")


@pytest.fixture
def serving(application, calling, files):
    """Starts a server whose slots are saved; each is a process's start as far as memory goes."""
    SlotFiles.check(files.folder)

    def make(**settings):
        app, served = application(**({"slot_files": files, "parallel": 2} | settings))
        return calling(app), served, app

    return make


def act(ask, slot, action, name="one.bin"):
    return ask("POST", f"/slots/{slot}?action={action}", None if action == "erase" else {"filename": name})


def told(answer):
    """Text, and tokens of the prompt that were computed."""
    body = answer.json()
    return body["content"], body["timings"]["prompt_n"], body["id_slot"]


@pytest.mark.parametrize("prefixes", [NONE, SOME])
def test_a_saved_slot_goes_on_in_another_server(serving, files, prefixes):
    ask, served, _ = serving(prefix_cache=prefixes)
    text, n_prompt, slot = told(ask("POST", "/completion", ASK | {"id_slot": 1}))
    assert (n_prompt > 64, slot) == (True, 1)
    saved = act(ask, 1, "save").json()
    n_bytes = (files.folder / "one.bin").stat().st_size
    assert saved == {
        "id_slot": 1, "filename": "one.bin", "n_saved": n_prompt + 8, "n_written": n_bytes,
        "timings": {"save_ms": saved["timings"]["save_ms"]},
    }  # fmt: skip
    assert saved["timings"]["save_ms"] > 0
    served.close()
    ask, _, _ = serving(prefix_cache=prefixes)
    restored = act(ask, 0, "restore").json()
    assert restored == {
        "id_slot": 0, "filename": "one.bin", "n_restored": n_prompt + 8, "n_read": n_bytes,
        "timings": {"restore_ms": restored["timings"]["restore_ms"]},
    }  # fmt: skip
    assert told(ask("POST", "/completion", ASK)) == (text, 1, 0)
    chat = {"prompt": PROMPT, "max_tokens": 9, "temperature": 0}
    answer = ask("POST", "/v1/completions", chat).json()
    assert answer["choices"][0]["text"] == text
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= n_prompt - 1


def test_what_is_restored_serves_every_slot_and_has_the_bits_that_were_saved(serving):
    ask, served, _ = serving(prefix_cache=SOME)
    text, _, _ = told(ask("POST", "/completion", ASK | {"id_slot": 0}))
    before = [tensor.clone() for pair in held(served, 0) for tensor in pair]
    assert act(ask, 0, "save").status_code == 200
    served.close()
    ask, served, _ = serving(prefix_cache=SOME)
    assert act(ask, 1, "restore").status_code == 200
    assert all(a.equal(b) for a, b in zip(before, (one for pair in held(served, 1) for one in pair), strict=True))
    assert told(ask("POST", "/completion", ASK | {"id_slot": 0})) == (text, 1, 0)


def held(served, number):
    engine = served.engine

    def look():
        cache = engine.hold(number)
        engine.release(cache)
        return cache.keys_and_values()

    return served.worker().between_steps(look).result()


def test_an_erased_slot_is_computed_again_wherever_its_text_was_kept(serving, tmp_path):
    disk = DiskSettings(tmp_path / "prefixes", Amount("bytes", 64 << 20), "this model")
    ask, served, _ = serving(prefix_cache=PrefixSettings(Amount("bytes", 64 << 20), disk))
    other = {**ASK, "prompt": PROMPT[:300] + "But not for long."}
    text, n_prompt, _ = told(ask("POST", "/completion", ASK | {"id_slot": 0}))
    told(ask("POST", "/completion", other | {"id_slot": 1}))
    tree = served.engine.prefixes
    assert act(ask, 0, "erase").json() == {"id_slot": 0, "n_erased": n_prompt + 8}
    assert tree.disk.wait(5.0)
    assert act(ask, 0, "erase").json()["n_erased"] == 0
    again, n_again, _ = told(ask("POST", "/completion", ASK | {"id_slot": 0}))
    assert again == text
    shared = len(served.worker().generator.encode(PROMPT[:300]))
    assert n_prompt - shared <= n_again < n_prompt, "only what the other text shares is still known"
    act(ask, 1, "erase")
    act(ask, 0, "erase")
    assert tree.disk.wait(5.0)
    assert (tree.n_blocks, tree.n_bytes, tree.disk.n_files) == (0, 0, 0)
    assert told(ask("POST", "/completion", ASK | {"id_slot": 0})) == (text, n_prompt, 0)


def test_without_a_folder_the_answer_says_which_option_to_set(call):
    for action in ("save", "restore", "erase"):
        answer = act(call, 0, action)
        assert answer.status_code == 400
        assert "--slot-save-path" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "name",
    [
        "../one.bin",
        "/etc/passwd",
        "a/b",
        "..",
        ".",
        ".hidden",
        "",
        " x",
        "x ",
        "x.",
        "a\\b",
        "c:x",
        "a\x00b",
        "x" * 201,
    ],
)
def test_files_stay_in_the_folder(serving, name):
    ask, _, _ = serving()
    ask("POST", "/completion", ASK | {"id_slot": 0})
    for action in ("save", "restore"):
        answer = act(ask, 0, action, name)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "filename"), answer.text


def test_what_cannot_be_is_refused_by_name(serving, files):
    ask, _, _ = serving()
    cases = [
        ("/slots/7?action=save", {"filename": "x"}, "there is no slot 7: this server has 0, 1"),
        ("/slots/x?action=save", {"filename": "x"}, "id_slot"),
        ("/slots/0?action=copy", {"filename": "x"}, "action"),
        ("/slots/0", {"filename": "x"}, "action"),
        ("/slots/0?action=save", {}, "filename: expected the name"),
        ("/slots/0?action=save", None, "filename: expected the name"),
        ("/slots/0?action=save", {"filename": "x"}, "the slot is empty"),
        ("/slots/0?action=restore", {"filename": "x"}, "there is no saved slot x"),
        ("/completion", ASK | {"id_slot": 2}, "there is no slot 2"),
    ]
    for path, body, words in cases:
        answer = ask("POST", path, body)
        assert answer.status_code == 400, answer.text
        assert words in answer.json()["error"]["message"]
    assert list(files.folder.iterdir()) == []


def test_a_file_that_is_something_else_stays_as_it_is(serving, files):
    ask, _, _ = serving()
    ask("POST", "/completion", ASK | {"id_slot": 0})
    (files.folder / "notes.txt").write_text("mine")
    answer = act(ask, 0, "save", "notes.txt")
    assert (answer.status_code, "no saved slot" in answer.text) == (400, True)
    assert (files.folder / "notes.txt").read_text() == "mine"
    assert act(ask, 0, "restore", "notes.txt").status_code == 400
    assert [act(ask, 0, "save", "again.bin").status_code for _ in "ab"] == [200, 200]


def test_a_damaged_file_is_refused_and_the_slot_stays_as_it_is(serving, files):
    ask, _, _ = serving(prefix_cache=NONE)
    text, _, _ = told(ask("POST", "/completion", ASK | {"id_slot": 0}))
    act(ask, 0, "save")
    file = files.folder / "one.bin"
    whole = file.read_bytes()
    changed = bytearray(whole)
    changed[-100] ^= 1
    for data in (*(whole[:length] for length in (0, 7, 100, len(whole) // 2, len(whole) - 1)), bytes(changed)):
        file.write_bytes(data)
        answer = act(ask, 0, "restore")
        assert (answer.status_code, "damaged" in answer.text) == (400, True), answer.text
    assert told(ask("POST", "/completion", ASK)) == (text, 1, 0)


def test_states_of_another_model_are_refused_by_name(serving, files, generator):
    ask, served, _ = serving()
    ask("POST", "/completion", ASK | {"id_slot": 0})
    pairs = held(served, 0)
    n_tokens = pairs[0][0].shape[-2]
    for identity, model, words in (("x", "other", "of the model other"), ("x", "tiny", "another template")):
        write_states(files.folder / "one.bin", [1] * n_tokens, pairs, identity, model)
        answer = act(ask, 1, "restore")
        assert (answer.status_code, words in answer.text) == (400, True), answer.text
    write_states(files.folder / "one.bin", [10**9] * n_tokens, pairs, files.identity, "tiny")
    assert "outside the vocabulary" in act(ask, 1, "restore").text
    write_states(files.folder / "one.bin", [1] * 513, pairs, files.identity, "tiny")
    assert "513 tokens, the context 512" in act(ask, 1, "restore").text


def test_a_full_disk_is_told_and_leaves_the_earlier_file(serving, files):
    ask, _, _ = serving()
    ask("POST", "/completion", ASK | {"id_slot": 0})
    act(ask, 0, "save")
    before = (files.folder / "one.bin").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        answer = act(ask, 0, "save")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (answer.status_code, answer.json()["error"]["code"]) == (507, "insufficient_storage"), answer.text
    assert "File too large" in answer.text
    assert [path.name for path in files.folder.iterdir()] == ["one.bin"]
    assert (files.folder / "one.bin").read_bytes() == before


def test_a_busy_slot_is_saved_once_its_reply_has_ended_and_requests_wait_for_their_slot(serving, client):
    _, served, app = serving(parallel=2)
    long = {"prompt": "It was", "n_predict": 120, "temperature": 0, "id_slot": 1}

    async def run():
        async with client(app) as http:
            first = asyncio.create_task(http.post("/completion", json=long))
            second = asyncio.create_task(http.post("/completion", json=long))
            while not served.engine.n_running:
                await asyncio.sleep(0.001)
            elsewhere = await http.post("/completion", json={"prompt": "Hi", "n_predict": 1})
            assert not first.done()
            saved = asyncio.create_task(http.post("/slots/1?action=save", json={"filename": "x"}))
            begin, ticks = time.monotonic(), 0
            while not saved.done():
                await asyncio.sleep(0.001)
                ticks += 1
            assert ticks > 20 * (time.monotonic() - begin), "the event loop went on"
            return elsewhere.json(), (await saved).json(), (await first).json(), (await second).json()

    elsewhere, saved, first, second = asyncio.run(run())
    assert (elsewhere["id_slot"], first["id_slot"], second["id_slot"]) == (0, 1, 1)
    assert saved["n_saved"] == first["tokens_evaluated"] + first["tokens_predicted"] - 1
    assert second["content"] == first["content"]


def test_requests_wait_while_the_only_slot_is_held(serving, client):
    _, served, app = serving(parallel=1)
    engine, worker = served.engine, served.worker()

    async def run():
        cache = worker.between_steps(lambda: engine.hold(0)).result()
        async with client(app) as http:
            asked = asyncio.create_task(http.post("/completion", json=ASK))
            await asyncio.sleep(0.1)
            assert (await http.get("/slots")).json()[0]["is_processing"] is True
            assert (asked.done(), served.n_waiting) == (False, 1)
            worker.between_steps(lambda: engine.release(cache)).result()
            assert (await asked).status_code == 200
            assert (await http.get("/slots")).json()[0]["is_processing"] is False

    asyncio.run(run())


def test_a_folder_that_cannot_be_used_is_said_at_the_start(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="slot_save_path: cannot use"):
        SlotFiles.check(tmp_path / "file")
    SlotFiles.check(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
