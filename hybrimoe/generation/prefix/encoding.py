"""What is kept of a text as the bytes of a file: a checksum over all of it, a header of JSON, and tensors as they lie.

File: magic (8 bytes), SHA-256 of the next two (32), length of the header (u64), the header, and the bytes of each
tensor, followed by zeros up to a multiple of 64 bytes. The header has a checksum of each tensor and its zeros. Tensors
of any dtype are bytes here, so another storage of keys and values needs no change. Nothing of a file is executed:
layers of a cache are told by the names of their classes.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

from hybrimoe.text_files import parse_json

if TYPE_CHECKING:
    import numpy as np
    import torch

__all__ = ["ALIGNMENT", "decode", "encode", "facts_of"]

Facts = dict[str, Any]
"""What a file says of itself: JSON values."""

MAGIC = b"HMPREFX2"
DIGEST_BYTES = hashlib.sha256().digest_size
LENGTH = struct.Struct("<Q")
FIRST_BYTES = len(MAGIC) + DIGEST_BYTES + LENGTH.size
ALIGNMENT = 64
"""Bytes: a line of a checksum."""
MOST_HEADER_BYTES = 16 << 20
"""A header has some KB; a damaged length is not to be read into memory."""


def encode(facts: Facts, content: Any) -> list[memoryview]:
    """A file in pieces, which are to be written one after another.

    content: tensors in host memory and layers of caches, in lists, tuples and dicts, with numbers and texts between.
    Raises TypeError for anything else.
    """
    from cpu_kernels.engine.checksum import checksum

    tensors: list[torch.Tensor] = []
    tree = _to_json(content, tensors)
    at, described, bodies = 0, [], []
    for tensor in tensors:
        body = _lines_of(tensor)
        described.append([_dtype_name(tensor.dtype), list(tensor.shape), at, checksum(body)])
        bodies.append(body.data)
        at += body.nbytes
    header = json.dumps({"facts": facts, "content": tree, "tensors": described}).encode()
    header += b" " * (_aligned(FIRST_BYTES + len(header)) - FIRST_BYTES - len(header))
    told = LENGTH.pack(len(header)) + header
    return [memoryview(MAGIC + hashlib.sha256(told).digest() + told), *bodies]


def decode(file: torch.Tensor) -> tuple[Facts, Any]:
    """Facts and content of a file, given as its bytes (uint8 [n]); the tensors of the content are views of them.

    Raises ValueError where any byte of it is not as it was written.
    """
    from cpu_kernels.engine.checksum import checksum

    bytes_of = file.numpy()
    data = bytes_of.data
    if len(data) < FIRST_BYTES or bytes(data[: len(MAGIC)]) != MAGIC:
        raise ValueError("it is no file of the prefix cache")
    begin = len(MAGIC) + DIGEST_BYTES
    (n_header,) = LENGTH.unpack(data[begin:FIRST_BYTES])
    first = FIRST_BYTES + n_header
    if first > len(data) or hashlib.sha256(data[begin:first]).digest() != bytes(data[len(MAGIC) : begin]):
        raise ValueError("the checksum of its header is another")
    header = parse_json(bytes(data[FIRST_BYTES:first]))
    tensors, end = [], first
    for dtype, shape, at, told in header["tensors"]:
        tensor = _tensor(file, first + at, dtype, shape)
        end = first + at + _aligned(tensor.nbytes)
        if end > len(data) or checksum(bytes_of[first + at : end]) != told:
            raise ValueError("a checksum is another")
        tensors.append(tensor)
    if end != len(data):
        raise ValueError(f"it has {len(data)} bytes, expected {end}")
    return header["facts"], _from_json(header["content"], tensors)


def facts_of(file: BinaryIO) -> Facts:
    """What a file says of itself, without its content, and not compared with its checksum.

    Raises ValueError where it is damaged, and OSError.
    """
    first = file.read(FIRST_BYTES)
    if len(first) < FIRST_BYTES or not first.startswith(MAGIC):
        raise ValueError("it is no file of the prefix cache")
    (n_header,) = LENGTH.unpack(first[-LENGTH.size :])
    if n_header > MOST_HEADER_BYTES:
        raise ValueError(f"its header has {n_header} bytes")
    facts: Facts = parse_json(file.read(n_header))["facts"]
    return facts


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


def _lines_of(tensor: torch.Tensor) -> np.ndarray:
    """The bytes of a tensor (uint8 [n]), with zeros up to a multiple of ALIGNMENT; a copy where there are some."""
    import numpy as np
    import torch

    from cpu_kernels.engine.checksum import WORD_BYTES

    if not tensor.numel():
        return np.empty(0, np.uint8)
    data: np.ndarray = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    if data.nbytes % ALIGNMENT == 0 and data.ctypes.data % WORD_BYTES == 0:
        return data
    lines = np.zeros(_aligned(data.nbytes), np.uint8)
    lines[: data.nbytes] = data
    return lines


def _tensor(file: torch.Tensor, at: int, dtype: str, shape: list[int]) -> torch.Tensor:
    import torch

    kind: torch.dtype = getattr(torch, dtype)
    n_bytes = math.prod(shape) * kind.itemsize
    return file[at : at + n_bytes].view(kind).view(shape) if n_bytes else torch.empty(shape, dtype=kind)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _to_json(value: Any, tensors: list[torch.Tensor]) -> Any:
    """`value` with tensors as numbers, which are added to `tensors`; what JSON does not tell apart is an object of one
    key, its kind."""
    import torch

    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    if isinstance(value, dict):
        return {"dict": [[_to_json(key, tensors), _to_json(item, tensors)] for key, item in value.items()]}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_to_json(item, tensors) for item in value]}
    if isinstance(value, torch.dtype):
        return {"dtype": _dtype_name(value)}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    name = type(value).__name__
    if _layer_classes().get(name) is not type(value):
        raise TypeError(f"a {name} has no form in files of the prefix cache")
    return {"layer": [name, _to_json(vars(value), tensors)]}


def _from_json(value: Any, tensors: list[torch.Tensor]) -> Any:
    import torch

    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    if kind == "tensor":
        return tensors[held]
    if kind == "dict":
        return {_from_json(key, tensors): _from_json(item, tensors) for key, item in held}
    if kind in ("list", "tuple"):
        items = [_from_json(item, tensors) for item in held]
        return items if kind == "list" else tuple(items)
    if kind == "dtype":
        return getattr(torch, held)
    if kind == "device":
        return torch.device(held)
    name, known = held
    kept = _layer_classes().get(name)
    if kind != "layer" or kept is None:
        raise ValueError(f"it holds a {kind} {name}, which this version does not know")
    layer: Any = object.__new__(kept)
    layer.__dict__.update(_from_json(known, tensors))
    return layer


def _layer_classes() -> dict[str, type]:
    """The classes of layers that caches have, by name."""
    from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

    import hybrimoe.generation.growing  # noqa: F401  # its classes are among those below

    roots = (CacheLayerMixin, LinearAttentionCacheLayerMixin)
    return {one.__name__: one for root in roots for one in _below(root)}


def _below(kind: type) -> Iterator[type]:
    child: type
    for child in kind.__subclasses__():
        yield child
        yield from _below(child)
