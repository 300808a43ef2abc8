"""What the class paths of KTransformers' rule files mean here: the one table, and the translation of a rule.

Source of the names: kvcache-ai/ktransformers, ktransformers/optimize/optimize_rules and ktransformers/operators.

An entry has one of four effects:
- experts: the operator here that does the same (hybrid, CPU or accelerator experts, by the devices of the rule);
- placement: a faster kernel for a module whose result is the same. transformers' own module computes it here; the
  device of the rule is kept, its kernel choice is not. Such a rule may match nothing (KTransformers' model classes have
  other names than transformers'), which is reported, not refused;
- ignored: it steers KTransformers' own forward pass and has no effect on results here; reported;
- refused: it changes results and has no counterpart here; an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from yaml_rules.errors import YamlRulesError
from yaml_rules.schema import Rule
from yaml_rules.suggest import did_you_mean, unknown

Effect = Literal["experts", "placement", "ignored", "refused"]

_OPERATORS = "ktransformers.operators."


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the table: a pattern over the class path after `ktransformers.operators.`, and what it means."""

    pattern: str
    effect: Effect
    meaning: str


TABLE: tuple[Entry, ...] = (
    Entry("default", "placement", "the module stays as it is, on the given device"),
    Entry("experts.KTransformersExperts", "experts", "hybrid_experts, or cpu_ or accelerator_experts by its devices"),
    Entry("experts.KTransformersExpertsV2", "experts", "as KTransformersExperts"),
    Entry("experts.KTransformersMLPExpert", "experts", "as KTransformersExperts (an early name)"),
    Entry(
        "experts.K*Experts", "experts", "as KTransformersExperts, by the family's name: KLlama4Experts, KGlm4Experts"
    ),
    Entry("experts.*MoE*", "placement", "the block around the experts is transformers' own"),
    Entry("experts.*Moe*", "placement", "the block around the experts is transformers' own"),
    Entry("linear.KTransformersLinear", "placement", "linear layers are computed by torch"),
    Entry("linear.KTransformerLinear", "placement", "linear layers are computed by torch"),
    Entry("RoPE.*", "placement", "rotary embeddings are transformers' own"),
    Entry("gate.*", "placement", "routers are transformers' own"),
    Entry("attention.*", "placement", "attention is transformers' own"),
    Entry("balance_serve_attention.*", "placement", "attention is transformers' own"),
    Entry("layernorm.*", "placement", "norms are transformers' own"),
    Entry("mlp.*", "placement", "dense MLPs are transformers' own"),
    Entry("models.*", "ignored", "layer-wise prefill and transfer maps belong to KTransformers' own forward pass"),
    Entry("layer_wise_prefill.*", "ignored", "layer-wise prefill belongs to KTransformers' own forward pass"),
    Entry("ascend.*", "refused", "the Ascend kernels quantise weights and activations to 8 bits"),
)

# The classes that rule files name most, for "did you mean".
KNOWN_CLASSES: tuple[str, ...] = (
    "default",
    *(
        _OPERATORS + name
        for name in (
            "experts.KTransformersExperts",
            "experts.KTransformersExpertsV2",
            "experts.KTransformersMLPExpert",
            "experts.KLlama4Experts",
            "experts.KGlm4Experts",
            "experts.KSmallthinkerExperts",
            "experts.KDeepseekV2MoE",
            "experts.KDeepseekV3MoE",
            "experts.KQwen2MoeSparseMoeBlock",
            "experts.KQwen3MoeSparseMoeBlock",
            "linear.KTransformersLinear",
            "RoPE.RotaryEmbedding",
            "RoPE.YarnRotaryEmbedding",
            "gate.KMoEGate",
            "attention.KDeepseekV2Attention",
            "layernorm.RMSNorm",
            "mlp.KQwen2MoeMLP",
            "models.KDeepseekV2Model",
            "models.KQwen2MoeModel",
            "layer_wise_prefill.KQwen2MoeModel",
        )
    ),
)

_DEVICE_KWARGS = ("prefill_device", "generate_device", "out_device", "device")
_KERNEL_KWARGS = (
    "prefill_op", "generate_op", "prefill_mlp_type", "generate_mlp_type", "prefill_linear_type",
    "generate_linear_type", "absorb_for_prefill",
)  # fmt: skip
_KWARGS: Mapping[Effect, tuple[str, ...]] = {
    "experts": (*_DEVICE_KWARGS, *_KERNEL_KWARGS, "backend", "n_deferred_experts"),
    "placement": (*_DEVICE_KWARGS, *_KERNEL_KWARGS),
    "ignored": (*_DEVICE_KWARGS, "per_layer_prefill_intput_threshold", "transfer_map"),
    "refused": (),
}
# `backend` of KTransformersExpertsV2: how the CPU stores experts. llamafile takes what the GGUF file has.
_DTYPE_OF_BACKEND: Mapping[str, str | None] = {
    "AMXInt4": "int4",
    "AMXInt8": "int8",
    "AMXBF16": "bfloat16",
    "llamafile": None,
}
# Modules that transformers 5 names differently from the models that KTransformers' rules were written for.
RENAMED_MODULES: Mapping[str, str] = {"mlp": "block_sparse_moe"}


@dataclass(frozen=True, slots=True)
class Translation:
    """A KTransformers rule in terms of this project: `op` is None where the rule is ignored.

    lenient: the rule may match nothing or be shadowed; note: what of the rule has no effect here.
    """

    op: str | None
    kwargs: Mapping[str, Any]
    lenient: bool
    note: str


def translate(rule: Rule) -> Translation:
    """Translate a rule whose `replace` names a class.

    Raises YamlRulesError for a class or kwarg without counterpart.
    """
    name = rule.form.replace.class_ or ""
    entry = _entry(rule, name)
    _check_kwargs(rule, entry)
    if entry.effect == "experts":
        return _experts(rule)
    if entry.effect == "placement":
        return _placement(rule, entry)
    return Translation(None, {}, lenient=True, note=f"{_short(name)} has no effect on results here: {entry.meaning}")


def old_path(path: str) -> str:
    """The path as the models of KTransformers' time had it (`mlp` was `block_sparse_moe` in Mixtral)."""
    return ".".join(RENAMED_MODULES.get(part, part) for part in path.split("."))


def _entry(rule: Rule, name: str) -> Entry:
    place = f"{rule.where(('replace', 'class'))}: replace.class"
    tail = name.removeprefix(_OPERATORS)
    known = name == "default" or name.startswith(_OPERATORS)
    entry = next((entry for entry in TABLE if known and fnmatchcase(tail, entry.pattern)), None)
    if entry is None:
        raise YamlRulesError(f"{place}: {name!r} has no counterpart here{did_you_mean(name, KNOWN_CLASSES)}")
    if entry.effect == "refused":
        near = did_you_mean(name, [known for known in KNOWN_CLASSES if known != name])
        raise YamlRulesError(f"{place}: {name!r} has no counterpart here: {entry.meaning}{near}")
    return entry


def _check_kwargs(rule: Rule, entry: Entry) -> None:
    known = _KWARGS[entry.effect]
    for key in rule.form.replace.kwargs:
        if key not in known:
            place = rule.where(("replace", "kwargs", key))
            raise YamlRulesError(f"{place}: {unknown('kwarg', key, known)}")


def _experts(rule: Rule) -> Translation:
    kwargs = rule.form.replace.kwargs
    if any(kwargs.get("n_deferred_experts") or ()):
        place = rule.where(("replace", "kwargs", "n_deferred_experts"))
        raise YamlRulesError(
            f"{place}: expert deferral changes results and has no counterpart in rules; remove this key"
        )
    backend = kwargs.get("backend", "llamafile")
    if backend not in _DTYPE_OF_BACKEND:
        place = rule.where(("replace", "kwargs", "backend"))
        raise YamlRulesError(f"{place}: {unknown('backend', str(backend), _DTYPE_OF_BACKEND)}")
    dtype = _DTYPE_OF_BACKEND[backend]
    op = _experts_operator(kwargs)
    note = (
        f"{_short(rule.form.replace.class_ or '')} became {op}; its kernels (prefill_op, generate_op) are chosen here"
    )
    return Translation(op, {} if dtype is None else {"expert_dtype": dtype}, lenient=False, note=note)


def _experts_operator(kwargs: Mapping[str, Any]) -> str:
    on_cpu = [
        str(kwargs.get(key, "cpu")).startswith("cpu") for key in ("generate_device", "prefill_device", "out_device")
    ]
    if not on_cpu[0]:
        return "accelerator_experts"
    return "cpu_experts" if all(on_cpu) else "hybrid_experts"


def _placement(rule: Rule, entry: Entry) -> Translation:
    kwargs = rule.form.replace.kwargs
    device = next((kwargs[key] for key in ("generate_device", "prefill_device", "device") if key in kwargs), None)
    note = "" if entry.pattern == "default" else f"{_short(rule.form.replace.class_ or '')}: {entry.meaning}"
    if device is None:
        return Translation("default", {}, lenient=True, note=note)
    if kwargs.get("prefill_device", device) != device:
        note = "; ".join(
            part for part in (note, f"prefill_device is not followed, the module stays on {device}") if part
        )
    return Translation("default", {"device": str(device), "missing": "stay"}, lenient=True, note=note)


def _short(name: str) -> str:
    return name.rsplit(".", 1)[-1]
