"""GPTQ and AWQ: codes in 32-bit words, a float16 scale and a zero point for each group of input features.

Both name a layer's tensors `qweight`, `qzeros` and `scales`. GPTQ packs along the input features (qweight
[K x bits / 32, N]) and may give the group of each in `g_idx` (act-order); its zero points are stored less one
(checkpoint format "gptq") or as they are ("gptq_v2"). AWQ ("gemm") packs eight output features in a word, in an order
of its own (qweight [K, N / 8]).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch

from hybrimoe.checkpoint.formats.codes import WORD_BITS, n_words, unpack
from hybrimoe.checkpoint.formats.quantisation import AWQ, Quantisation
from hybrimoe.checkpoint.formats.source import COLUMN_GROUPS, DecodedSource, Parts, scaled, storage_of_groups
from hybrimoe.errors import CheckpointError

AWQ_BITS = 4
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word, in codes from its lowest bit on, each of eight output features stands."""
GPTQ_BITS = (2, 3, 4, 8)


def source_of(key: str, parts: Parts, quantisation: Quantisation) -> DecodedSource:
    """The weight of a layer. parts: "qweight", "qzeros", "scales", and of GPTQ "g_idx" where the file has it.

    Raises CheckpointError for shapes that do not go together.
    """
    if any(len(parts[name].shape) != 2 for name in ("qweight", "qzeros", "scales")):
        raise _misfit(key, parts, "matrices of codes, zero points and scales")
    packs_outputs = parts["qweight"].shape[1] * len(AWQ_ORDER) == parts["scales"].shape[1]
    if quantisation.method == AWQ and not packs_outputs:
        raise _misfit(key, parts, "the layout gemm of AWQ")
    return _awq(key, parts) if packs_outputs else _gptq(key, parts, quantisation)


def _gptq(key: str, parts: Parts, quantisation: Quantisation) -> DecodedSource:
    n_groups, rows = parts["scales"].shape
    columns, bits = _size(key, parts, quantisation)
    expected = {"qweight": (n_words(columns, bits), rows), "qzeros": (n_groups, n_words(rows, bits))}
    if columns < 1 or any(parts[name].shape != shape for name, shape in expected.items()):
        raise _misfit(key, parts, f"GPTQ of {bits} bits for {columns} input features")
    stated = quantisation.group_size
    group = stated if stated and -(-columns // stated) == n_groups else -(-columns // n_groups)
    decode = partial(decode_gptq, bits=bits, columns=columns, zero_shift=quantisation.zero_shift, group=group)
    ordered = quantisation.act_order is not False and COLUMN_GROUPS in parts and n_groups > 1
    symmetric = bool(quantisation.symmetric)
    storage = storage_of_groups(f"GPTQ int{bits}", bits, columns, n_groups, symmetric=symmetric, ordered=ordered)
    return DecodedSource(key, (rows, columns), parts, decode, storage)


def _size(key: str, parts: Parts, quantisation: Quantisation) -> tuple[int, int]:
    """(input features, bits of a code); a layer may have other bits than config.json says of most."""
    words = parts["qweight"].shape[0]
    if COLUMN_GROUPS in parts:
        columns = parts[COLUMN_GROUPS].shape[0]
        bits = next((bits for bits in GPTQ_BITS if n_words(columns, bits) == words), None)
    else:
        bits = quantisation.bits
        columns = words * WORD_BITS // bits if bits else 0
    if bits is None:
        raise _misfit(key, parts, "GPTQ of 2, 3, 4 or 8 bits")
    return columns, bits


def decode_gptq(
    parts: Mapping[str, torch.Tensor], *, bits: int, columns: int, zero_shift: int, group: int
) -> torch.Tensor:
    """float32 [N, columns]. zero_shift: what is added to stored zero points. group: input features of a group."""
    scales = parts["scales"].T.float()
    codes = unpack(parts["qweight"].T, bits, columns)
    zeros = unpack(parts["qzeros"], bits, scales.shape[0]).T.float()
    zeros = (zeros + zero_shift) % 2**bits
    one_by_one = torch.arange(columns) // group
    groups = parts.get(COLUMN_GROUPS, one_by_one)
    neighbours = columns % group == 0 and torch.equal(groups.long(), one_by_one)
    return scaled(codes, scales, zeros, None if neighbours else groups)


def _awq(key: str, parts: Parts) -> DecodedSource:
    columns, packed = parts["qweight"].shape
    n_groups, rows = parts["scales"].shape
    if parts["qzeros"].shape != (n_groups, packed) or columns % n_groups:
        raise _misfit(key, parts, "the layout gemm of AWQ")
    storage = storage_of_groups("AWQ int4", AWQ_BITS, columns, n_groups, symmetric=False, ordered=False)
    return DecodedSource(key, (rows, columns), parts, decode_awq, storage)


def decode_awq(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """float32 [N, K]."""
    codes, zeros = (_awq_codes(parts[name]).T for name in ("qweight", "qzeros"))
    return scaled(codes, parts["scales"].T.float(), zeros.float())


def _awq_codes(words: torch.Tensor) -> torch.Tensor:
    """int32 [..., W] -> uint8 [..., 8 W] in the order of output features."""
    codes = unpack(words, AWQ_BITS, words.shape[-1] * len(AWQ_ORDER))
    in_words: torch.Tensor = codes.unflatten(-1, (-1, len(AWQ_ORDER)))
    return in_words[..., list(AWQ_ORDER)].flatten(-2)


def _misfit(key: str, parts: Parts, what: str) -> CheckpointError:
    shapes = ", ".join(f"{part.key.rpartition('.')[2]} {list(part.shape)}" for part in parts.values())
    return CheckpointError(f"{key}: {shapes} are not {what}; the checkpoint does not match its config.json")
