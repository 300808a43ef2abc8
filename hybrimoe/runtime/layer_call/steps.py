"""Where a call of a layer belongs: a new step or the current one, prefill or decode, a new sequence or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from scheduler import Phase


@dataclass(frozen=True, slots=True)
class Step:
    """`new`: the first call of a step. `new_sequence`: that step starts a prompt."""

    phase: Phase
    new: bool
    new_sequence: bool


NO_STEP = 1 << 62
"""In place of the last layer where the next call starts a step, whichever its layer."""
SAME_STEP: dict[Phase, Step] = {
    "prefill": Step("prefill", new=False, new_sequence=False),
    "decode": Step("decode", new=False, new_sequence=False),
}


class StepTracker:
    """Follows the calls of the layers of one model. A call of a layer after `last_layer` goes on with the step.

    A step starts when the layer index does not rise, or when the bound model was just called. Decode is told from
    the model's input (one new position per sequence) where a model is bound, else from the number of tokens.
    """

    def __init__(self, decode_max_tokens: int) -> None:
        self._decode_max_tokens = decode_max_tokens
        self._handle: RemovableHandle | None = None
        self.restart()

    def restart(self) -> None:
        """Forgets the current step."""
        self.last_layer = NO_STEP
        self._phase: Phase | None = None
        self._announced: Phase | None = None

    def bind(self, model: nn.Module) -> None:
        """Watches the model's calls until `unbind`."""
        self.unbind()
        self._handle = model.register_forward_pre_hook(self._on_model_call, with_kwargs=True)

    def unbind(self) -> None:
        """Removes the hook."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def forget(self, model: nn.Module) -> None:
        """Removes the hook from `model`, which may be a copy of the model that was bound."""
        for key in [key for key, hook in model._forward_pre_hooks.items() if hook == self._on_model_call]:
            del model._forward_pre_hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> StepTracker:
        """A copy of a model is watched as well: its layers run in the same session."""
        return self

    def announce(self, phase: Phase) -> None:
        """The next layer call starts a step of this phase (for callers that do not call the model itself)."""
        self._announced, self.last_layer = phase, NO_STEP

    def next(self, layer: int, n_tokens: int) -> Step:
        """Classifies one call."""
        previous = self._phase
        new = previous is None or layer <= self.last_layer
        self.last_layer = layer
        if not new:
            assert previous is not None
            return SAME_STEP[previous]
        self._phase = self._announced or ("decode" if n_tokens <= self._decode_max_tokens else "prefill")
        self._announced = None
        starts = previous is None or (previous == "decode" and self._phase == "prefill")
        return Step(self._phase, new=True, new_sequence=starts)

    def _on_model_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = kwargs.get("input_ids")
        if inputs is None:
            inputs = kwargs.get("inputs_embeds")
        if inputs is None and args:
            inputs = args[0]
        if isinstance(inputs, torch.Tensor) and inputs.dim() >= 2:
            self.announce("decode" if inputs.shape[1] == 1 else "prefill")
