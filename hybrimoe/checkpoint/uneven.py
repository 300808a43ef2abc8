"""Models whose layers have different numbers of experts, as pruning or merging them layer by layer leaves them.

transformers' configurations have one number for all layers. How many each layer has, the checkpoint's tensors say: such
layers are built again on the meta device, each by a configuration of its own.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from hybrimoe.checkpoint.dense import OTHER_STACKS, PREDICTION_KEY
from hybrimoe.errors import ModelError
from hybrimoe.experts.layout import find_experts, read

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from hybrimoe.checkpoint.formats.dequantise import Source

COUNT_NAMES = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""What configurations call the number of experts."""
SINGLE = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:.*\.)?experts\.(\d+)\.")
STACKED = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:.*\.)?experts\.(?:gate_up_proj|up_proj|down_proj)$")
ROUTER = re.compile(
    r"(?:^|\.)layers\.(\d+)\.(?:.*\.)?(?:gate|router|gate\.wg|router\.layer|router\.classifier)\.weight$"
)
LAYER = re.compile(r"^((?:.*\.)?layers)\.(\d+)\.")


def uneven_counts(sources: Mapping[str, Source]) -> dict[int, int]:
    """The number of experts of each layer of a checkpoint; empty where all layers have the same.

    A layer counts where its router has a row for each of its experts: of a checkpoint that lacks a shard it has more.
    """
    numbers: dict[int, set[int]] = defaultdict(set)
    rows: dict[int, set[int]] = defaultdict(set)
    for key, source in sources.items():
        if PREDICTION_KEY.search(key) or OTHER_STACKS.search(key):
            continue  # layers of their own, with the same numbers
        if single := SINGLE.search(key):
            numbers[int(single[1])].add(int(single[2]))
        elif (stacked := STACKED.search(key)) and len(source.shape) == 3:
            numbers[int(stacked[1])] |= set(range(source.shape[0]))
        elif (router := ROUTER.search(key)) and len(source.shape) == 2:
            rows[int(router[1])].add(source.shape[0])
    counts = {layer: len(found) for layer, found in numbers.items()}
    if any(count not in rows[layer] for layer, count in counts.items()):
        return {}
    return counts if len(set(counts.values())) > 1 else {}


def counts_of(experts: Mapping[str, int]) -> dict[int, int]:
    """The same from the number of experts by the path of their module."""
    found = {path: LAYER.match(path) for path in experts}
    counts = {int(layer[2]): experts[path] for path, layer in found.items() if layer is not None}
    return counts if len(set(counts.values())) > 1 else {}


def fit_layers(model: PreTrainedModel, counts: Mapping[int, int]) -> None:
    """Gives each layer of the (meta) model as many experts as `counts` says.

    Raises ModelError for a family whose layers cannot be built so, and for fewer experts than a token is routed to.
    """
    for path, module in find_experts(model) if counts else []:
        layer = LAYER.match(path)
        count = None if layer is None else counts.get(int(layer[2]))
        if layer is None or count is None or count == read(module).num_experts:
            continue
        layers = model.get_submodule(layer[1])
        if not isinstance(layers, nn.ModuleList):
            raise _cannot(model, layer[0], count, f"{layer[1]} is a {type(layers).__name__}")
        layers[int(layer[2])] = _built(model, layers, int(layer[2]), count)


def _built(model: PreTrainedModel, layers: nn.ModuleList, number: int, count: int) -> nn.Module:
    """Layer `number` with `count` experts."""
    before, config = layers[number], copy.copy(model.config.get_text_config(decoder=True))
    name = next((name for name in COUNT_NAMES if hasattr(config, name)), None)
    if name is None:
        raise _cannot(model, f"layer {number}", count, f"its configuration has none of {', '.join(COUNT_NAMES)}")
    _check_top_k(config, number, count)
    setattr(config, name, count)
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(model.dtype)
    try:
        with torch.device("meta"):
            made: nn.Module = type(before)(config, number)
    except Exception as error:  # whatever the family's code raises of such a configuration
        raise _cannot(model, f"layer {number}", count, f"{type(error).__name__}: {error}") from error
    finally:
        torch.set_default_dtype(dtype)
    return made.train(before.training)


def _check_top_k(config: PreTrainedConfig, number: int, count: int) -> None:
    chosen = getattr(config, "num_experts_per_tok", None)
    if isinstance(chosen, int) and chosen > count:
        raise ModelError(
            f"layer {number} has {count} experts in the checkpoint, and config.json routes each token to {chosen}; give"
            f" num_experts_per_tok as {count} or less"
        )


def _cannot(model: PreTrainedModel, which: str, count: int, why: str) -> ModelError:
    return ModelError(
        f"the checkpoint's layers have different numbers of experts, and {which} of {model.config.model_type} cannot be"
        f" built with {count} ({why}); use a checkpoint with the same number in all layers"
    )
