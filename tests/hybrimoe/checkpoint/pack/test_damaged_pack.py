"""Packs whose files are cut, edited or flipped: an error of ours or the same logits, and `verify` finds it."""

from __future__ import annotations

import hashlib
import json
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrimoe.checkpoint import convert, load, verify_pack
from hybrimoe.checkpoint.pack.record_file import MAGIC, PAGE_BYTES
from hybrimoe.checkpoint.source import CHECKSUMS_NAME, CONFIG_NAME, MANIFEST_NAME
from hybrimoe.errors import CheckpointError, HybriMoEError

from ..models import logits

TRIALS = 80
OPTIONS: dict[str, Any] = {"policy": "static", "accelerator": "none", "progress": False}
ODD = (
    None, True, 0, -1, 1.5, float("nan"), 2**31, 2**63, 2**70, "", "x", "../../x", "/etc/passwd", "\0", [], [[]], {},
    {"a": 1}, [-1, 2], "int4", 4096,
)  # fmt: skip
DEEP = "[" * 100_000


@pytest.fixture
def pack(directory: Path, tmp_path: Path) -> Path:
    convert(directory, tmp_path / "pack", expert_dtype="int8", dense_dtype="int8", progress=False)
    return tmp_path / "pack"


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where values stand in JSON: as keys and indices from its root."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield (*path, key)
        yield from places(value, (*path, key))


def edited(text: str | bytes, draw: random.Random) -> str:
    """JSON with one value that is another, gone, or there twice."""
    tree = json.loads(text)
    *path, last = draw.choice(list(places(tree)))
    inner = tree
    for key in path:
        inner = inner[key]
    match draw.randrange(3):
        case 0:
            del inner[last]
        case 1 if isinstance(inner, list):
            inner.insert(last, draw.choice(ODD))
        case _:
            inner[last] = draw.choice(ODD)
    return json.dumps(tree)


def with_header(data: bytes, text: str) -> bytes:
    """A record file with another header."""
    (length,) = struct.unpack_from("<I", data, len(MAGIC))
    start = -(-(len(MAGIC) + 4 + length) // PAGE_BYTES) * PAGE_BYTES
    head = MAGIC + struct.pack("<I", len(text)) + text.encode()
    return head + bytes(-len(head) % PAGE_BYTES) + data[start:]


def with_own_hash(text: str) -> bytes:
    """A file of checksums that is whole, whatever it says."""
    return f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}\n".encode()


def damaged(file: Path, data: bytes, draw: random.Random) -> bytes:
    """The bytes of a file of a pack with something wrong in it."""
    kind = draw.randrange(4)
    if kind == 0:
        return data[: draw.randrange(len(data))]
    if file.suffix == ".hybrimoe":
        (length,) = struct.unpack_from("<I", data, len(MAGIC))
        if kind == 1:
            lengths = (0, 1, length - 1, length + 1, PAGE_BYTES, 2**31, 2**32 - 1, len(data))
            return data[: len(MAGIC)] + struct.pack("<I", draw.choice(lengths)) + data[len(MAGIC) + 4 :]
        start = len(MAGIC) + 4
        return with_header(data, edited(data[start : start + length], draw))
    if file.name == CHECKSUMS_NAME:
        return with_own_hash(edited(data.split(b"\n")[1], draw))
    if file.suffix == ".json":
        return edited(data, draw).encode()
    changed = bytearray(data)
    changed[draw.randrange(min(len(data), 2000))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def test_whatever_is_damaged_is_refused_or_harmless(pack: Path) -> None:
    draw, expected = random.Random(0), logits(load(pack, **OPTIONS))
    files, refused, found = sorted(file for file in pack.iterdir() if file.name != CONFIG_NAME), 0, 0
    for _ in range(TRIALS):
        file = draw.choice(files)
        whole = file.read_bytes()
        file.write_bytes(damaged(file, whole, draw))
        is_changed = file.read_bytes() != whole
        try:
            assert torch.equal(logits(load(pack, **OPTIONS)), expected) or file.name == "model.safetensors"
        except HybriMoEError:
            refused += 1
        try:
            found += bool(verify_pack(pack).damaged) or not is_changed
        except CheckpointError:
            found += is_changed
        file.write_bytes(whole)
    assert refused > TRIALS / 3
    assert found == TRIALS
    assert sorted(pack.iterdir()) == sorted([*files, pack / CONFIG_NAME]), "nothing is added"


Change = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda found: found.update(experts="../experts-int8.hybrimoe"), "experts: expected the name of a file"),
        (lambda found: found.update(dense="a\0.hybrimoe"), "dense: expected the name of a file"),
        (lambda found: found.update(expert_dtype="int9"), "expert_dtype: expected one of"),
        (lambda found: found.update(layers=7), "layers: expected a list"),
        (lambda found: found["layers"][0].pop("record_bytes"), "layers: expected path, dtype"),
        (lambda found: found["layers"][0].update(num_experts=1 << 62), "layers: expected path, dtype"),
        (lambda found: found["layers"][1].update(num_experts="4"), "layers: expected path, dtype"),
        (lambda found: found["linears"][0].pop(), "linears: expected path, rows"),
        (lambda found: found["linears"][0].__setitem__(1, -5), "linears: expected path, rows"),
        (lambda found: found["linears"][0].__setitem__(3, "iNt8"), "linears: expected path, rows"),
        (lambda found: found.pop("identity"), "identity"),
        (lambda found: found.update(more=1), "more"),
    ],
)
def test_a_manifest_that_was_edited_says_what_is_wrong(change: Change, said: str, pack: Path) -> None:
    file = pack / MANIFEST_NAME
    found = json.loads(file.read_text())
    change(found)
    file.write_text(json.dumps(found))
    with pytest.raises(CheckpointError, match=rf"(?s){MANIFEST_NAME} is damaged \(.*{said}.*convert. the model again"):
        load(pack, **OPTIONS)


@pytest.mark.parametrize("name", [MANIFEST_NAME, CONFIG_NAME, "generation_config.json"])
def test_json_without_end_is_an_error_of_ours(name: str, pack: Path) -> None:
    (pack / name).write_text(DEEP)
    with pytest.raises(HybriMoEError, match=name):
        load(pack, **OPTIONS)


def test_a_header_without_end_is_none(pack: Path) -> None:
    (file,) = pack.glob("experts-*")
    file.write_bytes(with_header(file.read_bytes(), DEEP))
    with pytest.raises(CheckpointError, match="is missing, cut short, or of another pack"):
        load(pack, **OPTIONS)


@pytest.mark.parametrize(
    "text",
    [
        DEEP, "7", "[]", '{"config.json": 3}', '{"config.json": [["the file", -5, "a"]]}',
        '{"config.json": [["the file", 1e30, "a"]]}', '{"config.json": [["the file", 99999999999999999999, "a"]]}',
        '{"config.json": [[null, 5, "a"]]}', '{"config.json": [["the file", 5]]}',
        '{"/dev/zero": [["the file", 5, "a"]]}', '{"../x": [["the file", 5, "a"]]}', '{"a\\u0000": []}',
    ],
)  # fmt: skip
def test_a_list_of_checksums_that_lies_is_refused(text: str, pack: Path) -> None:
    (pack / CHECKSUMS_NAME).write_bytes(with_own_hash(text))
    with pytest.raises(CheckpointError, match=rf"(?s){CHECKSUMS_NAME} is missing or damaged \(.*copy the pack again"):
        verify_pack(pack)


def test_files_that_are_not_in_the_list_of_checksums_are_named(pack: Path) -> None:
    listed = json.loads((pack / CHECKSUMS_NAME).read_text().split("\n")[1])
    (experts,) = pack.glob("experts-*")
    del listed[experts.name]
    (pack / CHECKSUMS_NAME).write_bytes(with_own_hash(json.dumps(listed)))
    assert verify_pack(pack).damaged == (f"{experts.name}: it has no checksum",)


@pytest.mark.parametrize("name", ["generation_config.json", "chat_template.jinja"])
def test_a_file_that_changes_replies_and_came_later_is_named(name: str, pack: Path) -> None:
    listed = json.loads((pack / CHECKSUMS_NAME).read_text().split("\n")[1])
    listed.pop(name, None)
    (pack / CHECKSUMS_NAME).write_bytes(with_own_hash(json.dumps(listed)))
    (pack / name).touch()
    (pack / "experts.routing.npz").touch()  # what a session leaves
    assert verify_pack(pack).damaged == (f"{name}: it has no checksum",)


def test_names_of_parts_that_are_none_are_found(pack: Path) -> None:
    listed = json.loads((pack / CHECKSUMS_NAME).read_text().split("\n")[1])
    (experts,) = pack.glob("experts-*")
    listed[experts.name][1][0] = "model.layers.7.mlp.experts, expert 0"
    (pack / CHECKSUMS_NAME).write_bytes(with_own_hash(json.dumps(listed)))
    (said,) = verify_pack(pack).damaged
    assert said == f"{experts.name}: the list of checksums has other names or sizes for its parts"


@pytest.mark.parametrize(
    "entry", [{"eos_token_id": 1 << 70}, {"eos_token_id": []}, {"pad_token_id": "x"}, {"bos_token_id": {"a": 1}}]
)
def test_tokens_of_a_generation_config_that_are_none(entry: dict[str, Any], pack: Path) -> None:
    file = pack / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entry))
    with pytest.raises(HybriMoEError, match=r"generation_config\.json.*(correct the file|remove it)"):
        load(pack, **OPTIONS)
