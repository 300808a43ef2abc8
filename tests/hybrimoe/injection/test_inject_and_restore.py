"""inject changes only what the rules say and gives the same logits; restore leaves exactly the model that was there."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import hybrimoe
from hybrimoe.errors import BudgetError, CheckpointError, ConfigError, DeviceError, ModelError, RuleError
from hybrimoe.experts.module import HybridExperts
from hybrimoe.runtime.session import Session

EXPERTS = [f"model.layers.{layer}.mlp.experts" for layer in range(3)]
IDS = torch.arange(3, 12)[None]


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def state(model: nn.Module) -> dict[str, Any]:
    """Everything that must come back: modules by identity, weights by identity and bits, hooks, attributes."""
    return {
        "modules": {path: id(module) for path, module in model.named_modules()},
        "weights": {name: (id(weight), weight.detach().clone()) for name, weight in model.named_parameters()},
        "hooks": {
            path: (len(module._forward_pre_hooks), len(module._forward_hooks), "forward" in module.__dict__)
            for path, module in model.named_modules()
        },
        "attributes": set(model.__dict__),
        "training": {path: module.training for path, module in model.named_modules()},
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert all(before[key] == after[key] for key in ("modules", "hooks", "attributes", "training"))
    assert list(before["weights"]) == list(after["weights"])
    for name, (identity, value) in before["weights"].items():
        assert after["weights"][name][0] == identity
        assert torch.equal(after["weights"][name][1], value)


@pytest.mark.parametrize(
    ("rules", "settings"),
    [
        ("auto", {"accelerator": "none"}),
        ("auto", {"accelerator": "emulated", "gpu_expert_slots": 0.25}),
        ("cpu", {"accelerator": "emulated", "gpu_expert_slots": 2}),
        (
            [
                {"match": {"name": r"\.experts$", "layers": "0"}, "replace": {"op": "cpu_experts"}},
                {"match": {"name": r"\.experts$", "layers": "1"}, "replace": {"op": "accelerator_experts"}},
            ],
            {"accelerator": "emulated", "gpu_expert_slots": 8},
        ),
    ],
)
def test_same_logits_while_injected_and_exactly_the_model_afterwards(
    qwen3: PreTrainedModel, rules: Any, settings: dict[str, Any]
) -> None:
    expected, before = logits(qwen3), state(qwen3)
    injection = hybrimoe.inject(qwen3, rules, expert_dtype="float32", **settings)
    replaced = [path for path, module in qwen3.named_modules() if isinstance(module, HybridExperts)]
    assert replaced == [hit.path for hit in injection.resolution.experts]
    assert qwen3.hybrimoe is injection
    torch.testing.assert_close(logits(qwen3), expected, rtol=0, atol=1e-4)
    assert injection.stats().as_dict()["total"]
    injection.restore()
    assert_same(before, state(qwen3))
    assert torch.equal(logits(qwen3), expected)
    injection.restore()
    assert not injection.active


def test_it_can_be_injected_again_after_restore_and_restores_at_the_end_of_a_block(qwen3: PreTrainedModel) -> None:
    before = state(qwen3)
    for _ in range(2):
        with hybrimoe.inject(qwen3, accelerator="none", expert_dtype="float32"):
            logits(qwen3)
        assert_same(before, state(qwen3))


def test_restore_lets_go_of_the_session(qwen3: PreTrainedModel) -> None:
    injection = hybrimoe.inject(qwen3, accelerator="none", expert_dtype="float32")
    session = weakref.ref(injection.session)
    injection.restore()
    del injection
    gc.collect()
    assert session() is None


def test_a_second_injection_is_refused(qwen3: PreTrainedModel) -> None:
    with hybrimoe.inject(qwen3, accelerator="none"):
        with pytest.raises(
            ModelError, match=r"injected already \(model.layers.0.mlp.experts .* model.hybrimoe.restore"
        ):
            hybrimoe.inject(qwen3, accelerator="none")
        with pytest.raises(ModelError, match="injected already"):
            hybrimoe.inject(qwen3.model, accelerator="none")


def test_a_dense_model_is_refused() -> None:
    config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
    with pytest.raises(ModelError, match="has no experts"):
        hybrimoe.inject(LlamaForCausalLM(config), accelerator="none")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"rules": "moo"}, RuleError, "unknown rule set 'moo'; did you mean 'moe'"),
        ({"accelerator": "cuda:63"}, DeviceError, "cuda:63"),
        ({"accelerator": "cuda63"}, ConfigError, "no accelerator"),
        ({"accelerator": "emulated", "gpu_expert_slots": "1B"}, BudgetError, "holds no expert"),
        ({"gpu_expert_slots": -1}, ConfigError, "cannot be negative"),
        ({"expert_dtype": "int9"}, ConfigError, "int9"),
        ({"scheduler": {"policy": "hybrimo"}}, ConfigError, "did you mean 'hybrimoe'"),
        ({"gpu_expert_slot": 3}, ConfigError, "did you mean 'gpu_expert_slots'"),
        ({"runtime": {"profil": None}}, ConfigError, "unknown runtime setting 'profil'; did you mean 'profile'"),
        (
            {
                "rules": [
                    {"match": {"name": "^lm_head$"}, "replace": {"op": "default", "kwargs": {"device": "cuda:63"}}}
                ]
            },
            DeviceError,
            "<rules>: rule 0: lm_head: the device 'cuda:63' is not here",
        ),
    ],
)
def test_a_refusal_leaves_the_model_as_it_was(
    qwen3: PreTrainedModel, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    before = state(qwen3)
    with pytest.raises(error, match=message):
        hybrimoe.inject(qwen3, **{"accelerator": "none", **settings})
    assert_same(before, state(qwen3))


def test_a_failure_half_way_leaves_the_model_as_it_was(qwen3: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("broken while finalising")

    before = state(qwen3)
    monkeypatch.setattr(Session, "finalize", fail)
    with pytest.raises(RuntimeError, match="broken while finalising"):
        hybrimoe.inject(qwen3, accelerator="none")
    assert_same(before, state(qwen3))


def test_a_dense_weight_that_is_not_finite_leaves_the_model_as_it_was(qwen3: PreTrainedModel) -> None:
    qwen3.model.layers[1].self_attn.q_proj.weight.data[0, 0] = torch.inf
    before = state(qwen3)
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        hybrimoe.inject(qwen3, accelerator="none", dense_dtype="int8")
    assert_same(before, state(qwen3))


def test_keywords_go_over_the_configuration(qwen3: PreTrainedModel) -> None:
    config = {"accelerator": "emulated", "cpu": {"expert_dtype": "int8"}, "memory": {"gpu_experts": 3}, "rules": "cpu"}
    with hybrimoe.inject(qwen3, config=config, expert_dtype="float32") as injection:
        assert injection.config.cpu.expert_dtype == "float32"
        assert {row.op for row in injection.explain().rows} == {"cpu_experts"}
        assert {row.expert_dtype for row in injection.explain().rows} == {"float32"}


def test_a_rule_may_choose_the_dtype_of_its_layers(qwen3: PreTrainedModel) -> None:
    int8 = {"op": "hybrid_experts", "kwargs": {"expert_dtype": "int8"}}
    rules = {"version": 1, "extends": "moe", "rules": [{"match": {"name": "experts$", "layers": 1}, "replace": int8}]}
    with hybrimoe.inject(qwen3, rules, accelerator="none", expert_dtype="float32") as injection:
        assert [layer.spec.dtype for layer in injection.session.layer_specs()] == ["float32", "int8", "float32"]
        assert [layer.path for layer in injection.session.layer_specs()] == EXPERTS


def test_an_injected_model_is_not_saved_without_its_experts(qwen3: PreTrainedModel, tmp_path: Path) -> None:
    with hybrimoe.inject(qwen3, accelerator="none", expert_dtype="int4"):
        qwen3.save_pretrained(tmp_path / "injected")
    qwen3.save_pretrained(tmp_path / "restored")
    for folder in ("injected", "restored"):
        again = type(qwen3).from_pretrained(tmp_path / folder)
        assert torch.equal(logits(again), logits(qwen3))


def test_a_copy_of_an_injected_model_runs_in_the_same_session(qwen3: PreTrainedModel) -> None:
    with hybrimoe.inject(qwen3, accelerator="none", expert_dtype="float32") as injection:
        expected = logits(qwen3)
        twin = copy.deepcopy(qwen3)
        assert torch.equal(logits(twin), expected)
        assert twin.hybrimoe.session is injection.session


def test_accelerator_experts_without_an_accelerator_are_remarked(qwen3: PreTrainedModel) -> None:
    rules = [{"match": {"name": r"\.experts$"}, "replace": {"op": "accelerator_experts"}}]
    expected = logits(qwen3)
    with hybrimoe.inject(qwen3, rules, accelerator="none", expert_dtype="float32") as injection:
        assert injection.remarks == ("<rules>: rule 0: no accelerator slots here, the CPU computes these experts",)
        torch.testing.assert_close(logits(qwen3), expected, rtol=0, atol=1e-4)
    with hybrimoe.inject(qwen3, rules, accelerator="emulated", gpu_expert_slots=4) as injection:
        assert injection.remarks == ()


def test_training_mode_set_while_injected_is_kept(qwen3: PreTrainedModel) -> None:
    injection = hybrimoe.inject(qwen3, accelerator="none")
    qwen3.train()
    injection.restore()
    assert all(module.training for module in qwen3.modules())


def test_an_experts_module_that_hangs_at_two_places_is_replaced_at_both(qwen3: PreTrainedModel) -> None:
    qwen3.model.layers[2].mlp.experts = qwen3.model.layers[0].mlp.experts
    expected = logits(qwen3)
    injection = hybrimoe.inject(qwen3, accelerator="none", expert_dtype="float32")
    assert qwen3.model.layers[2].mlp.experts is qwen3.model.layers[0].mlp.experts
    torch.testing.assert_close(logits(qwen3), expected, rtol=0, atol=1e-4)
    injection.restore()
    assert torch.equal(logits(qwen3), expected)


def test_a_meta_model_gets_its_weights_later(qwen3: PreTrainedModel, qwen3_meta: PreTrainedModel) -> None:
    from hybrimoe.experts.layout import read

    expected = logits(qwen3)
    meta = type(qwen3_meta)(qwen3_meta.config).to("meta").eval()
    injection = hybrimoe.inject(meta, accelerator="none", expert_dtype="float32")
    assert list(injection.originals) == EXPERTS
    with pytest.raises(ModelError):
        injection.session.run_layer(0, torch.zeros(1, 32), torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2))
    for layer, path in enumerate(EXPERTS):
        for expert in range(8):
            injection.session.store.write(layer, expert, read(qwen3.get_submodule(path)).expert(expert))
    injection.session.start()
    for path, hybrid in meta.named_modules():
        if isinstance(hybrid, HybridExperts):
            parent, _, name = path.rpartition(".")
            setattr(qwen3.get_submodule(parent), name, hybrid)
    torch.testing.assert_close(logits(qwen3), expected, rtol=0, atol=1e-4)
    injection.session.close()


def test_a_list_of_accelerators_gives_each_its_layers(qwen3: PreTrainedModel) -> None:
    expected = logits(qwen3)
    two = ["emulated", "emulated"]
    with hybrimoe.inject(qwen3, accelerator=two, gpu_expert_slots=0.5, expert_dtype="float32") as injection:
        torch.testing.assert_close(logits(qwen3), expected)
        devices = [row.device for row in injection.explain().rows if row.n_experts]
        assert injection.config.accelerator == tuple(two)
    assert devices == [f"cpu + accelerator {unit} (emulated accelerator)" for unit in (0, 0, 1)]
