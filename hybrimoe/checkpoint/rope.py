"""Rotary embeddings stretched to a longer context than a model was trained for, as the deployment's `rope` asks.

Transformers computes the angles; here its configuration is told how, before the model is built. Layers with a window
see no further than before, and keep their angles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hybrimoe.config.deploy import RopeConfig
from hybrimoe.errors import ModelError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

__all__ = ["Stretched", "check_stretched", "forget_longer_texts", "stretch", "stretched", "told"]

PLAIN = "default"
REPLACED = (PLAIN, "linear", "dynamic", "yarn")
"""Kinds that another takes the place of. The others (llama3, longrope, proportional) were trained with their angles."""
OF_SCALING = ("type", "factor", "original_max_position_embeddings", "attention_factor")
OF_YARN = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
WINDOWED = ("sliding", "chunked")
"""Words in the names of kinds of layers that do not see the whole text."""


@dataclass(frozen=True, slots=True)
class Stretched:
    """A model's entries for positions as they become. own, context: tokens that it was trained for, and has now.

    positions: max_position_embeddings, which transformers' dynamic scaling takes for the trained length.
    """

    parameters: dict[str, Any]
    positions: int
    own: int
    context: int


def stretch(config: PreTrainedConfig, rope: RopeConfig | None) -> Stretched | None:
    """Changes the configuration of a model that is not built yet; None where nothing is asked for. Raises as
    `stretched`."""
    if rope is None:
        return None
    text = config.get_text_config(decoder=True)
    names = ("rope_parameters", "max_position_embeddings", "original_max_position_embeddings", "rope_theta")
    found = stretched({name: getattr(text, name, None) for name in names}, rope, str(config.model_type))
    text.rope_parameters, text.max_position_embeddings = found.parameters, found.positions
    if getattr(text, "original_max_position_embeddings", None) is not None:
        text.original_max_position_embeddings = found.own
    return found


def stretched(config: Mapping[str, Any], rope: RopeConfig, model: str) -> Stretched:
    """What `rope` makes of the entries of a text configuration. model: what errors name.

    Raises ModelError for a model without rotary embeddings or a length that it was trained for, and for one that was
    trained with stretched angles of another kind.
    """
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(parameters, Mapping) or not (parameters or config.get("rope_theta")):
        raise ModelError(f"rope.scaling: {model} has no rotary embeddings to stretch; leave it out")
    nested = {name: dict(value) for name, value in parameters.items() if isinstance(value, Mapping)}
    kinds = nested or {"": dict(parameters)}
    seeing_all = [name for name in kinds if not any(word in name for word in WINDOWED)]
    if not seeing_all:
        raise ModelError(f"rope.scaling: every layer of {model} has a window, none sees the whole text; leave it out")
    own = _trained_tokens(config, [kinds[name] for name in seeing_all], rope, model)
    factor = 1.0 if rope.factor is None else rope.factor
    context = int(own * factor)
    for name in seeing_all:
        kinds[name] = _parameters(kinds[name], rope, own, model)
    return Stretched(
        {**parameters, **kinds} if nested else kinds[""], own if rope.scaling == "dynamic" else context, own, context
    )


def _trained_tokens(config: Mapping[str, Any], kinds: list[dict[str, Any]], rope: RopeConfig, model: str) -> int:
    if rope.original_context is not None:
        return rope.original_context
    for given in (*kinds, config):
        if original := given.get("original_max_position_embeddings"):
            return int(original)
    limit = config.get("max_position_embeddings")
    if not limit:
        raise ModelError(
            f"rope.scaling: the configuration of {model} does not say for how many tokens it was trained; give them"
            " (rope.original_context, --yarn-orig-ctx)"
        )
    already = [float(kind.get("factor") or 1.0) for kind in kinds if _kind(kind) == "linear"]
    return int(limit / max([1.0, *already]))  # such a configuration has the stretched length


def _parameters(own: dict[str, Any], rope: RopeConfig, n_tokens: int, model: str) -> dict[str, Any]:
    """Of one kind of layers."""
    kind = _kind(own)
    if kind not in REPLACED or "alpha" in own:
        raise ModelError(
            f"rope.scaling: {model} was trained with stretched rotary embeddings ({kind}), which another scaling would"
            " spoil; leave it out"
        )
    stays_yarn = kind == rope.scaling == "yarn"
    dropped = OF_SCALING if stays_yarn else (*OF_SCALING, *OF_YARN)
    kept = {name: value for name, value in own.items() if name not in dropped}
    if rope.scaling == "none":
        return {**kept, "rope_type": PLAIN}
    if stays_yarn and not _follows_factor(own):
        kept["attention_factor"] = own["attention_factor"]
    found = {**kept, "rope_type": rope.scaling, "factor": float(rope.factor or 1.0)}
    return found if rope.scaling == "linear" else {**found, "original_max_position_embeddings": n_tokens}


def _kind(parameters: Mapping[str, Any]) -> str:
    return str(parameters.get("rope_type", parameters.get("type", PLAIN)))


def _follows_factor(parameters: Mapping[str, Any]) -> bool:
    """Whether YaRN's factor of attention is the one that belongs to its factor of positions (YaRN, section 3.4)."""
    given = parameters.get("attention_factor")
    usual = 0.1 * math.log(max(1.0, float(parameters.get("factor") or 1.0))) + 1.0
    return given is None or math.isclose(float(given), usual, rel_tol=1e-3)


def told(n_tokens: int | None, rope: RopeConfig) -> str:
    """In a sentence, which context a model has by `rope`."""
    if rope.factor is None or not n_tokens:
        return f"context: {n_tokens} tokens, without the rope scaling of the model's configuration"
    own = round(n_tokens / rope.factor)
    return f"context: {n_tokens} tokens by rope scaling ({rope.scaling}, {rope.factor:g} times {own})"


def check_stretched(model: nn.Module, rope: RopeConfig | None) -> None:
    """Raises ModelError where no module of a model that was built computes angles as `rope` asks."""
    if rope is None or rope.scaling == "none":
        return
    kinds = {kind for module in model.modules() for kind in _kinds(module)}
    if rope.scaling not in kinds:
        name = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise ModelError(
            f"rope.scaling: {rope.scaling}: transformers computes the positions of {name} in its own way"
            f" ({', '.join(sorted(kinds)) or 'no rotary embeddings'}); leave it out"
        )


def forget_longer_texts(model: nn.Module) -> None:
    """Rotary embeddings of kind dynamic compute the angles of each call for that call alone.

    Transformers' keep those of the longest text until a short one comes: a reply would depend on the replies before
    and beside it. They replace buffers, too, after which a compiled step takes the model for another one.
    """
    for module in model.modules():
        if "dynamic" in _kinds(module):
            module.forward = _forgetting(module)


def _kinds(module: nn.Module) -> Iterator[str]:
    """Kinds of the angles that a module computes: one, or one for each kind of layers."""
    given: Any = getattr(module, "rope_type", None)
    yield from () if given is None else map(str, given.values() if isinstance(given, dict) else [given])


def _forgetting(module: Any) -> Callable[..., Any]:
    own = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        lengths = {name: value for name, value in vars(module).items() if name.endswith("max_seq_len_cached")}
        buffers = dict(module._buffers)
        try:
            return own(*args, **kwargs)
        finally:
            vars(module).update(lengths)
            module._buffers.update(buffers)

    return forward
