"""How many bytes of weights a decode step of one token reads: what its time is compared with the memory's rate by."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from yaml_rules.shapes.derive import experts_per_token

if TYPE_CHECKING:
    from pathlib import Path


def step_bytes(model: Any) -> int:
    """Bytes of a transformers model, injected or not: of each layer's experts those that a token visits, the output
    layer, and all else but the input embedding, of which one row is read."""
    from hybrimoe.dense.linear import PackedLinear
    from hybrimoe.experts.module import HybridExperts

    top_k = experts_per_token(model.config.get_text_config(decoder=True).to_dict()) or 0
    injection = getattr(model, "hybrimoe", None)
    specs = [] if injection is None else injection.session.layer_specs()
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    tied = getattr(output, "weight", None) is getattr(embedding, "weight", None)
    total, inside = 0, ""
    for path, module in model.named_modules():
        if inside and path.startswith(inside):
            continue
        inside = ""
        if isinstance(module, HybridExperts):
            total += top_k * specs[module.layer].spec.record_bytes
        elif n_experts := _experts_of(module):
            total += sum(parameter.nbytes for parameter in module.parameters()) * top_k // n_experts
        elif isinstance(module, PackedLinear):
            total += module.record_bytes
        else:
            if module is not embedding or tied:
                total += sum(parameter.nbytes for parameter in module.parameters(recurse=False))
            continue
        inside = f"{path}."
    return total


def _experts_of(module: Any) -> int:
    """Number of experts of a module that holds them as one tensor [E, rows, columns] each; 0 for any other."""
    stacked = [parameter for parameter in module.parameters(recurse=False) if parameter.dim() == 3]
    return int(stacked[0].shape[0]) if stacked and hasattr(module, "num_experts") else 0


def gguf_step_bytes(path: str | Path) -> int | None:
    """The same of a GGUF file; None without the package gguf."""
    try:
        from gguf import GGUFReader
    except ImportError:
        return None
    reader = GGUFReader(path)
    tensors = {tensor.name: int(tensor.n_bytes) for tensor in reader.tensors}
    used, there = (_number(reader, f"expert_{what}") for what in ("used_count", "count"))
    total = 0
    for name, n_bytes in tensors.items():
        if "_exps." in name:
            total += n_bytes * used // max(1, there)
        elif name != "token_embd.weight" or "output.weight" not in tensors:
            total += n_bytes
    return total


def _number(reader: Any, key: str) -> int:
    field = reader.fields.get(f"{reader.fields['general.architecture'].contents()}.{key}")
    return 0 if field is None else int(field.contents())
