"""Each quantised format: its tensors are read as the values they stand for, by slices too, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from cpu_kernels import LinearSpec, pack_linear, unpack_linear
from hybrimoe.checkpoint.formats.codes import unpack
from hybrimoe.checkpoint.formats.dequantise import Source, dequantised
from hybrimoe.checkpoint.formats.quantisation import Quantisation, read_quantisation
from hybrimoe.checkpoint.safetensors_file import open_safetensors
from hybrimoe.errors import CheckpointError

from . import writers
from .writers import CASES, Case, Written

ROWS, COLUMNS = 32, 128
KEPT = {name: case for name, case in CASES.items() if case.suits != "int8"}
WIDER = {"int2": "int3", "int3": "int4", "int4": "int5", "int5": "int6"}
TOLD = {name: case for name, case in CASES.items() if name not in ("gptq-4-v2", "float8-groups")}
BFLOAT16_ERROR = 2.0**-8  # relative: a scale rounded to bfloat16, half a unit of its last place


def weight(*shape: int) -> torch.Tensor:
    return torch.randn(shape or (ROWS, COLUMNS), generator=torch.Generator().manual_seed(len(shape)))


def sources(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any] | None = None) -> dict[str, Source]:
    """What a directory with these tensors is read as."""
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "model.safetensors")
    quantisation = Quantisation() if config is None else read_quantisation(folder, {"quantization_config": config})
    return dequantised(open_safetensors(folder / "model.safetensors").tensors, quantisation)


def named(written: Written, layer: str = "layer") -> dict[str, torch.Tensor]:
    return {layer + end: tensor for end, tensor in written.tensors.items()}


@settings(max_examples=50, deadline=None)
@given(bits=st.integers(1, 8), count=st.integers(1, 100), rows=st.integers(1, 3), seed=st.integers(0, 9))
def test_codes_of_any_width(bits: int, count: int, rows: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (rows, count), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(unpack(writers.words(codes, bits), bits, count).long(), codes)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_layer_is_read_as_the_values_that_it_stands_for(case: Case, tmp_path: Path) -> None:
    written = case.write(weight())
    found = sources(tmp_path, named(written) | {"other.weight": torch.ones(2, 2)}, case.config)
    assert set(found) == {"layer.weight", "other.weight"}, "its parts are no tensors of their own"
    source = found["layer.weight"]
    assert (source.shape, source.dtype) == ((ROWS, COLUMNS), torch.float32)
    assert torch.equal(source.read(), written.values)
    assert (source.storage.name, source.storage.suits) == (case.name, case.suits)
    assert {stored.key for stored in source.stored} <= set(named(written))


@pytest.mark.parametrize("case", TOLD.values(), ids=TOLD)
def test_tensors_tell_their_format_where_no_config_does(case: Case, tmp_path: Path) -> None:
    """But for what only config.json says: that zero points are not less one, and how wide groups of float8 are."""
    written = case.write(weight())
    assert torch.equal(sources(tmp_path, named(written))["layer.weight"].read(), written.values)


@pytest.mark.parametrize("case", KEPT.values(), ids=KEPT)
def test_symmetric_codes_are_not_rounded_again(case: Case, tmp_path: Path) -> None:
    """All values stay within the rounding of a scale to bfloat16; where the file's scales are bfloat16 (as those of
    compressed-tensors are here) nothing changes."""
    written = case.write(weight(64, COLUMNS))
    values = sources(tmp_path, named(written), case.config)["layer.weight"].read()
    for dtype in (case.suits, WIDER.get(case.suits, case.suits)):
        spec = LinearSpec(COLUMNS, 64, dtype)
        record = torch.zeros(spec.record_bytes, dtype=torch.uint8).numpy()
        pack_linear(spec, values, record)
        off = (unpack_linear(spec, record) - values).abs()
        assert bool((off <= BFLOAT16_ERROR * values.abs()).all())
        if "compressed" in case.name:
            assert not off.any()


@pytest.mark.parametrize("write", ["pack_quantized", "int_quantized", "nvfp4"])
def test_stacked_experts_are_read_one_at_a_time(write: str, tmp_path: Path) -> None:
    options = {"bits": 4, "symmetric": False} if write == "pack_quantized" else {}
    experts = [getattr(writers, write)(weight(ROWS, COLUMNS) * (1 + index), **options) for index in range(3)]
    own = [end for end in experts[0].tensors if not end.endswith("_shape")]
    tensors = {f"experts{end}": torch.stack([expert.tensors[end] for expert in experts]) for end in own}
    if write == "pack_quantized":
        tensors["experts.weight_shape"] = torch.tensor([3, ROWS, COLUMNS])
    source = sources(tmp_path, tensors)["experts.weight"]
    whole = torch.stack([expert.values for expert in experts])
    assert (source.shape, torch.equal(source.read(), whole)) == (whole.shape, True)
    for index in range(3):
        assert torch.equal(source.read_slice(index), whole[index : index + 1])


def test_columns_that_are_no_multiple_of_a_word(tmp_path: Path) -> None:
    """42 codes of 4 bits: the last word is half empty, and only the file's note tells where the row ends."""
    written = writers.pack_quantized(weight(8, 42), bits=4, group=-1)
    assert torch.equal(sources(tmp_path, named(written))["layer.weight"].read(), written.values)


def test_groups_that_config_json_names_have_bits_of_their_own(tmp_path: Path) -> None:
    config = writers.compressed("pack-quantized", 4)
    config["config_groups"]["fine"] = {"targets": ["re:.*down_proj"], "weights": {"num_bits": 8, "type": "int"}}
    up, down = (writers.pack_quantized(weight(), bits=bits) for bits in (4, 8))
    found = sources(tmp_path, named(up, "m.up_proj") | named(down, "m.down_proj"), config)
    assert torch.equal(found["m.up_proj.weight"].read(), up.values)
    assert torch.equal(found["m.down_proj.weight"].read(), down.values)
    assert found["m.down_proj.weight"].storage.name.startswith("compressed-tensors int8")


def test_layers_with_other_bits_than_config_json_says(tmp_path: Path) -> None:
    """GPTQModel's `dynamic`: the tensors tell."""
    written = writers.gptq(weight(), bits=8)
    assert torch.equal(sources(tmp_path, named(written), CASES["gptq-4"].config)["layer.weight"].read(), written.values)


def test_gptq_without_its_order(tmp_path: Path) -> None:
    written = writers.gptq(weight(), bits=4, symmetric=False)
    tensors = {key: tensor for key, tensor in named(written).items() if not key.endswith("g_idx")}
    assert torch.equal(sources(tmp_path, tensors, CASES["gptq-4"].config)["layer.weight"].read(), written.values)


@pytest.mark.parametrize(
    ("case", "lost", "match"),
    [
        ("gptq-4", ".scales", r"layer.qweight is of a weight in GPTQ or AWQ, .* lacks layer.scales"),
        ("gptq-4", ".qzeros", r"lacks layer.qzeros"),
        ("packed-4", ".weight_scale", r"layer.weight_packed is of a weight in compressed-tensors"),
        ("nf4", ".weight.absmax", r"bitsandbytes nf4, and the checkpoint lacks layer.weight.absmax"),
        ("nf4-double", ".weight.nested_absmax", r"layer.weight: .* are not \[32, 128\] values in blocks of 64"),
        ("llm-int8", ".weight", r"layer.SCB is of a weight in LLM.int8, .* lacks layer.weight"),
    ],
)
def test_a_part_that_is_missing_is_named(case: str, lost: str, match: str, tmp_path: Path) -> None:
    tensors = named(CASES[case].write(weight()))
    del tensors[f"layer{lost}"]
    with pytest.raises(CheckpointError, match=match):
        sources(tmp_path, tensors, CASES[case].config)


@pytest.mark.parametrize(
    ("case", "part", "shape", "match"),
    [
        ("gptq-4", ".qweight", (15, 32), "are not GPTQ of 2, 3, 4 or 8 bits"),
        ("gptq-4", ".qzeros", (4, 5), "are not GPTQ of 4 bits for 128 input features"),
        ("gptq-4", ".scales", (32,), "are not matrices of codes, zero points and scales"),
        ("awq", ".qzeros", (5, 4), "are not the layout gemm of AWQ"),
        ("awq", ".qweight", (16, 32), "are not the layout gemm of AWQ"),
        ("packed-4", ".weight_packed", (32, 7), "are not rows of 128 codes of 4 bits"),
        ("packed-4", ".weight_scale", (32, 5), "are not 128 columns in groups of one size"),
        ("nvfp4", ".weight_scale", (31, 8), "are not fp4 with a scale a group of columns"),
        ("nf4", ".weight", (100, 1), "values in blocks of 64"),
        ("llm-int8", ".SCB", (31,), r"with SCB \[31\]; expected int8 and one a row"),
    ],
)
def test_parts_that_do_not_go_together(
    case: str, part: str, shape: tuple[int, ...], match: str, tmp_path: Path
) -> None:
    tensors = named(CASES[case].write(weight()))
    tensors[f"layer{part}"] = torch.zeros(shape, dtype=tensors[f"layer{part}"].dtype)
    with pytest.raises(CheckpointError, match=match):
        sources(tmp_path, tensors, CASES[case].config)


def test_a_damaged_note_of_bitsandbytes(tmp_path: Path) -> None:
    tensors = named(CASES["nf4"].write(weight()))
    tensors["layer.weight.quant_state.bitsandbytes__nf4"] = torch.zeros(5, dtype=torch.uint8)
    with pytest.raises(CheckpointError, match="quant_state that bitsandbytes stored with it is damaged"):
        sources(tmp_path, tensors)


def test_rows_of_llm_int8_in_another_order(tmp_path: Path) -> None:
    tensors = named(CASES["llm-int8"].write(weight())) | {"layer.weight_format": torch.tensor(1, dtype=torch.uint8)}
    with pytest.raises(CheckpointError, match="its weight_format is 1; only rows as they are"):
        sources(tmp_path, tensors)["layer.weight"].read()
