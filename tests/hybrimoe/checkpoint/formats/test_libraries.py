"""Weights that the formats' own libraries packed are read as those libraries read them. Skipped where one is not
installed; `test_formats` needs none of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from .test_formats import sources, weight
from .writers import compressed

ROWS, COLUMNS = 32, 128
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("pack-quantized", INT4 | {"symmetric": True}),
        ("pack-quantized", INT4 | {"symmetric": False}),
        ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "channel"}),
        ("pack-quantized", {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False}),
        ("pack-quantized", {"num_bits": 3, "type": "int", "strategy": "group", "group_size": 64}),
        ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32}),
        ("nvfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}),
        ("mxfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}),
    ],
)
def test_compressed_tensors(name: str, weights: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    args = QuantizationArgs(**weights)
    groups = weight().unflatten(1, (-1, args.group_size or COLUMNS))
    low, high = groups.amin(2), groups.amax(2)
    outer = generate_gparam(weight().amin(), weight().amax()) if "nvfp4" in name else None
    scale, zero = calculate_qparams(low, high, args, global_scale=outer)
    state = {"weight": weight(), "weight_scale": scale.to(torch.bfloat16 if outer is None else scale.dtype)}
    if not args.symmetric:
        state["weight_zero_point"] = zero.to(torch.int8)
    if outer is not None:
        state["weight_global_scale"] = outer
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    library = BaseCompressor.get_value_from_registry(name)
    packed = library.compress(state, scheme)
    expected = library.decompress(packed, scheme)["weight"]
    config = compressed(name, **{"bits": args.num_bits, "kind": str(args.type)}, strategy=str(args.strategy),
                        group_size=args.group_size)  # fmt: skip
    stored = {f"layer.{part}": tensor for part, tensor in packed.items()}
    values = sources(tmp_path, stored, config)["layer.weight"].read()
    assert torch.equal(values.to(expected.dtype), expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitsandbytes(kind: str, nested: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    packed, state = functional.quantize_4bit(weight(100, 192).to(dtype), quant_type=kind, compress_statistics=nested)
    expected = functional.dequantize_4bit(packed, state)
    stored = {f"layer.weight.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}
    values = sources(tmp_path, {"layer.weight": packed, **stored})["layer.weight"].read()
    assert torch.equal(values.to(dtype), expected)


@pytest.mark.filterwarnings("ignore")
def test_llm_int8(tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    codes, rows, _ = functional.int8_vectorwise_quant(weight().half())
    expected = functional.int8_vectorwise_dequant(codes, rows)
    values = sources(tmp_path, {"layer.weight": codes, "layer.SCB": rows})["layer.weight"].read()
    assert torch.equal(values, expected)
