"""One recorded call of a model: which module was called when, with which tensors. Everything else is read from it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from hybrimoe.generation.growing import grow_in_place
from hybrimoe.step.calls import tokens_held
from hybrimoe.step.errors import NotCompiled
from hybrimoe.step.states import States, states_of

PROMPT_TOKENS, NEW_TOKENS = 6, 4
"""Tokens of the call before the recorded one, and of that: a mask among new tokens matters in it too."""
SEED = 20250408
LARGE_LOGIT = 300.0
"""The largest logit of the recorded step."""
CALL_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, NotImplementedError, AssertionError)
"""What a module may raise that is called with what it was not written for."""


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One call of one module. `number`: in the order in which calls ended."""

    number: int
    path: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    @property
    def input(self) -> torch.Tensor:
        """The first tensor argument. Raises NotCompiled where there is none."""
        for value in (*self.args, *self.kwargs.values()):
            if isinstance(value, torch.Tensor):
                return value
        raise NotCompiled(f"{self.path} was called without a tensor")

    @property
    def result(self) -> torch.Tensor:
        """The output, or the first tensor of a tuple. Raises NotCompiled where there is none."""
        values = self.output if isinstance(self.output, tuple | list) else (self.output,)
        for value in values:
            if isinstance(value, torch.Tensor):
                return value
        raise NotCompiled(f"{self.path} returned no tensor")


@dataclass(slots=True)
class Trace:
    """The calls of one decode step of NEW_TOKENS tokens of one sequence, and its cache before and after.

    All tensors are kept, so that two of them have the same address only where they share memory.
    """

    model: nn.Module
    token_ids: torch.Tensor
    cache: DynamicCache
    states: dict[int, States] = field(default_factory=dict)
    """Of the layers of the cache that keep states: those before the step."""
    calls: list[Call] = field(default_factory=list)
    output: Any = None
    modules: dict[str, nn.Module] = field(init=False)

    def __post_init__(self) -> None:
        self.modules = dict(self.model.named_modules())

    def within(self, path: str) -> Iterator[Call]:
        """Calls of modules inside the module at `path`, in order."""
        return (call for call in self.calls if call.path.startswith(f"{path}."))

    def children(self, path: str) -> list[Call]:
        """Calls of the module's direct parts; of containers among them, their parts."""
        found = []
        for call in self.within(path):
            parent = call.path.rpartition(".")[0]
            while parent != path and isinstance(self.modules[parent], nn.ModuleList | nn.ModuleDict):
                parent = parent.rpartition(".")[0]
            if parent == path:
                found.append(call)
        return found

    def of(self, path: str) -> Call:
        """The one call of the module at `path`. Raises NotCompiled for none or several."""
        found = [call for call in self.calls if call.path == path]
        if len(found) != 1:
            raise NotCompiled(f"{path} is called {len(found)} times in a step, expected once")
        return found[0]

    def again(
        self, call: Call, layer: int, changed: Mapping[str, Any] | None = None, *,
        setting: tuple[nn.Module, str, int] | None = None,
    ) -> Any:  # fmt: skip
        """What a module returns for a recorded call once more, or a NotCompiled where it fails.

        layer: of the cache, the only one that it uses; it is given a copy of that, as it was before the step. changed:
        arguments by name; setting: a module's number, and what it is meanwhile.
        """
        own = copy.deepcopy(self.cache.layers[layer])
        cache = DynamicCache()
        cache.layers = [None] * len(self.cache.layers)
        cache.layers[layer] = own
        args = [cache if value is self.cache else value for value in call.args]
        kwargs = {name: cache if value is self.cache else value for name, value in call.kwargs.items()}
        module, name, number = setting or (call.module, "training", False)
        before = getattr(module, name)
        try:
            with torch.no_grad():
                own.crop(-NEW_TOKENS)
                setattr(module, name, number)
                return call.module(*args, **kwargs | dict(changed or {}))
        except CALL_ERRORS as error:
            return NotCompiled(f"{call.path}: {error}")
        finally:
            setattr(module, name, before)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of a trace are the same values in the same memory, in whatever shape."""
    return one.data_ptr() == other.data_ptr() and one.numel() == other.numel() and one.dtype == other.dtype


@contextmanager
def without_earlier_images(model: nn.Module) -> Iterator[None]:
    """Within the block a model that remembers how far the images of its latest prompt moved the text behind them has
    forgotten that: such a number is of other sequences."""
    kept = [
        (module, module.rope_deltas)
        for module in model.modules()
        if getattr(module, "rope_deltas", None) is not None
    ]  # fmt: skip
    for module, _ in kept:
        module.rope_deltas = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, deltas in kept:
            module.rope_deltas = deltas


def record(model: nn.Module) -> Trace:
    """Runs a short prompt, then a step with every call recorded.

    Raises NotCompiled where the model's cache is none of transformers' growing kind.
    """
    config: Any = model.config
    text_config = config.get_text_config(decoder=True)
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(0, text_config.vocab_size, (1, PROMPT_TOKENS + NEW_TOKENS), generator=generator)
    with torch.no_grad(), without_earlier_images(model):
        cache = model(input_ids=tokens[:, :PROMPT_TOKENS], use_cache=True).past_key_values
        if not isinstance(cache, DynamicCache):
            raise NotCompiled(f"the model keeps its past in a {type(cache).__name__}")
        grow_in_place(cache)
        trace = Trace(model, tokens, cache, _states(cache, text_config.num_hidden_layers))
        handles = [
            module.register_forward_hook(_recorder(trace, path), with_kwargs=True)
            for path, module in model.named_modules()
            if path
        ]
        output = model.get_output_embeddings()  # type: ignore[operator]
        if output is not None:
            handles.insert(0, output.register_forward_hook(_enlarged, prepend=True))
        try:
            trace.output = model(
                input_ids=tokens[:, PROMPT_TOKENS:], past_key_values=cache, use_cache=True, **_told(cache, model)
            )
        finally:
            for handle in handles:
                handle.remove()
    if trace.output.past_key_values is not cache or tokens_held(cache) != tokens.shape[1]:
        raise NotCompiled("the model puts another cache in the place of the one it was given")
    return trace


def _told(cache: DynamicCache, model: nn.Module) -> dict[str, Any]:
    """Where the new tokens stand and what they see, for models that would ask a layer without tokens for it: MiniMax's
    first one has none, and its forward then takes several new tokens for the first of the text."""
    if cache.get_seq_length() == PROMPT_TOKENS:
        return {}
    positions = torch.arange(PROMPT_TOKENS + NEW_TOKENS)
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    hidden = (positions > positions[PROMPT_TOKENS:, None]).to(dtype) * torch.finfo(dtype).min
    masks = {"full_attention": hidden[None, None], "linear_attention": None}
    return {"position_ids": positions[None, PROMPT_TOKENS:], "attention_mask": masks}


def _states(cache: DynamicCache, n_layers: int) -> dict[int, States]:
    held = {number: states_of(cache, number) for number in range(max(n_layers, len(cache.layers)))}
    return {number: states.copy() for number, states in held.items() if states is not None}


def _enlarged(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """The output layer's results as large as they may become, so that what bounds the logits behind it shows."""
    return output * (LARGE_LOGIT / output.abs().max()) if isinstance(output, torch.Tensor) else output


def _recorder(trace: Trace, path: str) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        trace.calls.append(Call(len(trace.calls), path, module, args, kwargs, output))

    return hook
