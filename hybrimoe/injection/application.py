"""What the operators of the rules do to a model, kept so that it can be undone."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gpu_kernels.devices import device_is_here
from hybrimoe.dense.devices import Placements, require_device
from hybrimoe.errors import ModelError
from hybrimoe.injection.operators import DefaultKwargs, ExpertsKwargs
from hybrimoe.injection.resolve import Hit, Resolution, claimed_modules

if TYPE_CHECKING:
    from hybrimoe.runtime.session import Session


class Application:
    """What operators do to a model, kept so that it can be undone."""

    def __init__(self, model: nn.Module, session: Session, resolution: Resolution) -> None:
        self.session = session
        self.placements = Placements()
        self.originals: dict[str, nn.Module] = {}
        self.remarks: list[str] = list(resolution.remarks)
        self._sites = _sites_of(model)
        self._replaced: list[tuple[nn.Module, str, nn.Module]] = []
        self._claimed = claimed_modules(resolution.hits)

    def apply(self, hit: Hit) -> None:
        """Do what the hit's rule says. A rule without an operator does nothing."""
        if hit.rule.operator is None:
            return
        if hit.rule.operator.replaces_experts:
            self.replace_experts(hit)
        else:
            self.place(hit)

    def replace_experts(self, hit: Hit) -> None:
        """Put HybridExperts of the hit's placement where the experts module is."""
        operator, kwargs = hit.rule.operator, hit.rule.kwargs
        if operator is None or operator.placement is None or not isinstance(kwargs, ExpertsKwargs):
            raise ModelError(f"{hit.rule.where()}: this operator does not replace experts")
        hybrid = self.session.add_layer(hit.path, hit.module, operator.placement, kwargs.expert_dtype)
        self.originals[hit.path] = hit.module
        for parent, name in self._sites[id(hit.module)]:
            setattr(parent, name, hybrid)
            self._replaced.append((parent, name, hit.module))

    def place(self, hit: Hit) -> None:
        """Put the module on the device of the rule, if it names one."""
        kwargs = hit.rule.kwargs
        if not isinstance(kwargs, DefaultKwargs) or kwargs.device is None:
            return
        device = torch.device(kwargs.device)
        if kwargs.missing == "stay" and not device_is_here(device):
            self._remark_once(f"{hit.rule.where()}: {kwargs.device} is not here, the modules stay where they are")
            return
        require_device(device, f"{hit.rule.where()}: {hit.path}")
        self.placements.place(hit.path, hit.module, device, self._claimed)

    def undo(self) -> None:
        """Put every module and weight back; a second call does nothing."""
        while self._replaced:
            parent, name, original = self._replaced.pop()
            original.train(getattr(parent, name).training)
            setattr(parent, name, original)
        self.placements.undo()

    def copied(self, memo: dict[int, Any]) -> Application:
        """The same done to a copy of the model, whose modules are in `memo` (of `copy.deepcopy`)."""
        if self.placements.devices:
            raise ModelError(
                f"rules have placed modules on devices ({next(iter(self.placements.devices))}), which a copy of the"
                " model would share with it: call model.hybrimoe.restore() first, copy, and inject both"
            )
        twin = Application.__new__(Application)
        twin.session, twin.placements, twin.remarks = self.session, Placements(), list(self.remarks)
        twin.originals = copy.deepcopy(self.originals, memo)
        twin._replaced = copy.deepcopy(self._replaced, memo)
        twin._sites, twin._claimed = {}, frozenset()
        return twin

    def _remark_once(self, text: str) -> None:
        if text not in self.remarks:
            self.remarks.append(text)


def _sites_of(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Every place (parent, name) at which each module hangs; a shared module hangs at several."""
    sites: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                sites.setdefault(id(child), []).append((parent, name))
    return sites
