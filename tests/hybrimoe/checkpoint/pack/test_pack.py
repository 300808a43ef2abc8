"""Packs: the same model from one folder, whatever became of the original; whole or not there; every byte checked."""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import GraniteMoeConfig, PreTrainedModel
from typer.testing import CliRunner, Result

from hybrimoe.checkpoint import convert, load, verify_pack
from hybrimoe.checkpoint.inspection import inspect
from hybrimoe.checkpoint.pack.experts import MappedStore
from hybrimoe.checkpoint.pack.folder import _lock, whole_or_nothing
from hybrimoe.checkpoint.source import CHECKSUMS_NAME, MANIFEST_NAME
from hybrimoe.cli.app import app
from hybrimoe.errors import CheckpointError, FileError

from ..models import OPTIONS, logits

START = {name: value for name, value in OPTIONS.items() if name != "expert_dtype"}
INT4 = {"expert_dtype": "int4", "dense_dtype": "int8", "progress": False}


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def pack(directory: Path, tmp_path: Path) -> Path:
    """The small Mixtral with int4 experts and int8 dense layers."""
    (directory / "tokenizer_config.json").write_text("{}")
    convert(directory, tmp_path / "pack", **INT4)
    return tmp_path / "pack"


@pytest.mark.parametrize(
    ("expert", "dense"), [("int4", "int8"), ("int8", "auto"), ("bfloat16", "int4"), ("float32", "float32")]
)
def test_a_pack_is_the_model_without_the_original(expert: str, dense: str, directory: Path, tmp_path: Path) -> None:
    expected = logits(load(directory, packed_file=False, **START, expert_dtype=expert, dense_dtype=dense))
    made = convert(directory, tmp_path / "pack", expert_dtype=expert, dense_dtype=dense, progress=False)
    assert (made.is_new, made.expert_dtype, made.dense_dtype) == (True, expert, dense)
    shutil.rmtree(directory)
    (tmp_path / "pack").rename(tmp_path / "moved")
    before, calls = left_in(tmp_path / "moved"), set[str]()
    model = load(tmp_path / "moved", **START | {"progress": lambda *call: calls.add(call[2])})
    assert torch.equal(logits(model), expected)
    store = model.hybrimoe.session.store
    assert {layer.spec.dtype for layer in store.layers} == {expert}
    assert isinstance(store, MappedStore)
    assert not [what for what in calls if "packing" in what]
    assert left_in(tmp_path / "moved") == before
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").rglob("*.hybrimoe"))


@pytest.mark.skipif(sys.platform == "win32", reason="rights of POSIX")
def test_others_may_read_a_pack_as_they_may_its_folder(pack: Path) -> None:
    assert {file.stat().st_mode & 0o777 for file in pack.rglob("*")} == {0o644}
    assert pack.stat().st_mode & 0o777 == 0o755


def test_tied_embeddings_stay_tied(tmp_path: Path, make_model: Callable[..., PreTrainedModel]) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    make_model(GraniteMoeConfig(**sizes, **heads, tie_word_embeddings=True)).save_pretrained(tmp_path / "model")
    expected = logits(load(tmp_path / "model", packed_file=False, **START, expert_dtype="int8"))
    convert(tmp_path / "model", tmp_path / "pack", expert_dtype="int8", progress=False)
    assert torch.equal(logits(load(tmp_path / "pack", **START)), expected)


def test_other_dtypes_are_made_of_what_the_pack_holds(pack: Path) -> None:
    """Never written into it."""
    before = left_in(pack)
    packed = load(pack, **START)
    other = load(pack, **START, expert_dtype="float32", dense_dtype="float32")
    assert "the file has its experts as packed int4; they are packed as float32" in other.hybrimoe.packing
    for layer, spec in enumerate(packed.hybrimoe.session.store.layers):
        for expert in range(spec.num_experts):
            one, two = (model.hybrimoe.session.store.read(layer, expert) for model in (packed, other))
            assert torch.equal(one.up, two.up)
            assert torch.equal(one.down, two.down)
    assert left_in(pack) == before


def test_experts_that_rules_leave_alone_lie_in_the_pack_as_they_are(directory: Path, tmp_path: Path) -> None:
    rules = [{"match": {"name": r"layers\.1\..*experts$"}, "replace": {"op": "hybrid_experts"}}]
    options = {"rules": rules, "expert_dtype": "int8"}
    expected = logits(load(directory, packed_file=False, **START, **options))
    convert(directory, tmp_path / "pack", progress=False, **options)
    assert torch.equal(logits(load(tmp_path / "pack", **START, rules=rules)), expected)


def test_inspect_takes_a_pack(pack: Path) -> None:
    found = inspect(pack)
    assert [total.type_name for total in found.experts] == ["packed int4"]
    assert found.experts[0].n_bytes == next(pack.glob("experts-*")).stat().st_size - 4096
    assert (found.choice.dtype, {cost.dtype: cost.error for cost in found.records}["int4"]) == ("int4", 0.0)


def test_every_byte_has_a_checksum(pack: Path) -> None:
    found = verify_pack(pack)
    assert (found.damaged, found.n_files) == ((), len(left_in(pack)) - 1)
    assert found.n_bytes == sum(file.stat().st_size for file in pack.iterdir() if file.name != CHECKSUMS_NAME)


def flip(file: Path, place: int, bit: int = 0) -> None:
    raw = bytearray(file.read_bytes())
    raw[place] ^= 1 << bit
    file.write_bytes(raw)


def test_a_flipped_bit_anywhere_is_found(pack: Path) -> None:
    draw = random.Random(0)
    for file in sorted(pack.iterdir()):
        size = file.stat().st_size
        for place in {0, size - 1, *(draw.randrange(size) for _ in range(6))}:
            bit = draw.randrange(8)
            flip(file, place, bit)
            if file.name == CHECKSUMS_NAME:
                with pytest.raises(CheckpointError, match="is missing or damaged"):
                    verify_pack(pack)
            else:
                damaged = verify_pack(pack).damaged
                assert len(damaged) == 1
                assert damaged[0].startswith(f"{file.name}: ")
            flip(file, place, bit)
    assert not verify_pack(pack).damaged


def test_the_record_and_the_tensor_are_named(pack: Path) -> None:
    experts, dense = (next(pack.glob(f"{what}-*")) for what in ("experts", "dense"))
    layer = json.loads((pack / MANIFEST_NAME).read_text())["layers"][1]
    flip(experts, experts.stat().st_size - 2 * layer["record_bytes"] + 5)
    flip(dense, dense.stat().st_size - 1)
    flip(pack / "model.safetensors", (pack / "model.safetensors").stat().st_size - 1)
    first, second, third = sorted(verify_pack(pack).damaged)
    assert first.endswith("self_attn.o_proj.weight is not what was written")
    assert "model.layers.1.mlp.experts, expert 2 is not what was written" in second
    assert third.startswith("model.safetensors: model.")


def test_files_that_are_gone_or_cut_short(pack: Path) -> None:
    experts = next(pack.glob("experts-*"))
    experts.write_bytes(experts.read_bytes()[:-1])
    (pack / "tokenizer_config.json").unlink()
    damaged = "\n".join(verify_pack(pack).damaged)
    assert "bytes, " in damaged
    assert "tokenizer_config.json: it is missing" in damaged
    with pytest.raises(CheckpointError, match=r"experts-int4.* is missing, cut short, or of another pack"):
        load(pack, **START)


def test_what_is_no_pack(directory: Path, pack: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is no pack: expected a folder with hybrimoe-pack\.json"):
        verify_pack(directory)
    entries = json.loads((pack / MANIFEST_NAME).read_text())
    (pack / MANIFEST_NAME).write_text(json.dumps(entries | {"format": 99}))
    with pytest.raises(CheckpointError, match=r"pack of another version of HybriMoE .*`hybrimoe convert` the model"):
        load(pack, **START)


def test_the_same_pack_again_and_another_in_its_place(directory: Path, pack: Path, tmp_path: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in pack.iterdir()}
    assert not convert(directory, pack, **INT4).is_new
    with pytest.raises(FileError, match="is there, another pack; give the name of a folder that is yet to be made"):
        convert(directory, pack, **INT4 | {"expert_dtype": "int8"})
    with pytest.raises(FileError, match="is there, a folder with other contents"):
        convert(directory, directory, **INT4)
    assert {file: file.stat().st_mtime_ns for file in pack.iterdir()} == before


def test_two_at_once(directory: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        made = [done.result() for done in [pool.submit(convert, directory, tmp_path / "pack", **INT4) for _ in "ab"]]
    assert sorted(one.is_new for one in made) in ([False, True],)
    assert not verify_pack(tmp_path / "pack").damaged
    assert left_in(tmp_path) - {"cache"} == {"model", "pack"}


@pytest.mark.parametrize("room", [100, 5_000, 12_000, 18_000, 30_000])
def test_a_disk_that_fills_leaves_nothing(room: int, directory: Path, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(FileError, match=r"cannot be written: .*choose a folder on a disk with room"):
            convert(directory, tmp_path / "pack", **INT4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert left_in(tmp_path) - {"cache"} == {"model"}


def test_what_a_killed_writer_left_is_swept_and_a_living_ones_is_not(tmp_path: Path) -> None:
    for name in (".pack-dead.partial", ".pack-alive.partial", ".other-dead.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "experts").write_bytes(b"half")
    with _lock(tmp_path / ".pack-alive.partial"), whole_or_nothing(tmp_path / "pack") as place:
        (place / "file").write_bytes(b"whole")
        assert not (tmp_path / "pack").exists()
    assert left_in(tmp_path) - {"cache"} == {"pack", ".pack-alive.partial", ".other-dead.partial"}


def hybrimoe(*words: object) -> Result:
    """A command line, as the console script would run it."""
    return CliRunner().invoke(app, [str(word) for word in words], prog_name="hybrimoe")


def test_commands(directory: Path, tmp_path: Path) -> None:
    made = hybrimoe("convert", directory, tmp_path / "pack", "--dtype", "int4", "--dense-dtype", "int8", "--json")
    said = json.loads(made.stdout)
    assert (made.exit_code, said["is_new"], said["has_tokenizer"]) == (0, True, False)
    again = hybrimoe("convert", directory, tmp_path / "pack", "--dtype", "int4", "--dense-dtype", "int8")
    assert again.stdout.startswith("there already: ")
    assert hybrimoe("verify", tmp_path / "pack").stdout.endswith("as written\n")
    flip(next((tmp_path / "pack").glob("experts-*")), 4096 + 7)
    found = hybrimoe("verify", tmp_path / "pack")
    assert (found.exit_code, found.stdout) == (1, "")
    assert "model.layers.0.mlp.experts, expert 0 is not what was written" in " ".join(found.stderr.split())
    assert json.loads(hybrimoe("verify", tmp_path / "pack", "--json").stdout)["damaged"]
