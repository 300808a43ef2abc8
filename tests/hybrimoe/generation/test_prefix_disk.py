"""The disk level of the prefix cache: what an earlier process computed comes back, and a bad file is only a miss."""

from __future__ import annotations

import logging
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cpu_kernels.engine.checksum import LINE_BYTES
from cpu_kernels.host.ready_memory import ReadyMemory
from hybrimoe.amounts import Amount
from hybrimoe.errors import BudgetError, FileError
from hybrimoe.generation import TextGenerator
from hybrimoe.generation.kv_cache import CHECKPOINT_TAIL_TOKENS
from hybrimoe.generation.prefix.blocks import BLOCK_TOKENS, PrefixTree
from hybrimoe.generation.prefix.budget import DiskSettings, PrefixSettings, prefix_tree
from hybrimoe.generation.prefix.disk import DiskLevel
from hybrimoe.generation.prefix.encoding import ALIGNMENT
from hybrimoe.generation.prefix.folder import Folder, room_bytes
from hybrimoe.generation.prefix.keys import Record, first_key, name_of
from tests.hybrimoe.generation.prefix_replies import FAMILIES, GREEDY, SYSTEM, Counting, has_plain_layers_only, made

PLENTY = 1 << 30
PATIENCE_S = 120.0
KEY = first_key("a model")


@pytest.fixture(scope="module", params=FAMILIES)
def generator(request: pytest.FixtureRequest) -> Iterator[TextGenerator]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield made(request.param)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def plain() -> Iterator[TextGenerator]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield made("deepseek_v2")
    torch.set_num_threads(threads)


def process(generator: TextGenerator, folder: Path, **settings: Any) -> Counting:
    """An engine as another process has it: nothing in memory, and the files of a folder."""
    disk = DiskLevel(folder, settings.pop("disk_bytes", PLENTY), settings.pop("identity", "a model"))
    return Counting(generator, disk=disk, **settings)


def ended(counting: Counting) -> None:
    counting.tree.close(PATIENCE_S)


def kept(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.kv"))


def test_a_later_process_reuses_what_an_earlier_one_computed(generator: TextGenerator, tmp_path: Path) -> None:
    first = process(generator, tmp_path)
    (reply,) = first.answers(SYSTEM)
    turn = [*SYSTEM, *reply.token_ids[:-1]]
    ended(first)
    second = process(generator, tmp_path)
    (again,) = second.answers([*turn, 7, 8, 9])
    assert again.n_reused == again.n_read == len(turn)
    ended(second)
    third = process(generator, tmp_path)
    (same,) = third.answers(SYSTEM)
    assert len(SYSTEM) - same.n_reused == (0 if has_plain_layers_only(generator) else CHECKPOINT_TAIL_TOKENS)
    assert third.answers([*turn, 7, 8, 9, 10])[0].n_reused >= len(turn)
    assert third.tree.n_read_tokens > 0
    ended(third)


@pytest.mark.parametrize("generator", ["deepseek_v2", "qwen3_next"], indirect=True)
def test_what_memory_gives_up_comes_back_from_disk(generator: TextGenerator, tmp_path: Path) -> None:
    states = 0 if has_plain_layers_only(generator) else PrefixTree(generator.model, 1).n_bytes
    counting = process(generator, tmp_path, max_bytes=states + 3 * BLOCK_TOKENS * generator.token_bytes() + (1 << 16))
    texts = [[number + 4, *SYSTEM] for number in range(4)]
    for text in texts:
        counting.answers(text)
    assert counting.tree.disk is not None
    assert counting.tree.disk.wait(PATIENCE_S)
    assert counting.answers([*texts[0], 5, 6])[0].n_reused >= len(texts[0]) - CHECKPOINT_TAIL_TOKENS
    assert counting.tree.n_bytes <= counting.tree.max_bytes
    ended(counting)


def test_another_model_and_another_text_find_nothing(plain: TextGenerator, tmp_path: Path) -> None:
    first = process(plain, tmp_path)
    first.answers(SYSTEM)
    ended(first)
    for identity, prompt in (("another model", SYSTEM), ("a model", [95, *SYSTEM])):
        other = process(plain, tmp_path, identity=identity)
        assert other.answers(prompt)[0].n_reused == 0
        ended(other)


def test_replies_do_not_wait_for_the_disk(
    plain: TextGenerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, write = threading.Event(), Folder.write

    def slow(*arguments: Any) -> bool:
        assert go.wait(PATIENCE_S)
        return write(*arguments)

    monkeypatch.setattr(Folder, "write", slow)
    counting = process(plain, tmp_path)
    counting.answers(SYSTEM)
    assert counting.answers([*SYSTEM, 5])[0].n_reused == len(SYSTEM)
    assert kept(tmp_path) == []
    go.set()
    ended(counting)
    assert kept(tmp_path)


def test_others_get_tokens_while_a_prompt_is_read(
    plain: TextGenerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = process(plain, tmp_path)
    first.answers(SYSTEM)
    ended(first)
    go, read = threading.Event(), Folder.read

    def slow(*arguments: Any) -> Any:
        assert go.wait(PATIENCE_S)
        return read(*arguments)

    monkeypatch.setattr(Folder, "read", slow)
    engine = process(plain, tmp_path).engine
    other = engine.admit([9, 8, 7], GREEDY, lambda: False)
    waiting = engine.admit(SYSTEM, GREEDY, lambda: False)
    while not other.has_ended():
        list(engine.step())
    assert len(other.token_ids) == GREEDY.max_new_tokens
    assert waiting.token_ids == []
    go.set()
    while not waiting.has_ended():
        list(engine.step())
    assert waiting.n_reused == waiting.n_read == len(SYSTEM)


# Files that are not whole --------------------------------------------------------------------------------------------


def record(number: int = 0, n_values: int = 3) -> Record:
    token_ids = (number, 1, 2)
    held = {0: (torch.arange(n_values, dtype=torch.bfloat16), torch.arange(n_values, dtype=torch.int8))}
    return Record(name_of("block", KEY, token_ids), token_ids, held, 64, time.time_ns())


def written(folder: Path, *records: Record, max_bytes: int = PLENTY) -> DiskLevel:
    disk = DiskLevel(folder, max_bytes, "a model")
    for one in records:
        disk.keep(one)
    assert disk.wait(PATIENCE_S)
    return disk


def test_a_file_that_is_cut_or_changed_anywhere_is_a_miss_and_is_deleted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = record()
    disk = written(tmp_path, one)
    (file,) = kept(tmp_path)
    whole = file.read_bytes()
    content = disk.read("block", KEY, one.token_ids).result()
    assert [part.tolist() for part in content[0]] == [[0, 1, 2], [0, 1, 2]]
    assert [part.dtype for part in content[0]] == [torch.bfloat16, torch.int8]
    cut = [whole[:n] for n in range(len(whole))]
    flipped = [bytes([*whole[:n], whole[n] ^ 1 << n % 8, *whole[n + 1 :]]) for n in range(0, len(whole), 5)]
    caplog.set_level(logging.CRITICAL)
    for damaged in (*cut, *flipped, whole + b"x"):
        file.write_bytes(damaged)
        disk.likest(KEY, (*one.token_ids[:-1], 9))  # looks at the file's beginning
        assert disk.read("block", KEY, one.token_ids).result() is None
        assert disk.likest(KEY, (*one.token_ids[:-1], 9)) == ((), 0)
        assert not file.exists()
    assert disk.n_damaged == len(cut) + len(flipped) + 1
    disk.close(PATIENCE_S)
    file.write_bytes(whole)
    disk = written(tmp_path)
    assert disk.likest(KEY, (*one.token_ids[:-1], 9)) == (one.token_ids, 2)
    assert disk.read("block", KEY, one.token_ids).result() is not None
    assert disk.read("block", KEY, (5, 1, 2)).result() is None, "no such file is no damaged one"
    disk.close(PATIENCE_S)


def test_tensors_lie_in_files_as_checksums_take_them() -> None:
    assert ALIGNMENT % LINE_BYTES == 0


def test_a_file_under_the_name_of_another_text_is_none_of_it(tmp_path: Path) -> None:
    disk = written(tmp_path, record())
    kept(tmp_path)[0].rename(tmp_path / record(1).name)
    assert disk.read("block", KEY, record(1).token_ids).result() is None
    assert kept(tmp_path) == []
    disk.close(PATIENCE_S)


def test_what_follows_a_damaged_block_is_computed(plain: TextGenerator, tmp_path: Path) -> None:
    text = [*SYSTEM, *SYSTEM[::-1]]
    first = process(plain, tmp_path)
    first.answers(text)
    ended(first)
    files = {path.name.split("-")[1]: path for path in kept(tmp_path) if path.name.startswith("block64")}
    second_block = files[next(iter(files[KEY.hex()].name[:-3].split("-")[2:]))]
    data = bytearray(second_block.read_bytes())
    data[-1] ^= 1
    second_block.write_bytes(data)
    later = process(plain, tmp_path)
    assert later.answers(text)[0].n_reused == BLOCK_TOKENS
    ended(later)
    assert process(plain, tmp_path).answers(text)[0].n_reused == len(text), "and was written again"


KILLED = """
import sys, time
from pathlib import Path
from hybrimoe.generation.prefix.folder import Folder, room_bytes
from hybrimoe.generation.prefix.keys import name_of

folder = Folder(Path(sys.argv[1]), 1 << 30)
for number in range(1_000_000):
    pieces = [memoryview(bytes([number % 251]) * 1000)] * 1000
    folder.write(name_of("block", bytes(16), (number,)), pieces, time.time_ns())
    print(number, flush=True)
"""


def test_a_process_that_is_killed_leaves_whole_files_only(tmp_path: Path) -> None:
    """It writes all the time, so it is killed in the middle of a file."""
    with subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert [int(child.stdout.readline()) for _ in range(20)] == list(range(20))
        child.kill()
    folder = Folder(tmp_path, PLENTY)
    assert list(tmp_path.glob(".partial-*")) == []
    assert len(folder) == len(kept(tmp_path)) >= 20
    for number in range(len(folder)):
        data = (tmp_path / name_of("block", bytes(16), (number,))).read_bytes()
        assert data == bytes([number % 251]) * 1_000_000
    folder.close()


# The folder ----------------------------------------------------------------------------------------------------------


def test_the_longest_unused_leaves_first_and_the_end_of_a_text_before_its_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hybrimoe.generation.prefix.folder.FREED_SHARE", 1 << 40)
    records = [record(number, 1 << 10) for number in range(8)]
    disk = written(tmp_path, *records[:4])
    size = disk.n_bytes // 4
    disk.used([records[2].name, records[0].name])
    disk.close(PATIENCE_S)
    left = [0, 1, 2, 3]
    for new, gone in ((4, 1), (5, 3), (6, 0), (7, 2)):
        disk = written(tmp_path, record(new, 1 << 10), max_bytes=4 * size)
        left = [*(number for number in left if number != gone), new]
        assert kept(tmp_path) == sorted(tmp_path / records[number].name for number in left)
        assert (disk.n_bytes, disk.n_files, disk.n_evicted) == (4 * size, 4, 1)
        disk.close(PATIENCE_S)


def test_processes_share_a_folder_and_its_budget(tmp_path: Path) -> None:
    size = written(tmp_path / "one", record(0, 1 << 10)).n_bytes
    levels = [DiskLevel(tmp_path, 8 * size, "a model") for _ in range(2)]
    for number in range(30):
        levels[number % 2].keep(record(number, 1 << 10))
        assert levels[number % 2].wait(PATIENCE_S)
        assert sum(path.stat().st_size for path in kept(tmp_path)) <= 8 * size
    for disk in levels:
        disk.refresh()
        assert disk.n_files == len(kept(tmp_path))
        assert disk.longest("block", KEY, (29, 1, 2, 3)) == 3
        assert disk.read("block", KEY, (29, 1, 2)).result() is not None
        disk.close(PATIENCE_S)


def test_the_files_are_for_their_user_alone(plain: TextGenerator, tmp_path: Path) -> None:
    folder = tmp_path / "prefixes"
    counting = process(plain, folder)
    counting.answers(SYSTEM)
    ended(counting)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}


def test_a_full_disk_is_said_once_and_replies_go_on(
    plain: TextGenerator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    counting = process(plain, tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        counting.answers(SYSTEM)
        assert counting.tree.disk is not None
        assert counting.tree.disk.wait(PATIENCE_S)
        counting.answers([*SYSTEM, 5], [7, *SYSTEM])
        ended(counting)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [one.message.count("writes no more into") for one in caplog.records] == [1]
    assert counting.tree.disk.reason
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_the_settings_make_a_disk_level_or_say_why_not(plain: TextGenerator, tmp_path: Path) -> None:
    def tree(size: Amount, memory: Amount | None = None, folder: Path = tmp_path) -> PrefixTree | None:
        disk = DiskSettings(folder, size, "a model")
        return prefix_tree(plain.model, PrefixSettings(memory or Amount("bytes", PLENTY), disk), 0)

    for size in (Amount("auto"), Amount("bytes", 1 << 30), Amount("share", 0.01)):
        made_here = tree(size)
        assert made_here is not None
        assert made_here.disk is not None
        assert made_here.disk.max_bytes > 0
        made_here.close(PATIENCE_S)
    off = tree(Amount("none"))
    assert off is not None
    assert off.disk is None
    with pytest.raises(BudgetError, match=r"prefix_cache_disk: 7B is 7B, and 64 tokens take"):
        tree(Amount("bytes", 7))
    with pytest.raises(BudgetError, match=r"through server\.prefix_cache, which is none"):
        tree(Amount("auto"), Amount("none"))
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="prefix_cache_folder: cannot use"):
        tree(Amount("auto"), folder=tmp_path / "file" / "inside")


# Reading what a prompt begins with -----------------------------------------------------------------------------------


def test_what_has_come_is_in_the_replys_cache_while_the_rest_is_read(
    plain: TextGenerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = [*SYSTEM, *SYSTEM[::-1], *SYSTEM[::3]]
    first = process(plain, tmp_path)
    first.answers(text)
    ended(first)
    go, read, n_begun = threading.Event(), Folder.read, []

    def slow(folder: Folder, name: str, room: Any = None) -> Any:
        n_begun.append(name)
        assert len(n_begun) < 3 or go.wait(PATIENCE_S)
        return read(folder, name, room)

    monkeypatch.setattr(Folder, "read", slow)
    later = process(plain, tmp_path)
    reply = later.engine.admit(text, GREEDY, lambda: False)
    while len(reply.cache.token_ids) < 2 * BLOCK_TOKENS:
        assert not reply.token_ids
        list(later.engine.step())
    assert reply.cache.token_ids == text[: 2 * BLOCK_TOKENS]
    assert later.tree.n_blocks == 2
    go.set()
    while not reply.has_ended():
        list(later.engine.step())
    alone = plain.reply(text, GREEDY)
    assert "".join(alone) == reply.text
    assert reply.n_reused == reply.n_read == len(text)


def test_files_are_read_where_the_system_keeps_them_in_its_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = record(n_values=3 << 18)
    disk = written(tmp_path, one)
    expected = [part.clone() for part in one.content[0]]

    def refuse(*_arguments: Any) -> int:
        raise OSError(22, "no direct reading here")

    for refused in (False, True):
        with monkeypatch.context() as patched:
            if refused:
                patched.setattr("hybrimoe.generation.prefix.folder.os.readv", refuse)
            content = disk.read("block", KEY, one.token_ids).result()
        assert all(torch.equal(a, b) for a, b in zip(content[0], expected, strict=True))
    disk.close(PATIENCE_S)


def test_whoever_waits_for_a_file_is_told_what_went_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [record(number) for number in range(3)]
    disk = written(tmp_path, *records)

    def fail(*_arguments: Any) -> Any:
        raise MemoryError("none left")

    monkeypatch.setattr(Folder, "read", fail)
    readings = disk.read_each([(one.name, one.token_ids) for one in records])
    for result in readings.results:
        with pytest.raises(MemoryError, match="none left"):
            result.result(PATIENCE_S)
    disk.close(PATIENCE_S)


def test_memory_is_ready_for_the_text_that_was_used_last(
    plain: TextGenerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = process(plain, tmp_path)
    first.answers([95, *SYSTEM, *SYSTEM])
    (reply,) = first.answers(SYSTEM)
    ended(first)
    second = process(plain, tmp_path)
    disk = second.tree.disk
    assert disk is not None
    assert disk.ready.wait(PATIENCE_S)
    latest = [disk.size(name) for name in disk._latest()]
    assert disk.ready.n_bytes >= 2 * sum(latest) > 0
    asked: list[int] = []
    take = ReadyMemory.take
    monkeypatch.setattr(ReadyMemory, "take", lambda self, n_bytes: asked.append(n_bytes) or take(self, n_bytes))
    (again,) = second.answers([*SYSTEM, *reply.token_ids[:-1], 7])
    assert again.n_read == len(SYSTEM) + len(reply.token_ids) - 1
    assert asked[0] == sum(map(room_bytes, latest))
    assert disk.ready.n_bytes == 0
    ended(second)


def test_memory_that_is_ready_is_part_of_the_budget(plain: TextGenerator, tmp_path: Path) -> None:
    first = process(plain, tmp_path)
    first.answers(SYSTEM)
    ended(first)
    tree = process(plain, tmp_path, max_bytes=1 << 20).tree
    assert tree.disk is not None
    assert 0 < tree.disk.ready.n_bytes <= tree.max_bytes // 2
    tree.max_bytes = tree.disk.ready.n_bytes
    assert tree._make_room(1, [])
    assert tree.disk.ready.n_bytes == 0
    tree.close(PATIENCE_S)
