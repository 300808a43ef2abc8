"""What the expert dtypes cost in quality: error per expert, perplexity and greedy agreement against float32 experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

import cpu_kernels as ck
from hybrimoe.bench.quality.text import compare, text_windows, window_logits

MAX_SAMPLES = 256  # rows of an expert that its error is measured on
REFERENCE: ck.ExpertDtype = "float32"


@dataclass(frozen=True)
class Request:
    """model None = the demo model; text None = the held-out text beside it, else its card.

    experts: how many of a layer are compared.
    """

    model: str | None
    text: Path | None
    dtypes: tuple[ck.ExpertDtype, ...]
    windows: int
    experts: int


def run(request: Request, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """One row per dtype."""
    rows = []
    progress(f"experts as {REFERENCE}")
    with _loaded(request.model, REFERENCE) as model:
        windows, source = text_windows(Path(model.config._name_or_path), request.text, request.windows)
        inputs: dict[int, torch.Tensor] = {}
        hooks = [layer.register_forward_pre_hook(_keep(inputs, number)) for number, layer in enumerate(_experts(model))]
        expected = window_logits(model, windows)
        for hook in hooks:
            hook.remove()
        errors = {dtype: _expert_errors(model, inputs, dtype, request.experts) for dtype in request.dtypes}
    for dtype in request.dtypes:
        progress(f"experts as {dtype}")
        with _loaded(request.model, dtype) as model:
            logits = window_logits(model, windows)
        rows.append({"dtype": dtype, **errors[dtype], **_compare(logits, expected, windows)})
    return {"text": source, "tokens": sum(len(window) for window in windows), "rows": rows}


@contextmanager
def _loaded(path: str | None, dtype: ck.ExpertDtype) -> Iterator[Any]:
    from hybrimoe.checkpoint import load

    model = load(path, expert_dtype=dtype, accelerator="none", packed_file=False, progress=False)
    try:
        yield model
    finally:
        model.hybrimoe.session.close()


def _experts(model: Any) -> list[torch.nn.Module]:
    from hybrimoe.runtime import HybridExperts

    return [module for module in model.modules() if isinstance(module, HybridExperts)]


def _keep(inputs: dict[int, torch.Tensor], layer: int) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
    def hook(module: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        inputs.setdefault(layer, arguments[0].detach().float().reshape(-1, arguments[0].shape[-1]).clone())

    return hook


def _compare(logits: list[torch.Tensor], expected: list[torch.Tensor], windows: list[torch.Tensor]) -> dict[str, float]:
    """Perplexity, share of positions with the same greedy token, and mean cosine of the logits."""
    perplexity, same, cosine = compare(logits, expected, [ids[1:] for ids in windows], functional.cosine_similarity)
    return {"perplexity": perplexity, "greedy_agreement": same, "logit_cosine": cosine}


def _expert_errors(model: Any, inputs: dict[int, torch.Tensor], dtype: ck.ExpertDtype, limit: int) -> dict[str, float]:
    """Relative error (root mean square) of experts' outputs on the model's own inputs, mean over experts and layers.

    weights: dequantised weights in float32 arithmetic; kernel: as run, activation rounding included.
    """
    session = model.hybrimoe.session
    weights_only, kernel = [], []
    backend = ck.get_backend("numba")
    for layer, x in inputs.items():
        stored = session.store.layers[layer]
        spec = ck.ExpertSpec(stored.spec.hidden, stored.spec.inter, dtype, stored.spec.activation, stored.spec.has_bias)
        x = x[:MAX_SAMPLES].contiguous()
        for expert in range(min(limit, stored.num_experts)):
            weights = ck.unpack_expert(stored.spec, session.store.record(layer, expert))
            expected = ck.reference_ffn(spec, weights, x)
            record = np.zeros(spec.record_bytes, np.uint8)
            ck.pack_expert(spec, weights, record)
            weights_only.append(_relative(ck.reference_ffn(spec, ck.unpack_expert(spec, record), x), expected))
            kernel.append(_relative(_run(backend, spec, record, x), expected))
    return {"weight_error": float(np.mean(weights_only)), "kernel_error": float(np.mean(kernel))}


def _run(backend: ck.CpuBackend, spec: ck.ExpertSpec, record: np.ndarray, x: torch.Tensor) -> torch.Tensor:
    rows = np.empty(tuple(x.shape), np.float32)
    dispatch = ck.build_dispatch(np.zeros((len(x), 1), np.int64), np.ones((len(x), 1), np.float32), 1)
    addresses, positions = np.array([record.ctypes.data], np.uint64), np.zeros(1, np.int32)
    backend.run(spec, addresses, positions, dispatch, x.numpy(), rows)
    return torch.from_numpy(rows)


def _relative(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result - expected).norm() / expected.norm())
