"""`cpu.attention`: decode steps of bfloat16 attention on the CPU by the kernel of `cpu_kernels`.

PyTorch's own kernel is made for many queries: against a long context it takes ten times as long as reading the keys and
values once does, which is most of a step of long chats. Prompts that go on from a cache are computed with PyTorch's
kernel block by block (`prompt_attention`): without the mask, of which it reads a number for each pair of tokens, and
without floats of all that the cache stores. Other prompts, other dtypes and other devices stay with PyTorch.

transformers asks its registry of attention functions for "sdpa" at each call of an attention module. While a model uses
the kernel, that entry is `attention_forward`, which passes on every call that is not of a module of such a model. The
model's configuration stays as it is, so another implementation that is set later ("eager", "flex_attention") is used.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from cpu_kernels import decode_attention, supports_decode_attention
from cpu_kernels.backends.prompt_attention import prompt_attention, supports_prompt_attention
from cpu_kernels.backends.shared import shared_backend
from cpu_kernels.step.states.stored import StoredStates
from hybrimoe.dense.prompts import multiplies_bfloat16

REPLACED = "sdpa"
"""The attention implementation in transformers' registry whose decode steps the kernel takes."""
MARK = "_hybrimoe_attention"
"""Attribute of a module that uses the kernel; holds its `KernelUse`."""
UNKNOWN_HERE = ("softcap", "position_bias", "s_aux", "cache")
"""Arguments of an attention call that the kernel does not know: PyTorch's gets the call, or refuses it."""
HEAD_SIZE = 64
"""Of the call that compiles the kernels (about 5 s) or loads them from the cache."""

AttentionFunction = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


@dataclass(slots=True)
class KernelUse:
    """One module's use of the kernel. threads: as in `cpu_kernels.get_backend`; calls: how many calls it took."""

    threads: int | None
    calls: int = 0


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """An attention function as transformers calls it; returns [B, queries, heads, V] and no weights.

    query [B, heads, queries, D], key and value [B, kv_heads, T, D or V]; attention_mask: bool (True is seen) or added.
    """
    use: KernelUse | None = module.__dict__.get(MARK)
    if use is not None and _takes_prompt(module, query, key, value, attention_mask, dropout, others):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        dtype = query.dtype if multiplies_bfloat16() else torch.float32
        found = prompt_attention(query, key, value, scale, dtype=dtype, threads=use.threads)
        return found.transpose(1, 2).contiguous(), None  # as torch's: some models look at it as [B, queries, heads * V]
    if use is not None and _takes(query, key, value, attention_mask, dropout, others):
        use.calls += 1
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        bias = None if attention_mask is None else _bias(attention_mask, query.shape[0], key.shape[2])
        return decode_attention(query, key, value, scale, bias, use.threads).transpose(1, 2), None
    return registry.passed_on(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others)


def _takes_prompt(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
    dropout: float, others: dict[str, Any],
) -> bool:  # fmt: skip
    """Whether `prompt_attention` computes the call: keys and values that are stored, or several tokens that see all
    tokens before them."""
    n_new, n_tokens = query.shape[2], key.shape[2]
    if not isinstance(key, StoredStates) and (n_new == 1 or n_new == n_tokens):
        return False
    if _is_special(query, key, value, mask, dropout, others) or not supports_prompt_attention(query, key, value):
        return False
    if mask is not None:
        return causal_masks.is_plain(mask, n_new, n_tokens)
    causal = others.get("is_causal")
    return n_new == 1 or (n_new == n_tokens and bool(getattr(module, "is_causal", True) if causal is None else causal))


def _is_special(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, dropout: float,
    others: dict[str, Any],
) -> bool:  # fmt: skip
    """Whether more is asked for than the kernels know."""
    if dropout or torch.compiler.is_compiling() or any(others.get(name) is not None for name in UNKNOWN_HERE):
        return True
    seen = (query, key, value) if mask is None else (query, key, value, mask)
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in seen)


class CausalMasks:
    """Which masks hide nothing but later tokens. All layers of a call have the same mask: it is looked at once."""

    def __init__(self) -> None:
        self._known = threading.local()

    def is_plain(self, mask: torch.Tensor, n_new: int, n_tokens: int) -> bool:
        """Whether a mask [B, 1, n_new, n_tokens] of bool (True is seen) lets token i see all but the last
        n_new - 1 - i."""
        if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1:] != (1, n_new, n_tokens):
            return False
        known, version = getattr(self._known, "latest", None), 0 if mask.is_inference() else mask._version
        if known is None or known[0]() is not mask or known[1] != version:
            n_past = n_tokens - n_new
            square = torch.ones(n_new, n_new, dtype=torch.bool).tril_()
            plain = bool(mask[..., :n_past].all()) and bool((mask[..., n_past:] == square).all())
            known = self._known.latest = (weakref.ref(mask), version, plain)
        return bool(known[2])


causal_masks = CausalMasks()


def _takes(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, dropout: float,
    others: dict[str, Any],
) -> bool:  # fmt: skip
    if query.shape[2] != 1 or isinstance(key, StoredStates):
        return False
    if _is_special(query, key, value, mask, dropout, others):
        return False
    same_mask = mask is None or (mask.dim() == 4 and mask.shape[1] == mask.shape[2] == 1)
    return same_mask and supports_decode_attention(query, key, value)


def _bias(mask: torch.Tensor, n_batch: int, n_tokens: int) -> torch.Tensor:
    """float32 [B, T] of a mask [B or 1, 1, 1, T or more]."""
    seen = mask[:, 0, 0, :n_tokens]
    if seen.dtype == torch.bool:
        seen = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)
    return seen.to(torch.float32).expand(n_batch, n_tokens)


class RegistryEntry:
    """transformers' entry for `REPLACED`: `attention_forward` while a model uses it, else what was found there."""

    def __init__(self) -> None:
        self.passed_on: AttentionFunction = sdpa_attention_forward
        self._users: weakref.WeakSet[DecodeAttention] = weakref.WeakSet()

    def add(self, user: DecodeAttention) -> None:
        """From now on calls go through `attention_forward`."""
        entry = AttentionInterface()[REPLACED]
        if entry is not attention_forward:
            self.passed_on = entry
            AttentionInterface.register(REPLACED, attention_forward)
        self._users.add(user)
        weakref.finalize(user, self._put_back)

    def remove(self, user: DecodeAttention) -> None:
        """`user` no longer needs the entry. A user that is dropped without it no longer counts either."""
        self._users.discard(user)
        self._put_back()

    def _put_back(self) -> None:
        """With the last user, unless somebody else has replaced the entry since."""
        if next(iter(self._users), None) is None and AttentionInterface()[REPLACED] is attention_forward:
            AttentionInterface.register(REPLACED, self.passed_on)


registry = RegistryEntry()


@dataclass(slots=True, eq=False, weakref_slot=True)
class DecodeAttention:
    """The modules of a model that use the kernel where they ask for scaled_dot_product_attention, by path."""

    modules: dict[str, nn.Module] = field(default_factory=dict)

    def calls(self) -> dict[str, int]:
        """How many calls of each module the kernel took, of the modules of which it took any."""
        counts = {path: module.__dict__[MARK].calls for path, module in self.modules.items()}
        return {path: n_calls for path, n_calls in counts.items() if n_calls}

    def undo(self) -> None:
        """The modules use PyTorch's function again."""
        for module in self.modules.values():
            module.__dict__.pop(MARK, None)
        self.modules.clear()
        registry.remove(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> DecodeAttention:
        """For the modules of a copied model, which are in `memo`."""
        twin = DecodeAttention({path: copy.deepcopy(module, memo) for path, module in self.modules.items()})
        registry.add(twin)
        return twin


def use_decode_attention(model: nn.Module, threads: int | None = None) -> DecodeAttention:
    """Lets the modules of `model` that call PyTorch's attention by transformers' registry use `attention_forward`.

    The kernels are compiled here where the model will need them.
    Raises ThreadingError where the kernels' threads do not start.
    """
    shared_backend(threads)
    done, chosen = DecodeAttention(), []
    for path, module in model.named_modules():
        config = module.__dict__.get("config")
        if hasattr(config, "_attn_implementation"):
            module.__dict__[MARK] = KernelUse(threads)
            done.modules[path] = module
            chosen += [module] if config._attn_implementation == REPLACED else []
    registry.add(done)
    if any(_computes_bfloat16_here(module) for module in chosen):
        nothing = torch.zeros(1, 1, 1, HEAD_SIZE, dtype=torch.bfloat16)
        decode_attention(nothing, nothing, nothing, 1.0, None, threads)  # now, and not in the first reply
    return done


def _computes_bfloat16_here(module: nn.Module) -> bool:
    return any(weight.dtype == torch.bfloat16 and weight.device.type == "cpu" for weight in module.parameters())
