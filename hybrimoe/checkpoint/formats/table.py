"""The table of quantised formats: by which tensor each is told, what else belongs to it, and what makes a weight of
them. Which layers are quantised the tensors say themselves: what a format leaves out (ignore lists,
modules_to_not_convert) lies there as a plain weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from hybrimoe.checkpoint.formats import bitsandbytes, compressed, gptq
from hybrimoe.checkpoint.formats.quantisation import Quantisation
from hybrimoe.checkpoint.formats.source import DecodedSource, Parts
from hybrimoe.checkpoint.safetensors_file import StoredTensor
from hybrimoe.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Format:
    """One way to store a weight.

    mark: how the name of the tensor ends that tells of it. weight: the end of the weight's own name in its place.
    parts: the end of each tensor's name, by part; the mark's is among them. optional: parts that a file may lack.
    dtypes: of parts that must be there in one of these, or the tensor tells of another format. make: (weight's name,
    parts, what the directory says) -> source.
    """

    name: str
    mark: str
    weight: str
    parts: Mapping[str, str]
    make: Callable[[str, Parts, Quantisation], DecodedSource]
    optional: frozenset[str] = frozenset()
    dtypes: Mapping[str, tuple[torch.dtype, ...]] = field(default_factory=dict)

    def found_in(self, tensors: Mapping[str, StoredTensor]) -> Iterator[tuple[str, dict[str, StoredTensor]]]:
        """(weight's name, parts) of every weight in this format.

        Raises CheckpointError for a weight that lacks a part.
        """
        for key in tensors:
            if not key.endswith(self.mark):
                continue
            stem = key.removesuffix(self.mark)
            names = {part: stem + end for part, end in self.parts.items()}
            if any(not _is_a(tensors.get(names[part]), dtypes) for part, dtypes in self.dtypes.items()):
                continue
            missing = [name for part, name in names.items() if name not in tensors and part not in self.optional]
            if missing:
                raise CheckpointError(
                    f"{key} is of a weight in {self.name}, and the checkpoint lacks {', '.join(missing)}; fetch the"
                    " missing shards"
                )
            yield stem + self.weight, {part: tensors[name] for part, name in names.items() if name in tensors}


def _is_a(tensor: StoredTensor | None, dtypes: tuple[torch.dtype, ...]) -> bool:
    return tensor is not None and tensor.dtype in dtypes


def _four_bit(kind: str) -> Format:
    ends = {"weight": "", "absmax": ".absmax", "quant_map": ".quant_map", kind: f".quant_state.bitsandbytes__{kind}"}
    nested = {name: f".{name}" for name in bitsandbytes.NESTED}
    return Format(
        f"bitsandbytes {kind}", ends[kind], "", ends | nested, bitsandbytes.four_bit_source, frozenset(nested)
    )  # fmt: skip


FORMATS: tuple[Format, ...] = (
    Format(
        "GPTQ or AWQ", ".qweight", ".weight",
        {"qweight": ".qweight", "qzeros": ".qzeros", "scales": ".scales", "g_idx": ".g_idx"},
        gptq.source_of, frozenset({"g_idx"}),
    ),
    Format(
        "compressed-tensors", "_packed", "",
        {"packed": "_packed", "scale": "_scale", "shape": "_shape", "zero_point": "_zero_point", "g_idx": "_g_idx",
         "global_scale": "_global_scale"},
        compressed.packed_source, frozenset({"shape", "zero_point", "g_idx", "global_scale"}),
    ),
    Format(
        "ModelOpt NVFP4", "_scale_2", "", {"packed": "", "scale": "_scale", "factor": "_scale_2"},
        compressed.fp4_source, dtypes={"packed": (torch.uint8,)},
    ),
    _four_bit("nf4"),
    _four_bit("fp4"),
    Format(
        "LLM.int8", ".SCB", ".weight", {"weight": ".weight", "SCB": ".SCB", "weight_format": ".weight_format"},
        bitsandbytes.int8_source, frozenset({"weight_format"}),
    ),
    Format(
        "compressed-tensors int8", ".weight", ".weight",
        {"weight": ".weight", "scale": ".weight_scale", "zero_point": ".weight_zero_point", "g_idx": ".weight_g_idx"},
        compressed.int8_source, frozenset({"zero_point", "g_idx"}),
        {"weight": (torch.int8,), "scale": (torch.float32, torch.bfloat16, torch.float16)},
    ),
)  # fmt: skip
"""In the order in which they are looked for; a tensor that one has taken is no other's."""


def decoded_sources(
    tensors: Mapping[str, StoredTensor], quantisation: Quantisation
) -> tuple[dict[str, DecodedSource], set[str]]:
    """The weights of all formats of the table by their names, and the names of the tensors that they are made of.

    Raises CheckpointError for parts that are missing or do not go together.
    """
    sources: dict[str, DecodedSource] = {}
    used: set[str] = set()
    for kind in FORMATS:
        left = {key: tensor for key, tensor in tensors.items() if key not in used}
        for key, parts in kind.found_in(left):
            sources[key] = kind.make(key, parts, quantisation)
            used |= {part.key for part in parts.values()}
    return sources, used
