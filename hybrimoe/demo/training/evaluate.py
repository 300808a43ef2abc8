"""Held-out bits per byte, and how evenly each layer's router spreads the tokens."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from hybrimoe.demo.training.balance_loss import layer_load, load_entropy
from hybrimoe.demo.training.data import TokenIds

EVALUATION_BATCH = 8
"""Windows evaluated at once."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Result over one stream.

    `nats_per_token` and `bits_per_byte` are means; `load` is float32 [layers, experts], each row summing to 1.
    """

    n_tokens: int
    n_bytes: int
    nats_per_token: float
    bits_per_byte: float
    load: Tensor

    def entropies(self) -> list[float]:
        """Router load entropy of each layer, 1.0 for uniform."""
        return [load_entropy(row) for row in self.load]


@torch.no_grad()
def evaluate_stream(
    model: PreTrainedModel, stream: TokenIds, byte_lengths: TokenIds, seq_len: int, max_windows: int | None = None
) -> Evaluation:
    """Scores every token of `stream` but the first, in windows of `seq_len` that do not see each other.

    Args:
        model: a Qwen3-MoE causal LM; its training mode is kept.
        stream: int32 [tokens], at least two.
        byte_lengths: int32 [vocabulary], see `token_byte_lengths`.
        max_windows: score only the first so many windows.

    Raises:
        ValueError: the stream has fewer than two tokens.
    """
    if len(stream) < 2:
        raise ValueError(f"expected at least two tokens to evaluate, found {len(stream)}")
    windows = [stream[start : start + seq_len + 1] for start in range(0, len(stream) - 1, seq_len)][:max_windows]
    nats, load = 0.0, torch.zeros(model.config.num_hidden_layers, model.config.num_experts)
    for batch in _batches(windows):
        batch_nats, batch_load = _score(model, batch)
        nats += batch_nats
        load += batch_load * batch.shape[0] * (batch.shape[1] - 1)
    targets = np.concatenate([window[1:] for window in windows])
    n_bytes = int(byte_lengths[targets].sum())
    return Evaluation(
        n_tokens=len(targets),
        n_bytes=n_bytes,
        nats_per_token=nats / len(targets),
        bits_per_byte=nats / math.log(2) / max(1, n_bytes),
        load=load / len(targets),
    )


def _batches(windows: Sequence[TokenIds]) -> list[Tensor]:
    """Groups neighbours of equal length: only the last window can be shorter, and becomes a batch of its own."""
    groups: list[list[TokenIds]] = []
    for window in windows:
        if groups and len(groups[-1]) < EVALUATION_BATCH and len(groups[-1][0]) == len(window):
            groups[-1].append(window)
        else:
            groups.append([window])
    return [torch.from_numpy(np.stack(group).astype(np.int64)) for group in groups]


def _score(model: PreTrainedModel, batch: Tensor) -> tuple[float, Tensor]:
    """Summed nats of a batch [windows, tokens + 1] and the mean load [layers, experts]."""
    top_k = model.config.num_experts_per_tok
    output = model.model(input_ids=batch[:, :-1], use_cache=False, output_router_logits=True)
    logits = model.lm_head(output.last_hidden_state).float()
    nats = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
    return float(nats), torch.stack([layer_load(layer, top_k) for layer in output.router_logits])
