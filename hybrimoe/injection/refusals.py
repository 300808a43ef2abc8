"""Models that are not injected as they are: their experts' weights or calls belong to somebody else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from hybrimoe.errors import ModelError
from hybrimoe.experts.layout import is_experts
from hybrimoe.experts.module import HybridExperts


def refuse_second_injection(model: nn.Module) -> None:
    """Raises ModelError where a part of `model` is injected."""
    for path, module in model.named_modules():
        if isinstance(module, HybridExperts):
            raise ModelError(
                f"this model is injected already ({path} is HybridExperts); call model.hybrimoe.restore() first"
            )


def refuse_adapted_experts(model: nn.Module) -> None:
    """Raises ModelError where the weights of experts are changed on the way to their use: by an adapter, or by torch's
    parametrisations."""
    for path, module in model.named_modules():
        if not is_experts(module):
            continue
        if path.endswith(".base_layer"):  # what a PEFT layer calls the module that it adapts
            raise ModelError(
                f"{path.partition('.base_layer')[0]} carries an adapter (PEFT), which packed experts would drop: merge"
                " it first, with model = model.merge_and_unload(), then inject"
            )
        if is_parametrized(module):
            raise ModelError(
                f"{path} has parametrised weights: make them plain first, with"
                " torch.nn.utils.parametrize.remove_parametrizations, then inject"
            )


def refuse_wrapped_experts(model: nn.Module, paths: Sequence[str]) -> None:
    """Raises ModelError where the experts at `paths` are offloaded or called another way.

    Replacing them would drop what the wrapper does, without a word.
    """
    for path in paths:
        experts = model.get_submodule(path)
        around = list(_around(model, path))
        offloading = any(hasattr(module, "_hf_hook") for module in (*around, experts))
        if offloading and any(weight.is_meta for weight in experts.parameters(recurse=False)):
            raise ModelError(
                f"accelerate keeps the weights of {path} elsewhere (offloaded to the host or to disk), so they cannot"
                " be packed: use hybrimoe.load, which streams them from the checkpoint, or load the model without"
                " device_map or offloading, or call accelerate.hooks.remove_hook_from_module(model, recurse=True) first"
            )
        if _has_own_forward(experts) and not hasattr(experts, "_hf_hook"):
            raise ModelError(
                f"{path} has a forward of its own, set on the module, which packed experts would not call: inject the"
                " model before it is patched, or delete the attribute"
            )


def _has_own_forward(module: nn.Module) -> bool:
    """Whether calling the module does something else than its class says."""
    forward = module.__dict__.get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def _around(model: nn.Module, path: str) -> Iterator[nn.Module]:
    """The modules around the one at `path`, `model` first."""
    yield model
    module = model
    for name in path.split(".")[:-1]:
        module = module.get_submodule(name)
        yield module
