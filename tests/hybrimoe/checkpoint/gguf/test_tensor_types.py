"""Each type of tensors: read as llama.cpp's own package reads it, whole and by an expert, and packed as it should."""

from __future__ import annotations

import builtins
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from cpu_kernels import LinearSpec, pack_linear, unpack_linear
from hybrimoe.checkpoint.gguf import config, decoding
from hybrimoe.checkpoint.gguf.decoding import DecodedTensor
from hybrimoe.checkpoint.gguf.file import open_gguf
from hybrimoe.checkpoint.gguf.tensor_types import TYPES, TensorType
from hybrimoe.errors import MissingExtraError

SHAPE = (3, 64, 512)
WHOLE = next(kind for kind in TYPES.values() if kind.name == "I32")
FLOATS = {"F32": np.float32, "F16": np.float16}
SCALE_ERROR = 2.0**-8  # float16 scales rounded to bfloat16: half a unit of its last place, and the codes stay


def blocks(
    kind: TensorType, generator: np.random.Generator, shape: tuple[int, ...] = SHAPE, limit: float = 1e4
) -> np.ndarray:
    """Random blocks of values below `limit`: those that decode to anything else are drawn again."""
    n_blocks = int(np.prod(shape)) // kind.block_values
    raw = generator.integers(0, 256, (n_blocks, kind.block_bytes), dtype=np.uint8)
    while True:
        with np.errstate(all="ignore"):
            values = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(kind.code))
        wrong = ~(np.abs(values) < limit).all(axis=1)
        if not wrong.any():
            return raw.reshape(*shape[:-1], -1)
        raw[wrong] = generator.integers(0, 256, (int(wrong.sum()), kind.block_bytes), dtype=np.uint8)


def stored(kind: TensorType, values: np.ndarray, tmp_path: Path) -> DecodedTensor:
    """The tensor as it is read from a file with nothing else in it."""
    writer = gguf.GGUFWriter(str(tmp_path / "one.gguf"), "olmoe")
    writer.add_tensor("one", values, raw_dtype=gguf.GGMLQuantizationType(kind.code))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return DecodedTensor(open_gguf(tmp_path / "one.gguf").tensors["one"])


def test_the_sizes_of_blocks_are_those_of_llama_cpp() -> None:
    for kind in TYPES.values():
        assert gguf.GGMLQuantizationType(kind.code).name == kind.name
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind.code)] == (kind.block_values, kind.block_bytes)


def test_a_models_dtype_is_that_of_most_values_not_of_most_matrices() -> None:
    """Models with state spaces have more small matrices in float32 than others."""
    small = {f"blk.{n}.ssm_conv1d.weight": SimpleNamespace(kind=TYPES[0], shape=(64, 4)) for n in range(9)}
    large = {f"blk.{n}.attn_q.weight": SimpleNamespace(kind=TYPES[1], shape=(64, 64)) for n in range(3)}
    assert [TYPES[n].name for n in (0, 1)] == ["F32", "F16"]
    model: Any = SimpleNamespace(tensors=small | large)
    assert config._dense_dtype(model) == "float16"


def test_whole_numbers_are_read_as_they_are(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(-(1 << 31), 1 << 31, SHAPE).astype(np.int32)
    found = stored(WHOLE, values, tmp_path)
    assert found.read().dtype == found.dtype == torch.int32
    assert torch.equal(found.read(), torch.from_numpy(values))
    assert torch.equal(found.read_slice(1), torch.from_numpy(values[1:2]))


@pytest.mark.parametrize("kind", [kind for kind in TYPES.values() if kind is not WHOLE], ids=lambda kind: kind.name)
def test_a_tensor_is_what_llama_cpps_package_says(
    kind: TensorType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "VALUES_AT_A_TIME", 5 * SHAPE[-1])  # a few rows, and some left over
    generator = np.random.default_rng(0)
    with np.errstate(all="ignore"):
        if kind.name in FLOATS:
            values = generator.standard_normal(SHAPE).astype(FLOATS[kind.name])
        else:
            values = blocks(kind, generator)
        found = stored(kind, values, tmp_path)
        tensor = gguf.GGUFReader(tmp_path / "one.gguf").tensors[0]
        expected = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(SHAPE).copy())
    assert found.shape == SHAPE
    assert torch.equal(found.read().float(), expected)
    assert found.read().dtype == found.dtype
    for expert in range(SHAPE[0]):
        assert torch.equal(found.read_slice(expert).float(), expected[expert : expert + 1])


def packed(matrix: torch.Tensor, dtype: Any) -> torch.Tensor:
    """What a record of `dtype` keeps of a matrix."""
    spec = LinearSpec(matrix.shape[1], matrix.shape[0], dtype)
    record = np.empty(spec.record_bytes, np.uint8)
    pack_linear(spec, matrix, record)
    return unpack_linear(spec, record)


@pytest.mark.parametrize(("name", "dtype", "allowed"), [("Q4_0", "int4", SCALE_ERROR), ("MXFP4", "int8", 0.0)])
def test_random_blocks_keep_their_codes_when_they_are_packed(
    name: str, dtype: str, allowed: float, tmp_path: Path
) -> None:
    kind = next(kind for kind in TYPES.values() if kind.name == name)
    raw = blocks(kind, np.random.default_rng(1), (1, 64, 512))
    matrix = stored(kind, raw, tmp_path).read()[0]
    normal = (matrix.abs() > 1e-20) | (matrix == 0)
    assert ((packed(matrix, dtype) - matrix).abs() <= allowed * matrix.abs())[normal].all()


@pytest.mark.parametrize(("name", "dtype"), [("Q4_0", "int4"), ("Q8_0", "int8")])
def test_quantised_weights_are_not_rounded_twice(name: str, dtype: str, tmp_path: Path) -> None:
    kind = next(kind for kind in TYPES.values() if kind.name == name)
    weights = np.random.default_rng(2).standard_normal((1, 64, 512)).astype(np.float32)
    raw = gguf.quants.quantize(weights, gguf.GGMLQuantizationType(kind.code))
    matrix = stored(kind, raw, tmp_path).read()[0]
    assert ((packed(matrix, dtype) - matrix).abs() <= SCALE_ERROR * matrix.abs()).all()


def test_without_the_package_gguf_quantised_types_name_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(0)
    quantised = stored(TYPES[8], blocks(TYPES[8], generator), tmp_path)
    real = builtins.__import__

    def blocked(name: str, *arguments: Any) -> Any:
        if name == "gguf":
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", blocked)
    with pytest.raises(MissingExtraError, match=r"pip install 'hybrimoe\[gguf\]'"):
        quantised.read()
